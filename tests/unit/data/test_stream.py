"""If these fail, resumed runs see other data, rows are left out, or padding eats the compute."""

from collections import Counter
from itertools import islice, pairwise
from typing import Any

import pytest

from patcher_pl.data import BatchStream, Encoded, FixedBatches
from patcher_pl.types import Batch, count_tokens, is_idle


def examples(num_examples: int) -> list[Encoded]:
    """Example n begins with token n; lengths run from 1 to 29 in no particular order."""
    return [Encoded([n] * (1 + n * 17 % 29), [n] * (1 + n * 17 % 29)) for n in range(num_examples)]


def make(num_examples: int = 20, batch_size: int = 4, seed: int = 0, **options) -> BatchStream:
    return BatchStream(
        examples(num_examples), batch_size=batch_size, pad_token_id=0, seed=seed, **options
    )


def rows(batch: Batch) -> list[int]:
    return batch["input_ids"][:, 0].tolist()


def ahead(stream: BatchStream, num_batches: int) -> list[list[int]]:
    return [rows(batch) for batch in islice(stream.endless(), num_batches)]


@pytest.mark.parametrize("grouped", [True, False])
def test_an_epoch_holds_every_row_once(grouped):
    stream = make(group_by_length=grouped)
    assert len(stream) == 5
    seen = Counter(row for batch in stream for row in rows(batch))
    assert seen == Counter(range(20))
    assert stream.position == 5


def test_the_last_batch_is_filled_up_so_that_no_row_is_left_out():
    batches = [rows(batch) for batch in make(num_examples=10)]
    assert [len(batch) for batch in batches] == [4, 4, 4]
    seen = Counter(row for batch in batches for row in batch)
    assert set(seen) == set(range(10))
    assert sum(seen.values()) == 12 and max(seen.values()) == 2


def test_a_set_smaller_than_a_batch_repeats_its_rows():
    stream = make(num_examples=3, batch_size=8)
    assert len(stream) == 1
    (batch,) = [rows(batch) for batch in stream]
    assert sorted(Counter(batch).values()) == [2, 3, 3]


def test_epochs_and_seeds_differ_and_repeat():
    stream = make()
    first, second = ahead(stream, 5), ahead(stream, 5)
    assert first != second
    assert ahead(make(), 10) == first + second
    assert ahead(make(seed=1), 5) != first
    grouped_differently = [set(batch) for batch in second]
    assert [set(batch) for batch in first] != grouped_differently


def test_the_batch_depends_on_the_position_alone():
    expected = ahead(make(), 17)
    for position in (0, 3, 5, 11):
        stream = make()
        next(stream.endless())
        stream.load_state_dict({"position": position})
        assert ahead(stream, 17 - position) == expected[position:]


def test_iterating_yields_the_rest_of_the_epoch_then_whole_epochs():
    expected = ahead(make(), 15)
    stream = make()
    stream.load_state_dict({"position": 2})
    assert [rows(batch) for batch in stream] == expected[2:5]
    assert [rows(batch) for batch in stream] == expected[5:10]
    assert stream.position == 10


def test_a_saved_position_counts_the_batch_in_hand_as_used():
    stream = make()
    batches = stream.endless()
    next(batches), next(batches)
    saved = stream.state_dict()
    expected = rows(next(batches))
    stream = make()
    stream.load_state_dict(saved)
    assert rows(next(iter(stream))) == expected


def test_a_batch_that_was_taken_back_comes_again():
    expected = ahead(make(), 7)
    stream = make()
    batches = stream.endless()
    assert [rows(next(batches)) for _ in range(6)] == expected[:6]
    stream.rewind(2)  # back over the border between two epochs
    assert stream.position == 4
    assert [rows(next(batches)) for _ in range(3)] == expected[4:]
    with pytest.raises(ValueError, match=r"0 to 7 batches, got 8"):
        stream.rewind(8)


def test_grouping_by_length_saves_padding():
    def padded(grouped: bool) -> int:
        stream = make(num_examples=400, group_by_length=grouped)
        return sum(int((batch["attention_mask"] == 0).sum()) for batch in stream)

    assert padded(True) < padded(False) / 4


def test_grouped_batches_do_not_come_in_order_of_length():
    lengths = [batch["input_ids"].shape[1] for batch in make(num_examples=400)]
    rising = sum(left <= right for left, right in pairwise(lengths))
    assert rising < 0.75 * len(lengths)


def test_replicas_share_every_step_and_leave_nothing_out():
    streams = [
        make(batch_size=2, num_replicas=2, rank=rank, group_by_length=True) for rank in (0, 1)
    ]
    assert len(streams[0]) == 5
    seen = Counter()
    for left, right in zip(*streams, strict=True):
        assert len(rows(left)) == len(rows(right)) == 2
        # Shares of one step are of similar length, so that no replica waits for the other.
        assert abs(left["input_ids"].shape[1] - right["input_ids"].shape[1]) <= 12
        seen.update(rows(left) + rows(right))
    assert seen == Counter(range(20))


def test_replicas_together_are_one_replica_with_a_larger_batch():
    """Rows, and weights with which the mean over replicas is the mean over all answer tokens."""
    whole = make(batch_size=4)
    shares = [make(batch_size=2, num_replicas=2, rank=rank) for rank in (0, 1)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert sorted(rows(parts[0]) + rows(parts[1])) == sorted(rows(batch))
        counts = [int((part["labels"][:, 1:] != -100).sum()) for part in parts]
        weights = [float(part["loss_weight"]) for part in parts]
        mean = sum(counts) / 2
        assert weights == pytest.approx([count / mean for count in counts])
        assert "loss_weight" not in batch


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_replicas_share_batches_that_they_need_not_divide(batch_size, packing):
    """Wrong if a red team of several processes took other steps than one, or one had none to take."""
    spoken = [one for one in examples(20) if len(one.input_ids) > 1]

    def batches(**replica: Any) -> list[Batch]:
        options = {"batch_size": batch_size, "packing": packing, "pad_token_id": 0, "seed": 0}
        return list(islice(BatchStream(spoken, **options, **replica).endless(), 9))

    whole = batches()
    shares = [batches(num_replicas=2, rank=rank, shares_batch=True) for rank in (0, 1)]
    for batch, *parts in zip(whole, *shares, strict=True):
        read = [count_tokens(part) for part in parts if not is_idle(part)]
        assert sum(read) == count_tokens(batch)
        weights = [float(part["loss_weight"]) for part in parts]
        assert sum(weights) == pytest.approx(2)  # Its mean over two is the mean over all tokens.
        assert len(parts) - len(read) == (batch_size == 1)
        assert all(part["input_ids"].numel() for part in parts)


@pytest.mark.parametrize(("num_replicas", "batch_size", "position"), [(2, 2, 7), (1, 8, 3)])
def test_a_position_is_found_again_by_more_or_fewer_replicas(num_replicas, batch_size, position):
    written = make(batch_size=4)
    expected = ahead(written, 9)[7:]
    written.rewind(2)
    stream = make(batch_size=batch_size, num_replicas=num_replicas)
    stream.load_state_dict(written.state_dict())
    assert stream.position == position  # As many rows of 8 are 3 steps, rather than 7 of 4.
    if num_replicas == 2:
        following = zip(ahead(stream, 2), expected, strict=True)
        assert all(set(batch) <= set(whole) for batch, whole in following)


def test_fixed_batches_are_the_same_every_time_and_end_short():
    batches = FixedBatches(examples(5), batch_size=2, pad_token_id=0)
    assert len(batches) == 3
    for _ in range(2):
        assert [rows(batch) for batch in batches] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_examples": 0}, "examples must not be empty"),
        ({"batch_size": 0}, r"batch_size must be >= 1, got 0"),
        ({"rank": 1}, r"rank must be in \[0, num_replicas\), got 1 of 1"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
