"""Weights in half precision: steps add up, in attacks and in training, until they show."""

import copy
import json
import logging
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from patcher_pl.attackers import FineTuningAttacker
from patcher_pl.attackers.loop import finetune
from patcher_pl.data.chat import ChatFormat
from patcher_pl.defenses import SFT, Patcher
from patcher_pl.evaluation import Benchmark, Generation
from patcher_pl.models import LanguageModel, Weights
from patcher_pl.optim import SGD, Adafactor, AdamW
from patcher_pl.optim.master_weights import MasterWeightOptimizer, MasterWeights
from patcher_pl.optim.moved import MovedShare
from patcher_pl.redteam import FullFinetuning, RedTeam, RestartedFinetuning
from patcher_pl.redteam.material import AttackMaterial
from patcher_pl.types import Batch
from tests.red_team_parts import ExactJudge
from tests.tiny_runs import fit

LR = 1e-5
NUM_STEPS = 40


def batches(seed=0, size=4):
    generator = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.randint(0, 200, (size, 12), generator=generator)
        yield Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)


def loaded(path, dtype):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model.requires_grad_(True)


def trained(path, dtype, *, num_steps=NUM_STEPS, optimizer=None, **settings):
    """A model after some fine-tuning, and its steps."""
    model = loaded(path, dtype)
    optimizer = optimizer or AdamW(lr=LR, weight_decay=0.0)
    steps = list(
        finetune(
            *(model, list(model.parameters()), batches()),
            **{"optimizer": optimizer, "num_steps": num_steps, **settings},
        )
    )
    return model, steps


def updates(path, model, dtype):
    """What training did to each weight, in float32."""
    start = loaded(path, dtype)
    pairs = zip(model.parameters(), start.parameters(), strict=True)
    return torch.cat([(new.float() - old.float()).flatten() for new, old in pairs]).detach()


def test_an_attack_goes_as_far_as_in_float32(llama):
    """Wrong if, as in plain bfloat16 at this step size, most weights stayed where they were."""
    whole = updates(llama, trained(llama, torch.float32)[0], torch.float32)
    half = updates(llama, trained(llama, torch.bfloat16)[0], torch.bfloat16)
    assert (half != 0).float().mean() > 0.5
    assert torch.nn.functional.cosine_similarity(whole, half, dim=0) > 0.8
    assert float(half.norm()) == pytest.approx(float(whole.norm()), rel=0.2)


def test_float32_runs_are_what_they_were(llama):
    """Wrong if the repair changed a single bit of a run that needed none."""
    model, _ = trained(llama, torch.float32, num_steps=5)
    reference = loaded(llama, torch.float32)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=LR, weight_decay=0.0)
    for _, batch in zip(range(5), batches(), strict=False):
        reference(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for new, old in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-7)


def test_copies_in_float32_are_rounded_into_the_weights():
    """Against the definition: one float32 optimizer whose result is rounded after every step."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, generator=generator).bfloat16()
    plain = weight.float()
    expected = torch.optim.AdamW([plain], lr=1e-4)
    masters = MasterWeights([weight])
    optimizer = MasterWeightOptimizer(masters, lambda p: torch.optim.AdamW(p, lr=1e-4))
    for _ in range(20):
        gradient = torch.randn(50, generator=generator).bfloat16()
        weight.grad, plain.grad = gradient, gradient.float()
        optimizer.step()
        expected.step()
        assert torch.equal(masters.tensors[0], plain)
        assert torch.equal(weight, plain.bfloat16())


def test_a_weight_that_somebody_else_changed_is_followed():
    weight = torch.ones(3, dtype=torch.bfloat16)
    masters = MasterWeights([weight])
    masters.tensors[0] += 1e-4
    weight[1] = 5.0
    masters.follow()
    assert masters.tensors[0].tolist() == pytest.approx([1.0001, 5.0, 1.0001])


def test_restarts_do_not_lose_what_does_not_show_yet(llama, rows):
    """Wrong if every restart began from the rounded weights, and an attack stood still."""
    attack = RestartedFinetuning(
        optimizer=AdamW(lr=2e-6, weight_decay=0.0), attack_steps=[0, 40], restart_every=4
    )
    model = loaded(llama, torch.bfloat16)
    tokenizer = LanguageModel(path=str(llama)).load_tokenizer()
    data = rows.module().attack.draw(0)
    list(attack.run(model, AttackMaterial(tokenizer, ChatFormat(), data, seed=0)))
    assert (updates(llama, model, torch.bfloat16) != 0).float().mean() > 0.3


@pytest.mark.parametrize(
    "optimizer", [AdamW(lr=LR), SGD(lr=1e-2), Adafactor(lr=1e-3)], ids=["adamw", "sgd", "adafactor"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_share_that_moved_is_found_once(llama, optimizer, dtype):
    _, steps = trained(llama, dtype, num_steps=10, optimizer=optimizer)
    shares = [step.moved for step in steps]
    assert [number for number, share in enumerate(shares, 1) if share is not None] == [8]
    assert shares[7] > 0.9


def test_only_weights_with_a_gradient_count():
    weights = [torch.ones(4), torch.ones(4)]
    moved = MovedShare(weights)
    moved.note([torch.tensor([1.0, 1.0, 0.0, 0.0]), None])
    weights[0][0] += 1
    weights[1] += 1
    assert moved.share() == 0.5
    assert MovedShare(weights).share() is None


@pytest.fixture
def team(rows):
    data = rows.module().attack
    return RedTeam(
        attacks=[FullFinetuning(optimizer=AdamW(lr=1e-12), attack_steps=[0, 9])],
        data=data,
        prompts=Benchmark(source=data.sources[0], limit=1),
        judge=ExactJudge(),
        generation=Generation(max_new_tokens=2),
        overlap="allow",
    )


def run(team, llama):
    language_model = LanguageModel(path=str(llama))
    parts = language_model.load_model(), language_model.load_tokenizer(), ChatFormat()
    (curve,) = team.run(*parts, defense="sft")
    return curve


def test_a_measurement_whose_steps_were_lost_is_not_trusted(team, llama, caplog):
    """Wrong if "held" were said of a model that the attack had not touched."""
    curve = run(team, llama)
    assert curve.weights_moved == pytest.approx(0, abs=0.1)
    assert not curve.trusted
    assert "of the attacked weights had moved" in caplog.text
    attack = replace(team.attacks[0], optimizer=AdamW(lr=1e-4))
    curve = run(replace(team, attacks=[attack]), llama)
    assert curve.weights_moved == 1.0
    assert curve.trusted


def test_a_defender_in_half_precision_trains_as_far(llama, rows, tmp_path):
    """Wrong if `bf16-true`, or a model loaded in bfloat16, were hardly trained."""

    def defended(dtype, precision):
        model = LanguageModel(path=str(llama), dtype=dtype)
        defense = SFT(model, lambda params: torch.optim.AdamW(params, lr=LR, weight_decay=0.0))
        fit(defense, rows.module(), NUM_STEPS, precision=precision)
        return defense

    whole = updates(llama, defended("float32", "32-true").model, torch.float32)
    for dtype, precision in (("bfloat16", "32-true"), ("float32", "bf16-true")):
        defense = defended(dtype, precision)
        half = updates(llama, defense.model, torch.bfloat16)
        assert float(half.norm()) == pytest.approx(float(whole.norm()), rel=0.3)
        assert defense.step_check.share > 0.9


def test_a_defender_whose_steps_are_lost_is_warned_of(llama, rows, caplog):
    defense = SFT(LanguageModel(path=str(llama)), lambda p: torch.optim.AdamW(p, lr=1e-12))
    with caplog.at_level(logging.WARNING, "patcher_pl"):
        fit(defense, rows.module(), 8)
    assert "of the weights had moved after 8 steps of SFT" in caplog.text
    assert defense.step_check.share < 0.1


def test_a_resumed_run_goes_on_with_the_copies():
    """Wrong if an interruption rounded what had not shown yet."""
    weight = torch.randn(20, generator=torch.Generator().manual_seed(0)).bfloat16()

    def optimizer_of(tensor):
        return MasterWeightOptimizer(
            MasterWeights([tensor]), lambda p: torch.optim.AdamW(p, lr=1e-5)
        )

    def steps(tensor, optimizer, count):
        for _ in range(count):
            tensor.grad = torch.ones_like(tensor)
            optimizer.step()

    straight = weight.clone()
    steps(straight, optimizer_of(straight), 30)
    first = weight.clone()
    optimizer = optimizer_of(first)
    steps(first, optimizer, 15)
    saved, again = copy.deepcopy(optimizer.state_dict()), first.clone()
    resumed = optimizer_of(again)
    resumed.load_state_dict(saved)
    assert resumed.state[resumed.param_groups[0]["params"][0]]["exp_avg"].dtype == torch.float32
    steps(again, resumed, 15)
    assert torch.equal(again, straight)
    assert not torch.equal(straight, weight)


def test_a_schedule_sets_the_rate_of_the_steps():
    weight = torch.ones(3, dtype=torch.bfloat16)
    optimizer = MasterWeightOptimizer(MasterWeights([weight]), lambda p: torch.optim.SGD(p, lr=1.0))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.tolist() == [0.5] * 3


def test_first_order_hypergradients_attack_as_far(llama, rows):
    """Wrong if the attack vector of a bfloat16 model were mostly zeros."""
    attacker = FineTuningAttacker(num_steps=NUM_STEPS, optimizer=AdamW(lr=LR))
    model = loaded(llama, torch.bfloat16)
    vector = attacker.attack(model, Weights(model), batches()).vector
    share = sum(int((part != 0).sum()) for part in vector) / sum(part.numel() for part in vector)
    assert share > 0.5
    defense = Patcher(
        LanguageModel(path=str(llama), dtype="bfloat16"),
        attacker=replace(attacker, num_steps=2),
        refresh_every=1,
        num_sft_steps=0,
    )
    fit(defense, rows.module(), 2)


def test_results_say_how_much_of_a_defender_moved(tmp_path):
    from tests.commands import cli, redteam_settings, sft_settings, write_inputs, write_yaml

    inputs = write_inputs(tmp_path)
    settings = {**sft_settings(inputs), "redteam": redteam_settings(inputs)}
    config = write_yaml(tmp_path / "fit.yaml", settings)
    cli("fit", "--config", config, "--run_dir", tmp_path / "run").expect(0)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["settings"]["weights_moved"] > 0.9
    assert results["curves"][0]["weights_moved"] > 0.9
