"""Exchange of named tensors between processes through versioned snapshots on a file system."""

from patcher_pl.mailbox.mailbox import Mailbox, wait_for
from patcher_pl.mailbox.messages import Attacked, Spent, Theta
from patcher_pl.mailbox.side import Side
from patcher_pl.mailbox.snapshot import Snapshot, SnapshotGoneError

__all__ = [
    "Attacked",
    "Mailbox",
    "Side",
    "Snapshot",
    "SnapshotGoneError",
    "Spent",
    "Theta",
    "wait_for",
]
