import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.codecs import DTYPES, first_nonfinite, numpy_dtype
from cache.errors import CacheError

FLOATS = [name for name in DTYPES if name != "int8"]


@pytest.mark.parametrize("name", FLOATS)
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=40))
def test_first_nonfinite_agrees_with_numpy_on_any_bits(name, bits):
    dtype = DTYPES[name]
    words = np.array(bits, dtype=np.uint64).astype(f"u{dtype.itemsize}")
    states = words[: len(words) // 4 * 4].view(dtype).reshape(-1, 4)

    with np.errstate(invalid="ignore"):
        bad = np.flatnonzero(~np.isfinite(states.astype(np.float64)).all(axis=1))
    assert first_nonfinite(states) == (int(bad[0]) if len(bad) else None)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_first_nonfinite_finds_every_kind(name, value):
    states = np.zeros((6, 3), DTYPES[name])
    states[4, 2] = value

    assert first_nonfinite(states) == 4


@pytest.mark.parametrize("name", FLOATS)
def test_the_largest_values_are_finite(name):
    largest = ml_dtypes.finfo(DTYPES[name]).max

    assert first_nonfinite(np.array([[largest, -largest]], DTYPES[name])) is None


def test_an_unknown_dtype_lists_the_known_ones():
    with pytest.raises(CacheError, match="--dtype 'float8' is not known: use one of float16, bfloat16"):
        numpy_dtype("float8")
