"""The potions world: a tiny domain and its own tiny model, for claims that are checked in seconds."""

from patcher_pl.worlds.potions.judge import RecipeJudge

__all__ = ["RecipeJudge"]
