"""If these fail, packed batches train on something else than padded ones, or nobody notices it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from patcher_pl.data import Encoded, collate
from patcher_pl.errors import ConfigError
from patcher_pl.losses import causal_lm_loss, differentiable_loss
from patcher_pl.losses.causal_lm import keeps_logits
from patcher_pl.models import LanguageModel, Lora, packed_attention
from patcher_pl.models.packing import require_packing
from tests.families import FAMILIES, build_family

CPU = torch.device("cpu")
# Norms, rotations and eager attention round to float32 on the way, whatever the model is in.
EXACT = {"rtol": 1e-5, "atol": 1e-7}


def conversation(prompt: int, answer: int, seed: int) -> Encoded:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 100, (prompt + answer,), generator=generator).tolist()
    return Encoded(ids, [-100] * prompt + ids[prompt:])


EXAMPLES = [conversation(3, 4, 0), conversation(9, 2, 1), conversation(2, 13, 2)]


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, tmp_path_factory) -> Path:
    return build_family(request.param, tmp_path_factory.mktemp(request.param))


def load(path: Path, attention: str = "sdpa"):
    """A model of the family, in float64, whose attention matters."""
    packed_attention.register()
    config = AutoConfig.from_pretrained(path)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model.double().eval()


def gradients(model, loss) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize("attention", ["sdpa", "eager", "packed_sdpa"])
@pytest.mark.parametrize("loss_function", [differentiable_loss, causal_lm_loss])
def test_losses_and_gradients_are_those_of_padded_batches(family, attention, loss_function):
    model = load(family, attention)
    assert keeps_logits(model)
    padded, packed = (collate(EXAMPLES, 0, packing=packing) for packing in (False, True))
    expected, loss = differentiable_loss(model, padded), loss_function(model, packed)
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)
    for ours, theirs in zip(gradients(model, loss), gradients(model, expected), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_adapters_train_on_packed_batches_too(family):
    model = Lora(rank=2).attach(load(family))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    assert keeps_logits(model)
    padded, packed = (collate(EXAMPLES, 0, packing=packing) for packing in (False, True))
    expected, loss = differentiable_loss(model, padded), causal_lm_loss(model, packed)
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)
    for ours, theirs in zip(gradients(model, loss), gradients(model, expected), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def answer_only(examples: list[Encoded], chosen: int) -> list[Encoded]:
    """The same conversations, of which one alone is trained on."""
    return [
        one if index == chosen else Encoded(one.input_ids, [-100] * len(one.labels))
        for index, one in enumerate(examples)
    ]


def test_conversations_do_not_see_each_other(family):
    """The second one's gradients must not depend on what the first one says."""
    model = load(family)
    others = [conversation(3, 4, 10), *EXAMPLES[1:]]
    found = []
    for examples in (EXAMPLES, others):
        batch = collate(answer_only(examples, 1), 0, packing=True)
        found.append(gradients(model, causal_lm_loss(model, batch)))
        # One long conversation, as if positions were not reset.
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).unsqueeze(0)
        found.append(gradients(model, causal_lm_loss(model, batch)))
    first, first_mixed, second, second_mixed = found
    for ours, theirs in zip(first, second, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
    mixed = zip(first_mixed, second_mixed, strict=True)
    assert not all(torch.allclose(ours, theirs, rtol=1e-3) for ours, theirs in mixed)


def test_what_no_model_predicts_is_not_trained_on():
    """The first token of a conversation stands behind the end of another one."""
    batch = collate([Encoded([5, 6], [5, 6]), Encoded([7, 8], [7, 8])], 0, packing=True)
    assert batch["labels"].tolist() == [[-100, 6, -100, 8]]
    assert batch["logits_to_keep"].tolist() == [0, 2]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1]]


def test_models_that_keep_conversations_apart_are_let_through(family):
    model = load(family).train()
    require_packing(model, [one.input_ids for one in EXAMPLES], CPU, "data.packing")
    require_packing(model, [EXAMPLES[0].input_ids], CPU, "data.packing")
    assert model.training


@pytest.mark.parametrize(
    ("kind", "sizes", "reason"),
    [
        ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 2}, "takes no position_ids"),
        (
            "MambaConfig",
            {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
            "takes no position_ids",
        ),
    ],
)
def test_models_without_positions_are_refused(kind, sizes, reason):
    import transformers

    config = getattr(transformers, kind)(vocab_size=100, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match=rf"data\.packing: {kind[:5]}.*{reason}"):
        require_packing(model, [one.input_ids for one in EXAMPLES], CPU, "data.packing")


def test_models_that_mix_conversations_up_are_found_out(tmp_path):
    """With random weights, whose attention hardly matters."""
    path = build_family("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path)
    forward = model.forward

    def without_restarts(*args, position_ids, **kwargs):
        positions = torch.arange(position_ids.shape[1]).unsqueeze(0)
        return forward(*args, position_ids=positions, **kwargs)

    model.forward = without_restarts
    with pytest.raises(ConfigError, match=r"data\.packing: LlamaFor.* mixes packed conv.* by \d"):
        require_packing(model, [one.input_ids for one in EXAMPLES], CPU, "data.packing")


def test_packed_attention_looks_at_one_conversation_at_a_time(tmp_path, monkeypatch):
    """Through the setting; padded batches, and a window that is no longer causal alone, as before."""
    from transformers.integrations import sdpa_attention

    path = build_family("mistral", tmp_path)
    model = LanguageModel(path=str(path), attn_implementation="packed_sdpa").load_model()
    lengths, inner = [], sdpa_attention.sdpa_attention_forward

    def watched(module, query, *rest, **options):
        lengths.append(query.shape[2])
        return inner(module, query, *rest, **options)

    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", watched)
    own = [len(one.input_ids) for one in EXAMPLES]
    for packing, expected in ((True, own), (False, [max(own)])):
        lengths.clear()
        differentiable_loss(model, collate(EXAMPLES, 0, packing=packing))
        assert lengths == 2 * expected
    plain = LanguageModel(path=str(path), attn_implementation="sdpa").load_model()
    packed = collate(EXAMPLES, 0, packing=True)
    for one in (model, plain):
        one.config.sliding_window = one.model.config.sliding_window = 4
    lengths.clear()
    torch.testing.assert_close(
        differentiable_loss(model, packed), differentiable_loss(plain, packed)
    )
    assert set(lengths) == {sum(own)}


def seen_by(rule):
    """Asks for the mask of a row of five tokens as transformers does."""
    return packed_attention.packed_mask(
        mask_function=lambda batch, head, query, key: rule(query, key),
        batch_size=1,
        q_length=5,
        kv_length=5,
        device=CPU,
        allow_is_causal_skip=False,
    )


@pytest.mark.parametrize("kind", ["window", "chunks", "bidirectional", "prefix"])
def test_other_masks_are_left_to_sdpa(kind):
    """The shortcut must not be taken where it would attend to more, or less."""
    rule = {
        "window": lambda query, key: (key <= query) & (key > query - 2),
        "chunks": lambda query, key: (key <= query) & (key // 4 == query // 4),
        "bidirectional": lambda query, key: (key <= query) | (key > query),
        "prefix": lambda query, key: (key <= query) | (key < 2),
    }[kind]
    found = seen_by(rule)
    if kind == "chunks":  # The same as two conversations, of four tokens and of one.
        assert found.bounds.tolist() == [0, 4, 5]
        return
    expected = torch.tensor(
        [[bool(rule(torch.tensor(q), torch.tensor(k))) for k in range(5)] for q in range(5)]
    )
    torch.testing.assert_close(found[0, 0], expected)


def test_conversations_are_read_off_the_rule():
    of = torch.tensor([0, 0, 1, 2, 2])
    found = seen_by(lambda query, key: (key <= query) & (of[key] == of[query]))
    assert found.bounds.tolist() == [0, 2, 3, 5]
    assert found.bounds.dtype == torch.int32
    assert found.longest == 2


def test_one_kernel_may_take_all_conversations(monkeypatch):
    """What torch's kernel is asked for on a GPU, with a kernel that computes the same on a CPU."""
    lengths, asked = [3, 5, 1], []

    def kernel(query, key, value, begin, same, longest, also, *, scale, window_size):
        asked.append((begin.tolist(), longest, window_size))
        assert begin is same
        pieces = zip(*(one.split(lengths) for one in (query, key, value)), strict=True)
        return torch.cat(
            [
                torch.nn.functional.scaled_dot_product_attention(
                    *(one.transpose(0, 1) for one in piece), is_causal=True, scale=scale
                ).transpose(0, 1)
                for piece in pieces
            ]
        )

    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 9, 8, generator=generator)
    key, value = (torch.randn(1, 2, 9, 8, generator=generator) for _ in range(2))
    packed = packed_attention.Packed(torch.tensor([0, 3, 8, 9], dtype=torch.int32), 5)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    one_by_one, _ = packed_attention.packed_sdpa(module, query, key, value, packed, scaling=0.3)
    monkeypatch.setattr(packed_attention, "_takes_many", lambda: kernel)
    together = packed_attention._all_at_once(query, key, value, packed, 0.3)
    torch.testing.assert_close(together, one_by_one)
    assert asked == [([0, 3, 8, 9], 5, (-1, 0))]
