"""Shape and type checks of every annotated function are on in the tests."""

from jaxtyping import install_import_hook

install_import_hook(["pipeline", "cache"], "beartype.beartype")
