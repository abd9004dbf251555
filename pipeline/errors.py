"""What the pipeline says when a user's request cannot be done. One root, caught once in ``cli.py``."""

import difflib
from collections.abc import Iterable


class PipelineError(Exception):
    """A foreseen failure: its text is one line that says what was asked, what was found, what to do."""


def said_by(error: Exception) -> str:
    """What an error of the system or of a library says, in one line; the system's without number and path.

    >>> said_by(FileNotFoundError(2, "No such file or directory", "a/b"))
    'No such file or directory'
    """
    text = getattr(error, "strerror", None) or str(error)
    return next(iter(text.splitlines()), type(error).__name__)


def nearest(asked: str, known: Iterable[str]) -> str:
    """Lists the known names and, where one is close, offers it.

    >>> nearest("atention", ["attention", "linear"])
    "did you mean 'attention'? known: attention, linear"
    """
    names = sorted(known)
    close = difflib.get_close_matches(asked, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names) if names else 'none'}"
