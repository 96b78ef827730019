"""Whether a model is still of use, beside whether it is safe."""

from patcher_pl.evaluation.utility.accuracy import Accuracy
from patcher_pl.evaluation.utility.base import JudgedMeasure, UtilityMeasure
from patcher_pl.evaluation.utility.lm_evaluation_harness import LmEval
from patcher_pl.evaluation.utility.over_refusal import OverRefusal
from patcher_pl.evaluation.utility.perplexity import Perplexity

__all__ = ["Accuracy", "JudgedMeasure", "LmEval", "OverRefusal", "Perplexity", "UtilityMeasure"]
