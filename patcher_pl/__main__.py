"""`python -m patcher_pl`."""

from patcher_pl.cli import run

if __name__ == "__main__":
    run()
