"""Versions of what takes part in a result, for the record."""

from importlib.metadata import PackageNotFoundError, version

_PARTS = ("layerbank", "torch", "transformers", "tokenizers", "zarr", "numpy")


def versions() -> dict[str, str]:
    """Version of each package; ``source`` for one that runs without being installed."""
    return {name: _version(name) for name in _PARTS}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "source"
