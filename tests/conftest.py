"""Shape and type checks of every annotated function are on in the tests."""

import sys
from pathlib import Path

from jaxtyping import install_import_hook

install_import_hook(["pipeline", "cache"], "beartype.beartype")

# Builders that several test files share lie beside them; importlib mode adds no folder by itself.
sys.path.append(str(Path(__file__).parent))
