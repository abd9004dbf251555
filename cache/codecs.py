"""Data types of the states and what each costs in bytes and error.

| dtype    | bytes | largest   | relative rounding error |
|----------|-------|-----------|-------------------------|
| float32  | 4     | 3.4e38    | 2^-24                   |
| float16  | 2     | 65504     | 2^-11 (above 6.1e-5)    |
| bfloat16 | 2     | 3.4e38    | 2^-8                    |
| int8     | 1     | see below | about 2^-7 of a token   |

int8 has a scale and a shift for each layer and channel, calibrated on the data (`cache.calibration`).

zarr-python has no ``bfloat16`` of its own; `BFloat16` teaches it the Zarr v3 data type of that name,
which other readers know.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import ml_dtypes
import numpy as np
from numpy import ndarray
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.dtype.common import HasEndianness
from zarr.dtype import DataTypeValidationError, ZDType, data_type_registry

from cache.errors import CacheError
from cache.layout import Codec

DTYPES: Mapping[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "int8": np.dtype(np.int8),
}

_INFINITY_BITS = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy data type of a bank's states.

    Raises:
        CacheError: there is no such data type.
    """
    if name not in DTYPES:
        raise CacheError(f"--dtype {name!r} is not known: use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def bytes_codecs(codec: Codec, dtype: np.dtype[Any]) -> list[Any]:
    """What Zarr does with a chunk's bytes: compression where asked for, then always a CRC-32C."""
    if codec == "none":
        return [Crc32cCodec()]
    level = 1 if codec == "lz4" else 3
    return [
        BloscCodec(cname=codec, clevel=level, shuffle="shuffle", typesize=dtype.itemsize),
        Crc32cCodec(),
    ]


def first_nonfinite(states: ndarray) -> int | None:
    """Index along axis 0 of the first row with a NaN or an infinity; None where all are finite.

    Compares the bits below the sign, which is several times faster than `numpy.isfinite`.
    """
    if states.dtype.name not in _INFINITY_BITS:
        return None  # whole numbers
    infinity = _INFINITY_BITS[states.dtype.name]
    two_bytes = states.dtype.itemsize == 2
    bits: ndarray = states.view(np.uint16 if two_bytes else np.uint32)
    magnitude = np.bitwise_and(bits, 0x7FFF if two_bytes else 0x7FFFFFFF)
    if int(magnitude.max(initial=0)) < infinity:
        return None
    return int(np.argmax((magnitude >= infinity).reshape(len(states), -1).any(axis=1)))


@dataclass(frozen=True, kw_only=True)
class BFloat16(ZDType[Any, Any], HasEndianness):  # type: ignore[misc]
    """The Zarr v3 data type ``bfloat16``, as `ml_dtypes.bfloat16` in numpy.

    Zarr's mix-in for byte order stands in none of its public modules, but without it the array's
    metadata name no byte order and other readers refuse the array.
    """

    dtype_cls = type(DTYPES["bfloat16"])
    _zarr_v3_name: ClassVar[Literal["bfloat16"]] = "bfloat16"

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> "BFloat16":
        """The Zarr type of a numpy type."""
        if dtype == DTYPES["bfloat16"]:
            return cls()
        raise DataTypeValidationError(f"not bfloat16: {dtype}")

    def to_native_dtype(self) -> Any:
        """The numpy type of this Zarr type."""
        return DTYPES["bfloat16"]

    @classmethod
    def _from_json_v2(cls, data: Any) -> "BFloat16":
        raise DataTypeValidationError("Zarr v2 has no bfloat16")

    @classmethod
    def _from_json_v3(cls, data: Any) -> "BFloat16":
        if data == cls._zarr_v3_name:
            return cls()
        raise DataTypeValidationError(f"not bfloat16: {data}")

    def to_json(self, zarr_format: Any) -> Any:
        """The name in an array's metadata."""
        if zarr_format == 2:
            raise ValueError("Zarr v2 has no bfloat16")
        return self._zarr_v3_name

    def _check_scalar(self, data: object) -> bool:
        return isinstance(data, int | float | np.floating | ml_dtypes.bfloat16)

    def cast_scalar(self, data: object) -> Any:
        """A scalar of this type."""
        return ml_dtypes.bfloat16(data)

    def default_scalar(self) -> Any:
        """The fill value."""
        return ml_dtypes.bfloat16(0)

    def from_json_scalar(self, data: Any, *, zarr_format: Any) -> Any:
        """A fill value read from metadata."""
        return ml_dtypes.bfloat16(float(data))

    def to_json_scalar(self, data: Any, *, zarr_format: Any) -> Any:
        """A fill value as metadata write it."""
        return float(data)

    @property
    def item_size(self) -> int:
        """Bytes of one value."""
        return 2


data_type_registry.register("bfloat16", BFloat16)
