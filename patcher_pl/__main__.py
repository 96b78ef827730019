"""`python -m patcher_pl`."""

import sys

from patcher_pl.cli import main

if __name__ == "__main__":
    sys.exit(main())
