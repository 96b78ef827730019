"""A judge and attacks for tests of the red team; other processes import them too."""

import os
import signal
import threading
from dataclasses import dataclass

from patcher_pl.evaluation import Judge, Verdict
from patcher_pl.redteam import Attack, AttackPoint


@dataclass(frozen=True, kw_only=True)
class ExactJudge(Judge):
    """5 for the reference answer, 1 for anything else; cannot judge prompts about `puzzle`."""

    puzzle: str | None = None

    @property
    def knows_answers(self):
        """See `Judge.knows_answers`."""
        return True

    def score(self, prompt, answer, reference):
        """See `Judge.score`."""
        if self.puzzle is not None and self.puzzle in prompt:
            return Verdict(None, coherent=False, error="puzzled")
        return Verdict(5 if answer == reference else 1, coherent=bool(answer))


@dataclass(frozen=True, kw_only=True)
class Dying(Attack):
    """Takes its process with it, as the kernel does where memory runs out."""

    how: str

    @property
    def default_name(self):
        return "dying"

    @property
    def uses_data(self):
        return False

    def run(self, model, material):
        yield AttackPoint(0, 0, float("nan"))
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "second" and os.environ["SLURM_PROCID"] == "0":
            threading.Event().wait()  # As where the second process is waited for.
        if self.how == "exit":
            os._exit(3)
        raise {"bug": KeyError, "failure": RuntimeError, "second": RuntimeError}[self.how](
            "a spoon"
        )
