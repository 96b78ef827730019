"""Testbeds in which every right answer is known, behind one interface (docs/worlds.md)."""
