"""From what one device needs to what each of several needs, and which of it fits."""

from dataclasses import replace

import pytest

from patcher_pl.attackers import FineTuningAttacker
from patcher_pl.defenses import Patcher
from patcher_pl.hypergradients import Adjoint, FirstOrder
from patcher_pl.models import LanguageModel
from patcher_pl.optim import AdamW
from patcher_pl.planning import Gpu, Plan
from patcher_pl.planning.placements import (
    OFFLOADED,
    VECTORS,
    Overhead,
    Placement,
    candidates,
    settings_for,
)
from patcher_pl.planning.rehearsal import Footprint, LayerSizes, Work
from patcher_pl.planning.tracker import ATTACK, DEFEND, Part

GIB = 2**30
NOTHING = Overhead(fixed_gib=0, fragmentation=0)
LAYERS = LayerSizes(total=40 * GIB, largest_layer=2 * GIB, rest=4 * GIB, num_parameters=10)
GPU = Gpu(name="small", memory_gib=70, bfloat16_tflops=100, float32_tflops=10)


def footprint(**changes):
    values = {
        "peaks": {
            DEFEND: [{Part.PARAMETERS: 40 * GIB, Part.ACTIVATIONS: 30 * GIB}],
            ATTACK: [
                {Part.PARAMETERS: 40 * GIB, Part.ATTACKER_OPTIMIZER: 80 * GIB},
                {Part.PARAMETERS: 40 * GIB, Part.ACTIVATIONS: 50 * GIB},
            ],
        },
        "plain": Work(1, 16, 1000),
        "defended": Work(2, 32, 2000),
        "attack_step": Work(1, 8, 500),
        "layers": LAYERS,
    }
    return Footprint(**{**values, **changes})  # type: ignore[arg-type]


def test_one_device_holds_everything():
    need = Placement().need(footprint(), NOTHING)
    assert (need.peak_phase, need.device_bytes, need.host_bytes) == (ATTACK, 120 * GIB, 0)


def test_sharding_splits_weights_but_not_activations():
    """Wrong if activations were split, gathered layers forgotten, or the moment not chosen anew: on
    8 devices the attack's forward pass needs more than its optimizer."""
    need = Placement(num_devices=8, sharded=True).need(footprint(), NOTHING)
    gathered = 2 * 4 + 4 * 2
    assert need.device[ATTACK][Part.PARAMETERS] == 5 * GIB
    assert need.device_bytes == (5 + 50 + gathered) * GIB


def test_layers_that_stay_gathered_are_all_there():
    kept = Placement(num_devices=8, sharded=True, keeps_gathered=True).need(footprint(), NOTHING)
    assert kept.device[ATTACK][Part.GATHERED] == (40 + 4 + 2 * 2) * GIB


def test_weights_stored_in_another_format_than_computed_in():
    """Weights of 4 bytes that are gathered as 2 and whose gradients are sent as 4."""
    found = footprint().with_stored_weights(stored=4, computed=2, sent=4)
    need = Placement(num_devices=8, sharded=True).need(found, NOTHING)
    assert need.device[ATTACK][Part.PARAMETERS] == 10 * GIB
    assert need.device[ATTACK][Part.ACTIVATIONS] == 50 * GIB
    # Outside of layers 1 + 2; layers: two gathered, one gradient, and one twice as large on its way.
    assert need.device[ATTACK][Part.GATHERED] == (4 * 3 + 2 * 5) * GIB


def test_moments_of_a_format_of_their_own_do_not_follow_the_weights():
    """Wrong if moments of 8 bits were planned as twice that where weights are gathered as 2 bytes."""
    own = replace(footprint(), own_format=frozenset({Part.PARAMETERS}))
    found = own.with_stored_weights(stored=4, computed=2, sent=4)
    scaled = footprint().with_stored_weights(stored=4, computed=2, sent=4)
    assert found.peaks[ATTACK][0][Part.PARAMETERS] * 2 == scaled.peaks[ATTACK][0][Part.PARAMETERS]


def test_what_is_offloaded_lies_on_the_host_once_per_device():
    whole = Placement(num_devices=2, on_host=OFFLOADED).need(footprint(), NOTHING)
    split = Placement(num_devices=2, sharded=True, on_host=OFFLOADED).need(footprint(), NOTHING)
    assert whole.host_bytes == 2 * 120 * GIB
    assert split.host_bytes == 120 * GIB
    assert whole.device_bytes == 50 * GIB


def test_copies_that_are_split_among_fewer_devices_need_more_of_each():
    """As many devices as hold one copy do; those of other copies hold the same once more."""
    copies = Placement(num_devices=8, sharded=True, num_replicas=4).need(footprint(), NOTHING)
    pair = Placement(num_devices=2, sharded=True).need(footprint(), NOTHING)
    assert copies.device == pair.device
    on_host = Placement(num_devices=8, sharded=True, num_replicas=4, on_host=OFFLOADED)
    assert on_host.need(footprint(), NOTHING).host_bytes == 4 * 120 * GIB
    assert str(on_host) == "8 devices, FSDP2, 4 copies, CPU offload"


def test_overhead_is_added_to_tensors():
    need = Placement().need(footprint(), Overhead(fixed_gib=2, fragmentation=0.1))
    assert need.device_bytes == (120 + 12 + 2) * GIB


@pytest.mark.parametrize("field", ["fixed_gib", "fragmentation"])
def test_negative_overhead_is_refused(field):
    with pytest.raises(ValueError, match=rf"Overhead.{field} must be >= 0, got -1"):
        Overhead(**{field: -1})


def test_candidates_without_sharding_stay_on_one_device():
    assert {placement.num_devices for placement in candidates([1, 2, 8], can_shard=False)} == {1}
    assert {placement.num_devices for placement in candidates([1, 2], can_shard=True)} == {1, 2}
    shards_one = candidates([1], can_shard=True, shards_one=True)
    assert all(placement.sharded for placement in shards_one)


def attacks(refresh_every, hypergradient):
    attacker = FineTuningAttacker(num_steps=5, optimizer=AdamW(lr=1e-3))
    return Patcher(
        *(LanguageModel(path="moon/root"), attacker),
        num_sft_steps=4,
        refresh_every=refresh_every,
        hypergradient=hypergradient,
    ).attack_source


def plan(configured, alternatives, host_gib_per_device=1000.0):
    return Plan(
        model="moon/root",
        defense="Patcher",
        num_parameters=10,
        shapes="2 x 8 tokens",
        gpu=GPU,
        configured=configured.need(footprint(), NOTHING),
        alternatives=[one.need(footprint(), NOTHING) for one in alternatives],
        work=footprint().of_run(10, 2, attacks(4, FirstOrder())),
        dtype="bfloat16",
        mfu=0.5,
        host_gib_per_device=host_gib_per_device,
    )


def test_a_refusal_names_phase_shortfall_and_the_first_remedy_that_fits():
    offloaded = Placement(sharded=True, checkpointing=True, on_host=OFFLOADED)
    told = plan(Placement(), [Placement(), offloaded]).refusal
    assert told is not None
    for words in ("attack", "120.0 GiB", "70 GiB", "50.0 GiB are missing", "cpu_offload: true"):
        assert words in told
    assert "gradient_checkpointing: true" in told


def test_a_remedy_names_every_setting_that_differs():
    now = Placement(num_devices=4, sharded=True, keeps_gathered=True)
    wanted = Placement(num_devices=8, sharded=True, checkpointing=True, on_host=VECTORS)
    told = " ".join(settings_for(wanted, now))
    for words in (
        "gradient_checkpointing: true",
        "to 8",
        "data_parallel_size: 8",
        "weight_copies_on: host",
        "reshard_after_forward: true",
    ):
        assert words in told
    assert settings_for(wanted, wanted) == []


def test_a_refusal_without_remedy_says_so():
    told = plan(Placement(), [Placement()]).refusal
    assert told is not None
    assert "None of the placements" in told


def test_host_memory_is_judged_too():
    offloaded = Placement(sharded=True, on_host=OFFLOADED, num_devices=1)
    assert "host memory" in str(plan(offloaded, [], host_gib_per_device=100).refusal)


def test_what_fits_is_not_refused():
    roomy = Placement(num_devices=64, sharded=True, on_host=frozenset({Part.ACTIVATIONS}))
    assert plan(roomy, []).refusal is None


def test_work_is_that_of_every_round():
    """4 plain and 6 defended steps of 2 batches; attacks before steps 5 and 9."""
    found = plan(Placement(), [])
    work = found.work
    assert work.gradient_evaluations == 8 + 24 + 10
    assert work.tokens == 32 * 16 + 10 * 8
    assert work.flops == 8 * 1000 + 12 * 2000 + 10 * 500
    assert found.hours == pytest.approx(work.flops / 50e12 / 3600)


def test_hypergradients_take_the_place_of_attacks():
    estimated = Work(20 + 2, 0, 9000 + 1000)
    work = footprint(estimated=estimated).of_run(10, 2, attacks(3, Adjoint()))
    # Steps 5 and 8 are fresh, 2 batches each; 4 steps go on with the vector.
    assert work.gradient_evaluations == 8 + 16 + 4 * (20 + 2)
    assert work.flops == 8 * 1000 + 8 * 2000 + 4 * (9000 + 1000)
