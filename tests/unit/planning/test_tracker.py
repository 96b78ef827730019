"""What the tracker sees, on real tensors and on fake ones."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from patcher_pl.losses import differentiable_loss
from patcher_pl.planning.tracker import DEFEND, Part, Tracker, fake_tensors

KIB = torch.ones(256)


def the_peak(tracker, phase=DEFEND):
    return max(tracker.peaks()[phase], key=lambda parts: sum(parts.values()))


def test_the_peak_counts_what_is_alive_at_the_same_time():
    """Wrong if freed memory were still counted, or views counted twice."""
    with (tracker := Tracker()):
        first = KIB + 1
        second = first.view(16, 16)[:4]
        del first, second
        for _ in range(3):
            third = KIB + 1
        third.add_(1)
    # The second and third of the loop live side by side for a moment.
    assert the_peak(tracker) == {Part.ACTIVATIONS: 2048}


def test_parts_may_be_named_before_or_after():
    def save():
        return KIB.clone()

    with (tracker := Tracker({save: Part.SAVED_WEIGHTS})):
        saved = save()
        gradient = KIB * 2
        tracker.label([gradient], Part.GRADIENTS)
        rest = gradient + saved
    assert rest.numel() == 256
    assert the_peak(tracker) == dict.fromkeys(
        (Part.SAVED_WEIGHTS, Part.GRADIENTS, Part.ACTIVATIONS), 1024
    )


def test_tensors_made_of_others_are_counted_as_those():
    """Wrong if 8 bits, their scales and their table counted as float32, or as nothing."""
    from torchao.optim.subclass_8bit import OptimState8bit

    with (tracker := Tracker()):
        state = OptimState8bit.zeros((4, 256))
        tracker.label([state], Part.ATTACKER_OPTIMIZER)
        state.copy_(torch.zeros(4, 256))
    moments = tracker.peaks()[DEFEND]
    assert {parts[Part.ATTACKER_OPTIMIZER] for parts in moments} == {1024 + 4 * 4 + 256 * 4}
    assert max(parts[Part.ACTIVATIONS] for parts in moments) > 8 * 1024, "indices of 8 bytes"


def test_what_a_kernel_keeps_within_is_not_counted():
    def kernel():
        return (KIB * 2 + 1).sum()

    with (tracker := Tracker(fused=[kernel])):
        kept = KIB + 1
        kernel()
    assert kept.numel() == 256
    assert the_peak(tracker) == {Part.ACTIVATIONS: 1024}


def test_what_has_the_shape_of_a_weight_is_told_from_activations():
    with (tracker := Tracker()):
        tracker.label([weight := KIB.clone()], Part.PARAMETERS)
        kept = [weight * 2, torch.ones(2, 256)]
    assert len(kept) == 2
    assert the_peak(tracker) == {
        Part.PARAMETERS: 1024,
        Part.WEIGHT_TEMPORARIES: 1024,
        Part.ACTIVATIONS: 2048,
    }


def test_a_phase_has_peaks_of_its_own():
    def attack(depth=2):
        during = KIB + 2
        del during
        if depth > 0:
            attack(depth - 1)

    with (tracker := Tracker({attack: "attack"})):
        before = KIB + 1
        attack()
        after = KIB + 3
    assert before is not after
    assert sum(the_peak(tracker, "attack").values()) == 2048


def test_a_moment_with_more_activations_is_kept_beside_the_highest_one():
    """Wrong if sharding were applied to the moment that is highest on one device only: split among
    many devices, the other one is higher."""

    def differentiate():
        torch.ones(4096)

    with (tracker := Tracker({differentiate: Part.GRADIENTS})):
        differentiate()
        few = torch.ones(2048)
    assert few.numel()
    found = tracker.peaks()[DEFEND]
    assert {Part.GRADIENTS: 16384} in found
    assert {Part.ACTIVATIONS: 8192} in found


@pytest.mark.parametrize("is_fake", [False, True], ids=["real", "fake"])
def test_flops_of_a_llama_agree_with_a_count_by_hand(is_fake):
    layers, hidden, inner, vocabulary, heads = 2, 16, 24, 40, 2
    batch, time = 3, 8
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )

    def run():
        model = LlamaForCausalLM(config)
        ids = torch.ones(batch, time, dtype=torch.long)
        fed = {"input_ids": ids, "attention_mask": ids, "labels": ids}
        differentiable_loss(model, fed).backward()  # type: ignore[arg-type]

    tracker = Tracker()
    with fake_tensors(tracker) if is_fake else tracker:
        run()
    in_products = layers * (4 * hidden**2 + 3 * hidden * inner) + hidden * vocabulary
    # Two products forward; backward, the scores once more and four for the gradients.
    attention = layers * (2 + 5) * 2 * batch * time**2 * hidden
    assert tracker.flops[DEFEND] == 6 * in_products * batch * time + attention
