"""Parts by name: the folder, dotted paths, and the hyper-parameters they take."""

from typing import Literal, Optional

import pytest

from pipeline import parts
from pipeline.decoders._base import Decoder
from pipeline.errors import PipelineError
from pipeline.fusions._base import Fusion


class Part:
    """Takes one hyper-parameter of every type."""

    def __init__(
        self,
        *,
        n_layers: int,
        width: int,
        generator: object,
        seed: int,
        count: int = 2,
        rate: float = 0.1,
        norm: bool = False,
        path: str = "",
        pool: Literal["first", "mean", 3] = "first",
        top: int | None = None,
        label: Optional[str] = None,  # noqa: UP045
    ):
        pass


class Needy:
    def __init__(self, *, width: int, layer: int):
        pass


class Plain:
    pass


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_names_are_the_files_of_the_folder():
    found = parts.names("fusion")
    assert found == sorted(found)
    assert {"last_layer", "linear", "attention", "dwatt"} <= set(found)
    assert not any(name.startswith("_") for name in found)


@pytest.mark.parametrize(("kind", "base"), [("fusion", Fusion), ("decoder", Decoder)])
def test_every_file_of_a_folder_ends_with_its_part(kind, base):
    for name in parts.names(kind):
        part = parts.load(kind, name)
        assert issubclass(part, base)
        assert part.__module__ == f"pipeline.{kind}s.{name}"


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(PipelineError) as error:
        parts.load("fusion", "atention")
    assert "no fusion 'atention'; did you mean 'attention'? known: affine, attention" in one_line(error)


@pytest.mark.parametrize("name", ["", "_base", "../fusions/linear", "Linear"])
def test_only_names_of_the_folder_are_names(name):
    with pytest.raises(PipelineError, match="no fusion"):
        parts.load("fusion", name)


@pytest.fixture
def outside(tmp_path, monkeypatch):
    package = tmp_path / "outside_parts"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "mine.py").write_text("class Mine:\n    pass\n\n\nFUSION = Mine\n")
    (package / "broken.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("outside")
@pytest.mark.parametrize("path", ["outside_parts.mine", "outside_parts.mine.Mine"])
def test_a_dotted_path_names_a_part_outside(path):
    assert parts.load("fusion", path).__name__ == "Mine"


@pytest.mark.usefixtures("outside")
@pytest.mark.parametrize(
    "path",
    ["outside_parts.mine.Other", "outside_parts.none", "no_package.none", ".", "a..b", ".mine", "mine."],
)
def test_a_dotted_path_to_nothing_says_what_was_looked_for(path):
    with pytest.raises(PipelineError) as error:
        parts.load("fusion", path)
    assert (
        f"no fusion {path!r}: there is neither a module of that name with the constant FUSION"
        in one_line(error)
    )


@pytest.mark.usefixtures("outside")
def test_a_part_whose_own_import_fails_is_not_called_missing():
    with pytest.raises(
        PipelineError, match=r"importing 'outside_parts.broken' failed: .*a_module_that"
    ) as error:
        parts.load("fusion", "outside_parts.broken")
    one_line(error)


@pytest.mark.parametrize(
    ("key", "given", "converted"),
    [
        ("count", "5", 5),
        ("count", 5, 5),
        ("rate", "1e-3", 0.001),
        ("rate", 1, 1.0),
        ("norm", "true", True),
        ("norm", "False", False),
        ("norm", True, True),
        ("path", "12", "12"),
        ("pool", "mean", "mean"),
        ("pool", "3", 3),
        ("top", "none", None),
        ("top", None, None),
        ("top", "4", 4),
        ("label", "none", None),
        ("label", "x", "x"),
    ],
)
def test_options_take_their_annotated_type(key, given, converted):
    value = parts.options(Part, {key: given})[key]
    assert value == converted
    assert type(value) is type(converted)


@pytest.mark.parametrize(
    ("key", "given", "takes"),
    [
        ("count", "2.5", "an integer"),
        ("count", 2.5, "an integer"),
        ("count", True, "an integer"),
        ("rate", "fast", "a number"),
        ("norm", "maybe", "true or false"),
        ("path", 3, "text"),
        ("pool", "median", "one of first, mean, 3"),
        ("top", "x", "none or an integer"),
    ],
)
def test_a_value_of_another_type_is_an_error(key, given, takes):
    with pytest.raises(PipelineError) as error:
        parts.options(Part, {key: given})
    assert one_line(error).endswith(f"option {key} is {given!r}; it takes {takes}")


def test_an_unknown_option_offers_the_nearest():
    with pytest.raises(PipelineError) as error:
        parts.options(parts.load("fusion", "attention"), {"layernorm": "true"})
    assert (
        one_line(error)
        == "attention has no option 'layernorm'; did you mean 'layer_norm'? known: layer_norm, sources"
    )


@pytest.mark.parametrize("supplied", ["n_layers", "width", "generator", "seed"])
def test_what_the_framework_supplies_is_no_option(supplied):
    with pytest.raises(PipelineError, match="has no option"):
        parts.options(Part, {supplied: "1"})


def test_options_not_given_are_left_to_the_constructor():
    assert parts.options(Part, {}) == {}
    assert parts.options(Plain, {}) == {}


def test_an_option_without_default_is_asked_for():
    with pytest.raises(PipelineError, match="needs the option 'layer'; give --set layer="):
        parts.options(Needy, {})
    assert parts.options(parts.load("fusion", "single_layer"), {"layer": "3"}) == {"layer": 3}
