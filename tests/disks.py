"""A disk that refuses, for the tests."""

import os
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


@contextmanager
def no_super_user():
    """Permissions hold meanwhile; a super-user has them all."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
