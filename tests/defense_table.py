"""What every defense says of itself; the checks of tests/contract hold each to it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patcher_pl.data.mixing import Mixture
from patcher_pl.data.sources import Source
from patcher_pl.defenses import (
    SFT,
    Booster,
    Ctrap,
    Defense,
    Patcher,
    RepNoise,
    Seam,
    Tar,
    TVaccine,
    Vaccine,
)
from patcher_pl.models import LanguageModel
from tests.tiny_runs import ATTACKER, adamw

_GENERAL = Mixture(sources=[Source(path=str(Path(__file__).with_name("general.jsonl")))])
_GATHERED = "reads hidden states through the output head, whose weights are not gathered there"


@dataclass(frozen=True, kw_only=True)
class Claims:
    """What a defense says of itself, and the settings with which it is held to that.

    Args:
        settings: Those of a run of a few steps, beside model and optimizer. What the defense does
            every so many steps falls due before the first, and once more before the fourth.
        evaluations: Gradient evaluations of the first four steps, of one batch each.
        needs_attack_data: Trains on harmful conversations, and does not start without.
        reads_layers: Looks for the layers of the model, and does not start where there are none.
        one_device: Why it is refused where weights are sharded; None where it works.
        per_batch: Why accumulated batches are not one large batch; None where they are.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    evaluations: tuple[int, int, int, int]
    needs_attack_data: bool = True
    reads_layers: bool = False
    one_device: str | None = None
    per_batch: str | None = None


TABLE: dict[type[Defense], Claims] = {
    SFT: Claims(evaluations=(1, 1, 1, 1), needs_attack_data=False),
    # Attacks by two steps before its first and its third step.
    Patcher: Claims(
        settings={"attacker": ATTACKER, "refresh_every": 2, "num_sft_steps": 0},
        evaluations=(4, 2, 4, 2),
    ),
    Ctrap: Claims(settings={"general": _GENERAL, "token_id": 5}, evaluations=(3, 3, 3, 3)),
    Booster: Claims(
        evaluations=(3, 3, 3, 3),
        per_batch="the step on harmful data has the same length for every batch",
    ),
    Tar: Claims(
        settings={"num_inner_steps": 2, "gradient_every": 1, "inner_lrs": [1e-3, 2e-3]},
        evaluations=(5, 5, 5, 5),
        one_device="a whole copy of the model is kept, and distances are not shared out",
    ),
    Seam: Claims(
        evaluations=(5, 5, 5, 5),
        reads_layers=True,
        one_device=_GATHERED,
        per_batch="logarithm and cosine are of the losses and gradients of every batch",
    ),
    Vaccine: Claims(
        evaluations=(2, 2, 2, 2),
        needs_attack_data=False,
        reads_layers=True,
        per_batch="every batch has a perturbation of its own, of the same length",
    ),
    # Measures before the first and the fourth step, draws before the first and the third.
    TVaccine: Claims(
        settings={"num_layers": 1, "resample_every": 2, "measure_every": 3},
        evaluations=(3, 2, 2, 3),
        reads_layers=True,
        one_device="every process would draw layers of its own",
        per_batch="every batch has a perturbation of its own, of the same length",
    ),
    RepNoise: Claims(
        evaluations=(2, 2, 2, 2),
        reads_layers=True,
        one_device=_GATHERED,
        per_batch="logarithm and discrepancy are of the losses and outputs of every batch",
    ),
}


def build(
    kind: type[Defense], path: Path, *, model: Mapping[str, Any] | None = None, **options: Any
) -> Defense:
    """A defense of the model at `path`.

    Args:
        kind: Which.
        path: Directory of the model.
        model: Options of the `LanguageModel`.
        options: Of the defense, over those of the table.
    """
    language_model = LanguageModel(path=str(path), **(model or {}))
    settings: dict[str, Any] = {"optimizer": adamw(), **TABLE[kind].settings, **options}
    return kind(language_model, **settings)
