"""What the bank says when it cannot do what was asked. One root, caught once in ``cli.py``."""

REPAIR = "run the same 'layerbank extract' again with --repair"
"""The cure of damage: every byte is read, and what is damaged is written anew."""


class CacheError(Exception):
    """A foreseen failure: one line that says what was asked, what was found, what to do."""


class BankIncomplete(CacheError):
    """The bank's extraction has not ended."""


class BankLocked(CacheError):
    """Another process is writing into the bank."""


class CorruptChunk(CacheError):
    """The bytes of a chunk are not those that were written."""


class BankAbsent(CacheError):
    """There is no bank."""


class StoreRefused(CacheError):
    """An object store said no, and would say it again: credentials, permission, no bucket."""


class StoreUnreachable(CacheError):
    """An object store did not answer for longer than the user's patience."""
