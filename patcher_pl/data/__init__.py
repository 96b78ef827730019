"""Data: sources, readers, mixtures, chat formatting with loss masks, and streams of batches."""

from typing import TYPE_CHECKING, Any

from patcher_pl.data.benchmarks import HarmBench, StrongReject, XsTest
from patcher_pl.data.chat import ChatFormat, Encoded
from patcher_pl.data.collate import collate, encode_all
from patcher_pl.data.mixing import Mixture
from patcher_pl.data.readers import ColumnMap, Messages, PromptResponse, Reader, RowError
from patcher_pl.data.schemas import (
    AdvBench,
    Alpaca,
    BeaverTails,
    BeaverTailsRefusals,
    Gsm8k,
    HexPhi,
    PkuSafeRlhf,
    ToxicDpo,
)
from patcher_pl.data.sources import Source
from patcher_pl.data.stream import BatchStream, FixedBatches

if TYPE_CHECKING:
    from patcher_pl.data.datamodule import SafetyDataModule

__all__ = [
    "AdvBench",
    "Alpaca",
    "BatchStream",
    "BeaverTails",
    "BeaverTailsRefusals",
    "ChatFormat",
    "ColumnMap",
    "Encoded",
    "FixedBatches",
    "Gsm8k",
    "HarmBench",
    "HexPhi",
    "Messages",
    "Mixture",
    "PkuSafeRlhf",
    "PromptResponse",
    "Reader",
    "RowError",
    "SafetyDataModule",
    "Source",
    "StrongReject",
    "ToxicDpo",
    "XsTest",
    "collate",
    "encode_all",
]


def __getattr__(name: str) -> Any:
    # Lightning takes seconds to import; only who asks for the datamodule pays for it.
    if name == "SafetyDataModule":
        from patcher_pl.data.datamodule import SafetyDataModule

        return SafetyDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
