"""What the program is called, for usage lines and commands to copy."""

import sys
from pathlib import Path


def program() -> str:
    """The name under which this process was started: the installed command's, or the module's."""
    called = Path(sys.argv[0]).stem
    return called if called == "patcher-pl" else "python -m patcher_pl"
