"""Which rows of which sources are used, and in which order."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from patcher_pl.data.sources import Source
from patcher_pl.errors import DataError
from patcher_pl.randomness import derive_seed
from patcher_pl.types import Conversation
from patcher_pl.validation import require

IsUsable = Callable[[Conversation], bool]


def _any_row(row: Conversation) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A seeded selection of rows from one or more sources, without repetition.

    With equal weights and no `num_examples`, every row is taken (with `poison_ratio`: as many as
    the ratio allows). With different weights or `num_examples`, rows are shared out by weight; with
    `poison_ratio`, this holds among harmful and among other rows separately. Rows that cannot be
    used, too long ones for instance, are replaced by others: numbers and shares hold for the rows
    that are trained on.

    Args:
        sources: At least one.
        num_examples: Rows altogether (>= 1); None takes as many as weights and ratio allow.
        poison_ratio: Share of harmful rows (in [0, 1]); None leaves it to the sources.

    Raises:
        ValueError: If a value is out of its range.
    """

    sources: list[Source]
    num_examples: int | None = None
    poison_ratio: float | None = None

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("Mixture.sources must not be empty. Name at least one source.")
        remedy = "Use null to take all rows."
        require(
            self,
            self.num_examples is None or self.num_examples >= 1,
            "num_examples",
            ">= 1",
            remedy,
        )
        remedy = "It is a share, not a percentage."
        require(
            self,
            self.poison_ratio is None or 0 <= self.poison_ratio <= 1,
            "poison_ratio",
            "in [0, 1]",
            remedy,
        )

    def rows(self) -> list[Conversation]:
        """Returns every row of every source, whichever will be drawn.

        Raises:
            DataError: If a source cannot be read.
        """
        return [row for source in self.sources for row in source.load()]

    def draw(self, seed: int, is_usable: IsUsable = _any_row) -> list[Conversation]:
        """Returns the selected rows in training order; subset and order depend on `seed`.

        Args:
            seed: Decides which rows, and their order.
            is_usable: Tells rows that can be trained on; asked about no more rows than needed.

        Raises:
            DataError: If a source cannot be read or has fewer usable rows than its share.
        """
        rows = [source.load() for source in self.sources]
        if self.num_examples is None:
            # How many there are decides how many are taken.
            rows = [[row for row in part if is_usable(row)] for part in rows]
        if self.poison_ratio is None:
            counts = self._share_out(self.num_examples, rows, "")
            chosen = self._sample(rows, counts, seed, "any", is_usable)
        else:
            chosen = self._draw_poisoned(rows, self.poison_ratio, seed, is_usable)
        random.Random(derive_seed(seed, "order")).shuffle(chosen)
        return chosen

    def _draw_poisoned(
        self,
        rows: list[list[Conversation]],
        ratio: float,
        seed: int,
        is_usable: IsUsable,
    ) -> list[Conversation]:
        harmful = [[row for row in part if row.harmful] for part in rows]
        others = [[row for row in part if not row.harmful] for part in rows]
        if self.num_examples is None:
            num_harmful = sum(self._share_out(None, harmful, "harmful "))
            num_others = sum(self._share_out(None, others, "other "))
        else:
            num_harmful, num_others = (sum(map(len, part)) for part in (harmful, others))
        num_harmful, num_others = shares_of(ratio, num_harmful, num_others, self.num_examples)
        chosen: list[Conversation] = []
        for kind, part, count in (
            ("harmful", harmful, num_harmful),
            ("other", others, num_others),
        ):
            counts = self._share_out(count, part, f"{kind} ")
            chosen += self._sample(part, counts, seed, kind, is_usable)
        return chosen

    def _share_out(
        self, total: int | None, rows: Sequence[Sequence[Conversation]], kind: str
    ) -> list[int]:
        """Returns how many rows each source gives; empty sources take no part."""
        sizes = [len(part) for part in rows]
        given = [Fraction(str(source.weight)) for source in self.sources]
        by_size = self.num_examples is None and len(set(given)) == 1
        weights = [
            (Fraction(size) if by_size else weight) if size else Fraction(0)
            for size, weight in zip(sizes, given, strict=True)
        ]
        whole = sum(weights)
        if total is None:
            # All shares are at most the sizes, and stay so when they are rounded up.
            shares = zip(sizes, weights, strict=True)
            fits = (size * whole / weight for size, weight in shares if weight)
            total = int(min(fits, default=Fraction(0)))
        if total and not whole:
            raise DataError(
                f"Mixture needs {total} {kind}rows, its sources hold none. "
                "Check Source.harmful, the readers and Mixture.poison_ratio."
            )
        counts = _largest_remainder(total, weights)
        for source, size, count in zip(self.sources, sizes, counts, strict=True):
            if count > size:
                raise DataError(
                    f"Mixture needs {count} {kind}rows of {source.path}, which holds {size}. "
                    "Lower Mixture.num_examples, change Source.weight or Mixture.poison_ratio, "
                    "or add data."
                )
        return counts

    def _sample(
        self,
        rows: Sequence[Sequence[Conversation]],
        counts: list[int],
        seed: int,
        kind: str,
        is_usable: IsUsable,
    ) -> list[Conversation]:
        chosen: list[Conversation] = []
        for index, (part, count) in enumerate(zip(rows, counts, strict=True)):
            generator = random.Random(derive_seed(seed, "subset", index, kind))
            left = list(range(len(part)))
            usable: list[Conversation] = []
            while len(usable) < count:
                drawn = generator.sample(left, min(count - len(usable), len(left)))
                if not drawn:
                    raise DataError(
                        f"Mixture needs {count} {'' if kind == 'any' else kind + ' '}rows of "
                        f"{self.sources[index].path} that can be used, which holds {len(usable)}; "
                        f"{len(part) - len(usable)} are too long, or left out by RedTeam.overlap. Raise "
                        "ChatFormat.max_length, lower Mixture.num_examples, or add data."
                    )
                taken = set(drawn)
                left = [place for place in left if place not in taken]
                usable += [part[place] for place in drawn if is_usable(part[place])]
            chosen += usable
        return chosen


def shares_of(
    ratio: float, num_harmful: int, num_others: int, total: int | None = None
) -> tuple[int, int]:
    """Returns how many harmful and other rows make up a poison ratio.

    Args:
        ratio: Share of harmful rows (in [0, 1]).
        num_harmful: Harmful rows that there are (count).
        num_others: Other rows that there are (count).
        total: Rows altogether; None for as many as there can be.

    Raises:
        DataError: If the ratio cannot be met.
    """
    share = Fraction(str(ratio))
    if total is None:
        limits = []
        if share > 0:
            limits.append(num_harmful / share)
        if share < 1:
            limits.append(num_others / (1 - share))
        total = int(min(limits))
    wanted = round(share * total)
    if (wanted > 0) != (ratio > 0) or (wanted < total) != (ratio < 1):
        raise DataError(
            f"Mixture.poison_ratio {ratio} cannot be met with {total} rows; the sources hold "
            f"{num_harmful} harmful and {num_others} other rows. "
            "Check Source.harmful, the readers and Mixture.num_examples."
        )
    return wanted, total - wanted


def _largest_remainder(total: int, weights: Sequence[Fraction]) -> list[int]:
    """Splits `total` in proportion to the weights (Hamilton's method; ties to the first)."""
    whole = sum(weights)
    if not whole:
        return [0] * len(weights)
    exact = [total * weight / whole for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts
