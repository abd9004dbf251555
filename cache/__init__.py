"""The bank: every layer's token states of one data set, in a chunked Zarr store.

Knows numpy, Zarr and Dask; knows no encoder, no head, no torch.
"""

from cache.bank import Bank, open_bank
from cache.calibration import Calibration
from cache.errors import BankIncomplete, BankLocked, CacheError, CorruptChunk
from cache.joined import JoinedBank, Piece
from cache.layout import EncoderRecord, Kind, Recipe
from cache.reader import Split
from cache.skeleton import Rows
from cache.targets import Target
from cache.writer import Writer

__all__ = [
    "Bank",
    "BankIncomplete",
    "BankLocked",
    "CacheError",
    "Calibration",
    "CorruptChunk",
    "EncoderRecord",
    "JoinedBank",
    "Kind",
    "Piece",
    "Recipe",
    "Rows",
    "Split",
    "Target",
    "Writer",
    "open_bank",
]
