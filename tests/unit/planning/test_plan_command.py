"""`plan` on configurations of `fit`: parts, verdict, JSON."""

import json
import shutil

import pytest
import torch

from patcher_pl.attackers import FineTuningAttacker
from patcher_pl.models import LanguageModel, Weights
from patcher_pl.planning.tracker import ATTACK, DEFEND, HYPERGRADIENT, Part
from tests.commands import ROOT, cli, patcher_settings

NO_OVERHEAD = ("--overhead.fixed_gib", 0, "--overhead.fragmentation", 0)


def planned(config, tmp_path, *options, status=0):
    """The JSON of a plan."""
    out = tmp_path / "plan.json"
    cli("plan", "--config", config, "--json", out, *NO_OVERHEAD, *options).expect(status)
    return json.loads(out.read_text())


def parts(plan, phase):
    return plan["configured"]["device_bytes_by_phase"][phase]


@pytest.fixture(scope="module")
def plan(inputs, write_config, tmp_path_factory):
    """The plan for a model of which there is config.json alone."""
    folder = tmp_path_factory.mktemp("plan")
    shutil.copy(inputs / "model" / "config.json", folder)
    path = write_config(folder, {"language_model": {"path": str(folder)}})
    before = (FineTuningAttacker.attack, Weights.snapshot, Weights.difference)
    found = planned(path, folder)
    # Wrong if the instruments stayed behind, in a process that goes on to train.
    assert (FineTuningAttacker.attack, Weights.snapshot, Weights.difference) == before
    assert not isinstance(torch.ones(1) + 1, torch._subclasses.FakeTensor)
    return found


@pytest.fixture(scope="module")
def weight_bytes(inputs):
    """Bytes of the parameters of the tiny model, buffers not included."""
    model = LanguageModel(path=str(inputs / "model")).load_model()
    return sum(parameter.numel() * 4 for parameter in model.parameters())


def test_every_copy_of_the_weights_is_counted(plan, weight_bytes):
    """Wrong if a state were missing or counted twice. At the second attack: theta, AdamW twice, the
    old vector, theta saved by the attack and the space for shifting."""
    attack, defend = parts(plan, ATTACK), parts(plan, DEFEND)
    # And inv_freq.
    assert attack[Part.PARAMETERS] == pytest.approx(weight_bytes, rel=0.01)
    for part, copies in (
        (Part.DEFENDER_OPTIMIZER, 2),
        (Part.ATTACKER_OPTIMIZER, 2),
        (Part.ATTACK_VECTOR, 1),
        (Part.SAVED_WEIGHTS, 2),
    ):
        assert attack[part] == pytest.approx(copies * weight_bytes, rel=0.01), part
    assert attack.get(Part.GRADIENTS, 0) <= weight_bytes
    assert Part.ATTACKER_OPTIMIZER not in defend
    assert defend[Part.SAVED_WEIGHTS] == weight_bytes
    assert defend[Part.GRADIENTS] == pytest.approx(weight_bytes, rel=0.01)


def test_weights_in_half_precision_are_trained_with_copies(config, tmp_path, weight_bytes):
    """Wrong if the float32 copies, twice the size of the weights, were a surprise."""
    half = planned(config(), tmp_path, "--model.init_args.language_model.dtype=bfloat16")
    attack = parts(half, ATTACK)
    assert attack[Part.PARAMETERS] == pytest.approx(weight_bytes / 2, rel=0.02)
    for part in (Part.DEFENDER_OPTIMIZER, Part.ATTACKER_OPTIMIZER):
        assert attack[part] == pytest.approx(3 * weight_bytes, rel=0.02), part


@pytest.mark.parametrize("state_dtype", ["bfloat16", "8bit"])
def test_moments_in_few_bytes_are_counted_as_they_are(
    config, tmp_path, weight_bytes, state_dtype, monkeypatch
):
    """Wrong if they, or what is calculated with them in float32 meanwhile, were not in the plan."""
    # Blocks of which the tiny model's large matrices are a multiple, and all of them large enough.
    monkeypatch.setattr("patcher_pl.optim.low_memory._BLOCK", 32)
    monkeypatch.setattr("patcher_pl.optim.low_memory._LEAST", 1)
    attacker = "--model.init_args.attacker.init_args.optimizer.init_args.state_dtype="
    plan = planned(config(), tmp_path, attacker + state_dtype)
    of_weights = {"bfloat16": 2 * 2 / 4, "8bit": 2 * (1 + 4 / 32) / 4}[state_dtype]
    # Every moment of 8 bits has a table of its own, too.
    tables = {"bfloat16": 0, "8bit": 2 * 21 * 256 * 4}[state_dtype]
    found = parts(plan, ATTACK)[Part.ATTACKER_OPTIMIZER]
    assert found == pytest.approx(of_weights * weight_bytes + tables, rel=0.02)


def test_adapters_have_the_only_states_of_what_trains_them(config, tmp_path, weight_bytes):
    """Wrong if peft's adapters could not be planned with, or the frozen weights had states."""
    lora = {"rank": 2}
    attacker = patcher_settings(tmp_path)["model"]["init_args"]["attacker"]
    attacker["init_args"]["lora"] = {"rank": 1}
    plan = planned(config({"language_model": {"lora": lora}, "attacker": attacker}), tmp_path)
    attack, defend = parts(plan, ATTACK), parts(plan, DEFEND)
    own = attack[Part.DEFENDER_OPTIMIZER] / 2
    assert 0 < own < 0.2 * weight_bytes
    assert defend[Part.PARAMETERS] == pytest.approx(weight_bytes + own, rel=0.01)
    assert attack[Part.ATTACKER_OPTIMIZER] == pytest.approx(
        own, rel=0.1
    )  # Twice, of half the rank.
    # But the attack vector is one of the weights.
    assert defend[Part.ATTACK_VECTOR] == pytest.approx(weight_bytes, rel=0.01)


def test_checkpointing_and_shorter_conversations_take_less(plan, config, tmp_path):
    off = "--model.init_args.language_model.gradient_checkpointing=false"
    short = planned(config(), tmp_path, off, "--length", 16)
    one, thrifty = (entry["device_bytes"] for entry in short["alternatives"][:2])
    assert short["configured"]["device_bytes"] == one
    assert thrifty < one
    assert thrifty < plan["configured"]["device_bytes"]


@pytest.mark.slow
def test_the_trajectory_of_a_long_attack_is_counted(config, tmp_path, weight_bytes):
    """Wrong if the rehearsal's two attack steps were taken for the real number."""

    def attack(num_steps, device="model"):
        adamw = {"class_path": "patcher_pl.optim.AdamW", "init_args": {"lr": 1e-3}}
        store = {
            "class_path": "patcher_pl.hypergradients.trajectories.FullState",
            "init_args": {"device": device},
        }
        return {
            "attacker": {
                "class_path": "patcher_pl.attackers.FineTuningAttacker",
                "init_args": {"num_steps": num_steps, "optimizer": adamw},
            },
            "hypergradient": {
                "class_path": "patcher_pl.hypergradients.Adjoint",
                "init_args": {"store": store},
            },
        }

    def trajectory(*settings):
        plan = planned(config(model=attack(*settings)), tmp_path)
        return parts(plan, HYPERGRADIENT).get(Part.TRAJECTORY, 0), plan

    # States of parameters and two moments, and gradients.
    more = trajectory(20)[0] - trajectory(10)[0]
    assert more == pytest.approx(10 * 4 * weight_bytes, rel=0.05)
    on_device, plan = trajectory(20, "cpu")
    assert on_device == 0
    assert {entry["num_devices"] for entry in plan["alternatives"]} == {1}  # An exact product.
    assert plan["configured"]["host_bytes"] > 70 * weight_bytes


def test_a_plain_defense_has_one_phase(config, tmp_path, weight_bytes):
    plan = planned(config(), tmp_path, "--model=patcher_pl.defenses.SFT", "--trainer.max_steps", 40)
    assert list(plan["configured"]["device_bytes_by_phase"]) == [DEFEND]
    assert plan["work_per_device"]["gradient_evaluations"] == 40
    assert plan["work_per_device"]["tokens"] == 40 * 4 * 32


def test_what_does_not_fit_is_refused_with_status_2(config, tmp_path, monkeypatch):
    from patcher_pl.planning import GPUS, Gpu

    tiny = Gpu(name="tiny", memory_gib=1e-6, bfloat16_tflops=1, float32_tflops=1)
    monkeypatch.setitem(GPUS, "tiny", tiny)
    sft = "--model=patcher_pl.defenses.SFT"
    outcome = cli("plan", "--config", config(), sft, "--gpu", "tiny").expect(2)
    for words in ("does not fit", "1 device", "phase needs", "tiny", "are missing"):
        assert words in outcome.err
    assert "GiB per device" in outcome.out  # The tables are there all the same.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--gpu", "Abacus"), "--gpu must be one of"),
        (("--mfu", "1.5"), "PlanSettings.mfu"),
        (("--length", "1"), "PlanSettings.length"),
        (("--device_counts", "[0]"), "PlanSettings.device_counts"),
        (("--trainer.devices", "auto"), "trainer.devices"),
        (("--trainer.max_steps", "-1"), "trainer.max_steps"),
        (("--model_config", "nowhere.json"), "nowhere.json"),
    ],
)
def test_a_wrong_option_is_named(config, options, words):
    assert words in cli("plan", "--config", config(), *options).expect(2).err


def test_a_stacked_strategy_is_read(config, plan, tmp_path, weight_bytes):
    """Wrong if the second file were ignored, or weights that FSDP2 casts while it computes were taken
    to be stored like that."""
    strategy = ROOT / "configs" / "strategies" / "fsdp2-multinode.yaml"
    split = planned(config(), tmp_path, "--config", strategy)
    assert split["configured"]["num_devices"] == 16
    assert split["configured"]["sharded"]
    assert split["time"]["dtype"] == "bfloat16"
    found = parts(split, DEFEND)
    assert found[Part.PARAMETERS] == pytest.approx(weight_bytes / 16, rel=0.02)
    assert found[Part.DEFENDER_OPTIMIZER] == pytest.approx(2 * weight_bytes / 16, rel=0.02)
    assert 0 < found[Part.ACTIVATIONS] < parts(plan, DEFEND)[Part.ACTIVATIONS]
    assert all(entry["sharded"] for entry in split["alternatives"])


def test_concurrent_attackers_are_refused(config):
    adamw = {"class_path": "patcher_pl.optim.AdamW", "init_args": {"lr": 1e-3}}
    member = {
        "class_path": "patcher_pl.attackers.FineTuningAttacker",
        "init_args": {"num_steps": 2, "optimizer": adamw},
    }
    attacker = {
        "class_path": "patcher_pl.attackers.ConcurrentAttacker",
        "init_args": {"population": [{"attacker": member}]},
    }
    told = cli("plan", "--config", config(model={"attacker": attacker})).expect(2).err
    assert "got a ConcurrentAttacker. Plan with a member" in told


@pytest.mark.long
def test_a_distribution_needs_a_vector_per_carried_kind_and_the_work_of_its_draws(
    config, tmp_path, weight_bytes
):
    optimizer = {"class_path": "patcher_pl.optim.AdamW", "init_args": {"lr": 1e-3}}

    def kind(label, num_steps, **settings):
        full = {"num_steps": num_steps, "optimizer": optimizer, **settings}
        return {"label": label, "attacker": full}

    carried = [kind("a", 20, carry={}), kind("b", 10, carry={}), kind("c", 40, lora={"rank": 2})]
    carried[1]["space"] = {"batch_size": [1, 4]}
    attacker = {
        "class_path": "patcher_pl.attackers.AttackDistribution",
        "init_args": {"kinds": carried},
    }
    settings = {"attacker": attacker, "refresh_every": 5, "num_sft_steps": 5}
    path = config(settings)
    budget = ("--max_gradient_evaluations", 200, "--trainer.max_steps", -1)
    plan = planned(path, tmp_path, *budget)
    # Those of both carried kinds and its own, while the attack on adapters is made.
    assert parts(plan, ATTACK)[Part.ATTACK_VECTOR] == pytest.approx(3 * weight_bytes, rel=0.01)
    assert 200 <= plan["work_per_device"]["gradient_evaluations"] < 220
