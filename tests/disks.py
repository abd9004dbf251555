"""A disk that refuses, for the tests."""

import resource
from contextlib import contextmanager


@contextmanager
def small_files(n_bytes):
    """The system lets no file grow past some bytes meanwhile, as a full disk would not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
