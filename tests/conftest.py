"""Shape and type checks of every annotated function are on in the tests."""

import os
import sys
from pathlib import Path

from jaxtyping import install_import_hook

# Tests are small: one thread, here and in the processes they start, is fastest and never waits for a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

install_import_hook(["pipeline", "cache"], "beartype.beartype")

# Builders that several test files share lie beside them; importlib mode adds no folder by itself.
sys.path.append(str(Path(__file__).parent))
