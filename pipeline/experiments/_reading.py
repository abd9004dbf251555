"""How an experiment reads raw data and fills banks of them: what the flags of `extract` say too."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

_COLUMNS = ("text", "text_pair", "words", "options")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is read of data sets, and how it is kept; one for all data sets of an experiment.

    Banks and runs of another reading have other names, so none is taken for another's.
    """

    text: str | None = None  # a column, as in `pipeline.corpus.load_corpus`; so are the next three
    text_pair: str | None = None
    words: str | None = None
    options: str | None = None
    revision: str | None = None  # of the data on the Hub
    max_length: int | None = None  # of an example, in tokens
    dtype: str = "float16"  # of the states
    layers: Sequence[int] | None = None  # that are kept; all if None

    @property
    def given(self) -> dict[str, Any]:
        """What is not left to the default."""
        return {name: value for name, value in asdict(self).items() if value != getattr(_USUAL, name)}

    @property
    def columns(self) -> dict[str, str]:
        """The columns that are named, by role."""
        return {name: value for name, value in self.given.items() if name in _COLUMNS}

    @property
    def stored(self) -> dict[str, Any]:
        """How a bank is filled, as arguments of `pipeline.extract.extract`."""
        return {"max_length": self.max_length, "dtype": self.dtype, "layers": self.layers}


_USUAL = Reading()
