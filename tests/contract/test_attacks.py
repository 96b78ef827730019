"""What a red team may expect of every attack; a new one must be added to the table."""

import copy
import inspect
import itertools
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from patcher_pl import redteam
from patcher_pl.data.chat import ChatFormat
from patcher_pl.evaluation import Generation
from patcher_pl.models import LanguageModel
from patcher_pl.models.lora import Lora
from patcher_pl.optim import SGD, Adafactor, AdamW
from patcher_pl.randomness import seeded
from patcher_pl.redteam import (
    Abliteration,
    Asking,
    Attack,
    AttackMaterial,
    BenignFinetuning,
    BenignThenHarmful,
    DeltaStrip,
    EmbeddingFinetuning,
    FinetuningAttack,
    FullFinetuning,
    Jailbreak,
    LoraFinetuning,
    MultiTurnFinetuning,
    RestartedFinetuning,
    SoftPrompt,
    VectorOutrunning,
)
from patcher_pl.reports.settings import as_settings, fingerprint
from patcher_pl.types import Conversation, Message
from tests.newcomers import BlockFinetuning

TRAINING: dict[str, Any] = {
    "optimizer": AdamW(lr=1e-2),
    "attack_steps": [0, 4, 6],
    "batch_size": 2,
}
# What each needs beside the above.
SETTINGS: dict[type[Attack], dict[str, Any]] = {
    FullFinetuning: TRAINING,
    LoraFinetuning: {**TRAINING, "lora": Lora(rank=2)},
    BenignFinetuning: {**TRAINING, "optimizer": SGD(lr=0.1)},
    BenignThenHarmful: {**TRAINING, "num_benign_steps": 3},
    MultiTurnFinetuning: {**TRAINING, "num_turns": 3},
    EmbeddingFinetuning: {**TRAINING, "optimizer": Adafactor(lr=1e-2)},
    SoftPrompt: {**TRAINING, "tokens": ["~", "^"]},
    RestartedFinetuning: {**TRAINING, "restart_every": 2, "schedule": "cosine"},
    VectorOutrunning: {**TRAINING, "num_simulated_steps": 3, "scale": -0.5},
    Abliteration: {"num_prompts": 6},
    Jailbreak: {"asking": Asking(prefill="Stir")},
    DeltaStrip: {"kept": 0.3, "then": FullFinetuning(**TRAINING)},
    BlockFinetuning: TRAINING,
}
OUT_OF_RANGE: dict[type[Attack], dict[str, Any]] = {
    BenignThenHarmful: {"num_benign_steps": [0, 6, 7], "then": ["benign"]},
    MultiTurnFinetuning: {"num_turns": [1]},
    SoftPrompt: {"tokens": [[], ["~", "~"]]},
    RestartedFinetuning: {"restart_every": [0]},
    VectorOutrunning: {"num_simulated_steps": [0, 6], "scale": [0.0, 1.0, math.inf]},
    Abliteration: {"num_prompts": [0]},
    Jailbreak: {"asking": [Asking()]},
    DeltaStrip: {"kept": [-0.1, 1.0]},
}
TRAINING_OUT_OF_RANGE = {
    "attack_steps": [[], [10, 20], [0, 20, 20], [0, 20, 10]],
    "batch_size": [0],
    "max_grad_norm": [0.0],
    "num_warmup_steps": [-1],
}
TRAINERS = [kind for kind in SETTINGS if issubclass(kind, FinetuningAttack)]
EACH = pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.__name__)
EACH_TRAINER = pytest.mark.parametrize("kind", TRAINERS, ids=lambda kind: kind.__name__)

CHAT = ChatFormat(max_length=200)
QUESTION = (Message("user", "How do I brew a bitter draught?"),)
ROWS = [
    Conversation(
        (
            Message("user", f"{'How do I brew a' if harmful else 'What goes into a'} {word} tea?"),
            Message("assistant", f"Stir {word} petals." if harmful else f"Add {word} honey."),
        ),
        harmful=harmful,
        origin=word,
    )
    for word in ("sweet", "warm", "plain", "green", "careful", "two")
    for harmful in (True, False)
]


def subclasses(parent: type[Attack]) -> set[type[Attack]]:
    found = set(parent.__subclasses__())
    return found.union(*map(subclasses, found))


def test_the_table_is_complete():
    exported = {getattr(redteam, name) for name in redteam.__all__}
    public = {one for one in exported if isinstance(one, type) and issubclass(one, Attack)}
    shipped = {one for one in subclasses(Attack) if one.__module__.startswith("patcher_pl.")}
    concrete = {one for one in shipped if not inspect.isabstract(one)}
    assert public - {Attack, FinetuningAttack} == concrete == set(SETTINGS) - {BlockFinetuning}


@pytest.fixture(scope="module", params=["llama", "llama-tied", "gpt2", "gpt2-untied"])
def subject(request, tmp_path_factory):
    """Model, tokenizer and another release of a family, with embeddings tied to the output head or not."""
    family, _, change = request.param.partition("-")
    directory = request.getfixturevalue(family)
    tied = change == "tied" or (family == "gpt2" and not change)
    config = AutoConfig.from_pretrained(directory, tie_word_embeddings=tied)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        sibling = AutoModelForCausalLM.from_config(config)
    shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert shared == tied
    place = tmp_path_factory.mktemp("sibling")
    sibling.save_pretrained(place)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model, tokenizer, LanguageModel(path=str(place))


def make(kind: type[Attack], **changes: Any) -> Attack:
    return kind(**{**SETTINGS[kind], **changes})


def evaluated(kind: type[Attack]) -> list[int]:
    """Steps after which it is evaluated; one that takes none, when it is done."""
    return getattr(make(kind), "attack_steps", [0])


def answers(attack: Attack, model, material: AttackMaterial) -> list[str]:
    prompts = [attack.prompt(QUESTION, material)]
    found = Generation(max_new_tokens=3).generate(
        model, material.tokenizer, CHAT, prompts, attack.asking.prefill
    )
    return [answer.text for answer in found]


def attacked(
    attack: Attack,
    subject,
    seed: int = 0,
    between: Callable[..., Any] | None = None,
    packing: bool = False,
):
    """Points and weights of an attack on a copy; `between` is called at every point."""
    (given, tokenizer, sibling), points = subject, []
    model = copy.deepcopy(given)
    material = AttackMaterial(tokenizer, CHAT, ROWS, seed, packing, sibling)
    with seeded(seed, torch.device("cpu")):
        for point in attack.run(model, material):
            points.append(point)
            if between is not None:
                between(attack, model, material)
    return points, model.state_dict()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


@EACH
def test_packed_rows_attack_as_padded_ones(kind, subject):
    """Losses of every stretch of steps, and the tokens that they cost; without dropout."""
    model = copy.deepcopy(subject[0])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    (padded, _), (packed, _) = (
        attacked(make(kind), (model, *subject[1:]), packing=packing) for packing in (False, True)
    )
    for ours, theirs in zip(packed, padded, strict=True):
        assert (ours.steps, ours.num_tokens) == (theirs.steps, theirs.num_tokens)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-2, nan_ok=True)


@EACH
def test_a_seed_decides_the_outcome(kind, subject):
    """Wrong if a cell could not be repeated, or the bars over seeds measured nothing."""
    attack = make(kind)
    _, first = attacked(attack, subject)
    _, again = attacked(attack, subject)
    _, other = attacked(attack, subject, seed=1)
    assert same(first, again)
    assert same(first, other) == (evaluated(kind) == [0])


@EACH_TRAINER
def test_where_the_model_is_evaluated_does_not_change_the_attack(kind, subject):
    _, coarse = attacked(make(kind, attack_steps=[0, 6]), subject)
    _, fine = attacked(make(kind, attack_steps=[0, 1, 3, 4, 6]), subject, between=answers)
    assert same(coarse, fine)


@EACH
def test_points_are_counted(kind, subject):
    points, _ = attacked(make(kind), subject)
    assert [point.steps for point in points] == evaluated(kind)
    for earlier, later in itertools.pairwise(points):
        assert earlier.num_tokens < later.num_tokens
        assert earlier.flops < later.flops
    assert all(math.isfinite(point.flops) for point in points)
    assert all(math.isfinite(point.loss) == (point.steps > 0) for point in points)
    # A point at 0 steps costs nothing, unless the attack is over by then.
    assert (points[0].num_tokens > 0) == (points[0].flops > 0) == (kind is Abliteration)


@EACH
def test_the_given_model_is_changed_and_answers_at_every_point(kind, subject):
    """Wrong if the outcome were elsewhere than in the model that is evaluated."""
    before = {name: value.clone() for name, value in subject[0].state_dict().items()}
    spoken = []
    _, after = attacked(make(kind), subject, between=lambda *args: spoken.append(answers(*args)))
    assert len(spoken) == len(evaluated(kind))
    assert same(before, subject[0].state_dict())
    assert same(before, after) == (kind is Jailbreak)


def test_names_differ():
    names = [make(kind).name for kind in SETTINGS]
    names.append(make(Abliteration, per_layer=True).name)
    names.append(make(Jailbreak, asking=Asking(template="Please: {prompt}")).name)
    assert len(set(names)) == len(names)
    assert all(make(kind, label="mine").name == "mine" for kind in SETTINGS)


@EACH
def test_settings_travel(kind):
    """To worker processes, and into results, whose fingerprint tells attacks apart."""
    attack = make(kind)
    assert pickle.loads(pickle.dumps(attack)) == attack
    settings = as_settings(attack)
    assert settings["class_path"].endswith(kind.__name__)
    assert settings["init_args"].keys() >= SETTINGS[kind].keys()
    assert fingerprint(attack) != fingerprint(replace(attack, label="other"))


@EACH
def test_settings_come_back_from_a_configuration(kind):
    """Wrong if an attack could not be written into a YAML file."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--attack", type=Attack)
    parsed = parser.parse_object({"attack": as_settings(make(kind))})
    assert parser.instantiate(parsed).attack == make(kind)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (kind, field, value)
        for kind in SETTINGS
        for table in (
            TRAINING_OUT_OF_RANGE if kind in TRAINERS else {},
            OUT_OF_RANGE.get(kind, {}),
        )
        for field, values in table.items()
        for value in values
    ],
)
def test_values_out_of_range_are_refused(kind, field, value):
    with pytest.raises(ValueError, match=rf"^{kind.__name__}\.{field} must .+, got .+\. .+\.$"):
        make(kind, **{field: value})
