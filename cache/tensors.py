"""A safetensors file as far as a check of it goes: its tensors' shapes and a checksum; no torch."""

import json
from collections.abc import Mapping

import google_crc32c
from jaxtyping import UInt8
from numpy import ndarray

CHECKSUM = "crc32c"
"""Key in the file's metadata; files from before have none."""


def tensors_checksum(tensors: Mapping[str, ndarray]) -> str:
    """The CRC-32C of the names and the bytes of some tensors."""
    found = 0
    for name in sorted(tensors):
        for part in (name.encode(), tensors[name].tobytes()):
            found = int(google_crc32c.extend(found, part))
    return f"{found:08x}"


def check_tensors(stored: UInt8[ndarray, " byte"]) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors.

    Raises:
        ValueError: it is cut off or changed.
        KeyError: its header lacks something.
    """
    end = 8 + int.from_bytes(stored[:8].tobytes(), "little")
    header = json.loads(stored[8:end].tobytes())
    metadata = header.pop("__metadata__", {})
    tensors = {name: stored[end:][slice(*facts["data_offsets"])] for name, facts in header.items()}
    if max((facts["data_offsets"][1] for facts in header.values()), default=0) != len(stored) - end:
        raise ValueError("its length is another than it says")
    if metadata.get(CHECKSUM, tensors_checksum(tensors)) != tensors_checksum(tensors):
        raise ValueError("its bytes are not those that were written")
    return {name: tuple(facts["shape"]) for name, facts in header.items()}
