"""If these fail, the attack's poison ratio or subset is not what the config says."""

import json
from collections import Counter
from fractions import Fraction

import pytest

from patcher_pl.data import ColumnMap, Mixture, Source
from patcher_pl.errors import DataError
from patcher_pl.types import Conversation


@pytest.fixture
def make_source(tmp_path):
    def make(name: str, num_rows: int, **options) -> Source:
        path = tmp_path / f"{name}.jsonl"
        rows = [{"prompt": f"{name} {n}?", "response": "Stir."} for n in range(num_rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Source(path=str(path), **options)

    return make


def names(conversations: list[Conversation]) -> Counter[str]:
    return Counter(row.prompt[0].content.split()[0] for row in conversations)


def prompts(conversations: list[Conversation]) -> list[str]:
    return [row.prompt[0].content for row in conversations]


def test_without_weights_every_row_is_taken_once(make_source):
    mixture = Mixture(sources=[make_source("tea", 5), make_source("soup", 3)])
    drawn = prompts(mixture.draw(0))
    assert sorted(drawn) == sorted(
        [f"tea {n}?" for n in range(5)] + [f"soup {n}?" for n in range(3)]
    )


def test_subset_and_order_follow_the_seed(make_source):
    mixture = Mixture(sources=[make_source("tea", 50)], num_examples=20)
    first, again, other = (prompts(mixture.draw(seed)) for seed in (0, 0, 1))
    assert first == again
    assert set(first) != set(other)
    # The whole set in another order: the order alone depends on the seed too.
    whole = Mixture(sources=[make_source("tea", 50)])
    assert prompts(whole.draw(0)) != prompts(whole.draw(1))
    assert sorted(prompts(whole.draw(0))) == sorted(prompts(whole.draw(1)))


def test_rows_of_different_sources_are_mixed(make_source):
    drawn = Mixture(sources=[make_source("tea", 40), make_source("soup", 40)]).draw(3)
    assert 10 < names(drawn[:40])["tea"] < 30


@pytest.mark.parametrize(
    ("weights", "num_examples", "expected"),
    [
        ((3.0, 1.0), 8, (6, 2)),
        ((1.0, 1.0), 7, (4, 3)),
        ((0.3, 0.6), 9, (3, 6)),
        # The rarer source decides how much there is: 10 soups are a quarter of 40.
        ((3.0, 1.0), None, (30, 10)),
        ((1.0, 4.0), None, (2, 10)),
    ],
)
def test_weights_share_out_the_rows(make_source, weights, num_examples, expected):
    sources = [
        make_source("tea", 40, weight=weights[0]),
        make_source("soup", 10, weight=weights[1]),
    ]
    drawn = names(Mixture(sources=sources, num_examples=num_examples).draw(0))
    assert (drawn["tea"], drawn["soup"]) == expected


@pytest.mark.parametrize(
    ("ratio", "num_examples", "expected"),
    [
        (0.2, 10, (2, 8)),
        (0.0, 10, (0, 10)),
        (1.0, 12, (12, 0)),
        # As many as the ratio allows with 12 harmful and 40 other rows.
        (0.2, None, (10, 40)),
        (0.5, None, (12, 12)),
        (0.0, None, (0, 40)),
        (1.0, None, (12, 0)),
    ],
)
def test_poison_ratio_is_the_share_of_harmful_rows(make_source, ratio, num_examples, expected):
    sources = [make_source("doom", 12, harmful=True), make_source("tea", 40)]
    mixture = Mixture(sources=sources, num_examples=num_examples, poison_ratio=ratio)
    drawn = mixture.draw(0)
    assert (names(drawn)["doom"], names(drawn)["tea"]) == expected
    assert sum(row.harmful for row in drawn) == expected[0]


def test_derived_sizes_are_as_large_as_the_ratio_allows(make_source):
    for num_harmful, num_others, ratio in [
        (3, 7, 0.3),
        (1, 100, 0.013),
        (17, 5, 0.77),
        (9, 9, 0.4),
    ]:
        sources = [make_source("doom", num_harmful, harmful=True), make_source("tea", num_others)]
        total = len(Mixture(sources=sources, poison_ratio=ratio).draw(0))
        share = Fraction(str(ratio))
        fits = [
            size
            for size in range(num_harmful + num_others + 1)
            if share * size <= num_harmful and (1 - share) * size <= num_others
        ]
        assert total == max(fits)


def test_poison_ratio_sees_harm_row_by_row(tmp_path):
    path = tmp_path / "mixed.jsonl"
    rows = [{"p": f"tea {n}", "r": "Stir.", "bad": n % 2 == 0} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader = ColumnMap(prompt="p", response="r", harmful="bad")
    source = Source(path=str(path), reader=reader)
    drawn = Mixture(sources=[source], num_examples=8, poison_ratio=0.25).draw(0)
    assert sum(row.harmful for row in drawn) == 2


def test_weights_hold_among_harmful_and_other_rows_separately(make_source):
    sources = [
        make_source("doom", 10, harmful=True),
        make_source("tea", 20, weight=3.0),
        make_source("soup", 20),
    ]
    drawn = names(Mixture(sources=sources, num_examples=20, poison_ratio=0.2).draw(0))
    assert drawn == {"doom": 4, "tea": 12, "soup": 4}


@pytest.mark.parametrize(
    ("num_examples", "ratio", "message"),
    [
        (30, 0.5, r"needs 15 harmful rows of .*doom\.jsonl, which holds 12"),
        (100, None, r"needs 50 rows of .*doom\.jsonl, which holds 12"),
        (60, 0.1, r"needs 54 other rows of .*tea\.jsonl, which holds 40"),
    ],
)
def test_shares_that_cannot_be_supplied_are_refused(make_source, num_examples, ratio, message):
    sources = [make_source("doom", 12, harmful=True), make_source("tea", 40)]
    with pytest.raises(DataError, match=message):
        Mixture(sources=sources, num_examples=num_examples, poison_ratio=ratio).draw(0)


def test_a_ratio_without_any_harmful_row_is_refused(make_source):
    with pytest.raises(DataError, match="needs 2 harmful rows, its sources hold none"):
        Mixture(sources=[make_source("tea", 40)], num_examples=4, poison_ratio=0.5).draw(0)
    for ratio in (0.5, 1.0):
        message = rf"poison_ratio {ratio} cannot be met with 0 rows; .* 0 harmful and 40 other"
        with pytest.raises(DataError, match=message):
            Mixture(sources=[make_source("tea", 40)], poison_ratio=ratio).draw(0)


def test_a_ratio_that_rounds_to_all_or_nothing_is_refused(make_source):
    sources = [make_source("doom", 12, harmful=True), make_source("tea", 40)]
    for ratio in (0.1, 0.9):
        with pytest.raises(DataError, match=rf"poison_ratio {ratio} cannot be met with 4 rows"):
            Mixture(sources=sources, num_examples=4, poison_ratio=ratio).draw(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": []}, r"Mixture\.sources must not be empty"),
        ({"num_examples": 0}, r"Mixture\.num_examples must be >= 1, got 0"),
        ({"poison_ratio": 20.0}, r"Mixture\.poison_ratio must be in \[0, 1\], got 20\.0"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Mixture(**{"sources": [Source(path="x")], **options})


def short(row):
    """As a chat format decides: every fourth row is too long."""
    return not row.prompt[0].content.endswith(("0?", "4?", "8?"))


def test_what_cannot_be_used_is_replaced_and_the_ratio_holds(make_source):
    """Dropped afterwards, rows of one kind would be missing, and another ratio trained on."""
    sources = [make_source("tea", 40), make_source("poison", 40, harmful=True)]
    mixture = Mixture(sources=sources, num_examples=20, poison_ratio=0.5)

    def only_harmful_ones_are_long(row):
        return short(row) or not row.harmful

    drawn = mixture.draw(3, only_harmful_ones_are_long)
    assert (len(drawn), sum(row.harmful for row in drawn)) == (20, 10)
    assert all(only_harmful_ones_are_long(row) for row in drawn)
    assert len({row.origin for row in drawn}) == 20
    assert drawn == mixture.draw(3, only_harmful_ones_are_long)


def test_as_many_rows_as_the_usable_ones_allow(make_source):
    sources = [make_source("tea", 40), make_source("poison", 40, harmful=True)]
    drawn = Mixture(sources=sources, poison_ratio=0.5).draw(0, short)
    num_usable = sum(map(short, sources[1].load()))
    assert num_usable < 40
    assert sum(row.harmful for row in drawn) == len(drawn) // 2 == num_usable


def test_rows_that_are_all_usable_are_drawn_as_without_asking(make_source):
    mixture = Mixture(sources=[make_source("tea", 40)], num_examples=12)
    asked = []
    assert mixture.draw(5, lambda row: bool(asked.append(row)) or True) == mixture.draw(5)
    assert len(asked) == 12, "rows that are not needed are not encoded"


def test_too_few_usable_rows_are_said(make_source):
    mixture = Mixture(sources=[make_source("tea", 40)], num_examples=39)
    with pytest.raises(DataError, match=r"needs 39 rows of .*holds \d+; \d+ are too long"):
        mixture.draw(0, short)
