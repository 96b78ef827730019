"""Worlds of facts: what a real chat model knows and shall not tell (capital cities, in the one that ships)."""

from patcher_pl.worlds.facts.judge import FactJudge

__all__ = ["FactJudge"]
