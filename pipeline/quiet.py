"""Holds back what libraries print on the way to an error that is told in one line anyway."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Silences loggers and all below them, the records they hand on included."""
    with ExitStack() as exits:
        for name in names:
            logger = logging.getLogger(name)
            exits.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL + 1)
            for child in list(logging.Logger.manager.loggerDict):
                below = logging.getLogger(child)
                # Those with a level of their own do not ask the one above.
                if child.startswith(f"{name}.") and below.level:
                    exits.callback(below.setLevel, below.level)
                    below.setLevel(logging.CRITICAL + 1)
        yield


HUB = ("huggingface_hub", "httpx", "urllib3", "datasets", "fsspec")
"""What tells of every retry when the Hub cannot be reached."""
