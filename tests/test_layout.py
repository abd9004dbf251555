"""The layout that docs/contributing.md describes, held by reading the sources; nothing is imported here."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "transformers", "zarr", "dask", "distributed", "datasets", "numpy", "pyarrow"}
PARTS = ("pipeline.fusions", "pipeline.decoders")

# For a lower module, or the modules of a folder: what it never imports.
NEVER = {
    "cache": ("pipeline", "cli", "torch", "transformers", "datasets"),
    "pipeline": ("cli",),
    "pipeline.errors": ("pipeline", "cache", "torch"),
    "pipeline.stack": ("pipeline", "cache"),
    "pipeline.metrics": ("pipeline.train", "pipeline.sweep", "pipeline.extract", "pipeline.encoder"),
    "pipeline.train": ("pipeline.sweep", "pipeline.extract", "pipeline.encoder", "transformers"),
    "pipeline.sweep": ("pipeline.extract", "pipeline.encoder", "transformers"),
    "pipeline.encoder": ("pipeline.extract", "pipeline.train", "pipeline.sweep"),
    "pipeline.corpus": ("pipeline.extract", "pipeline.train", "pipeline.sweep", "torch", "transformers"),
    "pipeline.tasks": ("pipeline.extract", "pipeline.corpus", "pipeline.train", "torch", "transformers"),
    "pipeline.extract": ("pipeline.train", "pipeline.sweep", *PARTS),
    "pipeline.early_fusion": ("pipeline.tuning", "pipeline.train", "pipeline.sweep", "transformers"),
    "pipeline.analysis": ("pipeline.experiments", "pipeline.report", "pipeline.extract", "pipeline.tuning"),
    "pipeline.tuning": ("pipeline.train", "pipeline.sweep", "pipeline.extract", "pipeline.batches"),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PACKAGES = {
    module_name(path): path
    for name in ("pipeline", "cache")
    for path in sorted((ROOT / name).rglob("*.py"))
}
SOURCES = [
    *PACKAGES.values(),
    *sorted((ROOT / "tests").rglob("*.py")),
    *sorted((ROOT / "docs").glob("*.py")),
]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def cli_tree() -> ast.Module:
    path = ROOT / "cli.py"
    assert path.is_file(), "cli.py is missing: the command line is part of the layout"
    return parse(path)


def imports(tree: ast.AST) -> set[str]:
    """Full names of what a file imports, anywhere in it; a submodule where the name is one."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in PACKAGES else node.module)
    return found


def imports_at_start(node: ast.AST) -> Iterator[str]:
    """What runs when the file is imported: everything outside functions and type-checking blocks."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield from imports(child)
        yield from imports_at_start(child)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


IMPORTS = {name: imports(parse(path)) for name, path in PACKAGES.items()}


@pytest.mark.parametrize("lower", NEVER)
def test_no_lower_module_imports_a_higher_one(lower):
    for module in (m for m in PACKAGES if is_within(m, lower)):
        for name in IMPORTS[module]:
            higher = [other for other in NEVER[lower] if is_within(name, other)]
            assert not higher, f"{module} imports {name}, which stands above it"


@pytest.mark.parametrize("package", PARTS)
def test_parts_import_their_base_the_head_axis_and_torch_alone(package):
    allowed = {f"{package}._base", "pipeline.stack", "torch", "jaxtyping"} | sys.stdlib_module_names
    for module in (m for m in PACKAGES if m.startswith(f"{package}.")):
        for name in IMPORTS[module]:
            top = name.partition(".")[0]
            assert name in allowed or top in allowed, f"{module} imports {name}"


def test_nothing_of_stages_1_and_2_imports_early_fusion():
    early = ("pipeline.early_fusion", "pipeline.tuning")
    above = ("pipeline.experiments",)  # they set both kinds side by side
    for module in (m for m in PACKAGES if not any(is_within(m, name) for name in (*early, *above))):
        for name in IMPORTS[module]:
            assert not any(is_within(name, package) for package in early), f"{module} imports {name}"


def test_only_experiments_and_the_command_line_import_analyses():
    above = ("pipeline.analysis", "pipeline.experiments")
    for module in (m for m in PACKAGES if not any(is_within(m, name) for name in above)):
        for name in IMPORTS[module]:
            assert not is_within(name, "pipeline.analysis"), f"{module} imports {name}"


@pytest.mark.parametrize("top", ["pipeline.experiments", "pipeline.report"])
def test_only_the_command_line_imports_what_is_at_the_top(top):
    for module in (m for m in PACKAGES if not is_within(m, top)):
        assert not any(is_within(name, top) for name in IMPORTS[module]), module


def test_imports_have_no_cycle():
    graph = {m: {name for name in found if name in PACKAGES} for m, found in IMPORTS.items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"modules import one another in a circle: {' -> '.join(error.args[1])}")


def test_the_command_line_imports_pipeline_or_cache():
    assert any(is_within(name, "pipeline") or is_within(name, "cache") for name in imports(cli_tree()))


def test_the_command_line_starts_light():
    heavy = {name for name in imports_at_start(cli_tree()) if name.partition(".")[0] in HEAVY}
    assert not heavy, f"cli.py imports {sorted(heavy)} at module level: --help would wait for them"


def test_what_the_command_line_imports_at_the_start_is_light_too():
    waiting, reached = list(imports_at_start(cli_tree())), set()
    while waiting:
        name = waiting.pop()
        assert name.partition(".")[0] not in HEAVY, f"importing cli.py imports {name}, through {reached}"
        # Importing a.b runs a too.
        parents = [".".join(name.split(".")[:n]) for n in range(1, name.count(".") + 2)]
        for module in (m for m in parents if m in PACKAGES and m not in reached):
            reached.add(module)
            waiting += imports_at_start(parse(PACKAGES[module]))


@pytest.mark.parametrize("name", ["extract", "run", "sweep", "tuning.run"])
def test_the_library_reaches_no_terminal(name):
    waiting, reached = [f"pipeline.{name}"], set()
    while waiting:
        module = waiting.pop()
        reached.add(module)
        waiting += IMPORTS.get(module, set()) - reached
    assert "pipeline.terminal" not in reached
    assert "rich" not in {module.partition(".")[0] for module in reached}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_habits(path):
    check_source(path)


def test_source_habits_of_the_command_line():
    cli_tree()
    check_source(ROOT / "cli.py")


UNSAFE_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {(module, call) for module in ("torch", "pickle") for call in ("load", "save", "dump")}


def check_source(path: Path) -> None:
    # A test may send its own object through bytes, as a loader's workers do; no file is read that way.
    unsafe = UNSAFE_MODULES - ({"pickle"} if path.is_relative_to(ROOT / "tests") else set())
    for node in ast.walk(parse(path)):
        where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where}: a relative import"
            assert node.module != "__future__", f"{where}: shapes in signatures need real annotations"
            loads = {(node.module, alias.name) for alias in node.names} & UNSAFE_CALLS
            assert not loads, f"{where}: safetensors and JSON only"
        if isinstance(node, ast.Import | ast.ImportFrom):
            tops = {name.partition(".")[0] for name in imports(node)}
            assert not tops & unsafe, f"{where}: executes on load"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in UNSAFE_CALLS, f"{where}: safetensors and JSON only"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert ast.unparse(node.value) == "False", f"{where}: allow_pickle executes on load"


def test_init_files_only_re_export():
    for path in (path for path in PACKAGES.values() if path.name == "__init__.py"):
        for node in parse(path).body:
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            assert is_docstring or is_all or isinstance(node, ast.Import | ast.ImportFrom), (
                f"{path.relative_to(ROOT)}:{node.lineno}: an __init__ re-exports and does nothing else"
            )


def test_no_ignore_pattern_hides_the_package_cache():
    for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines():
        pattern = line.split("#")[0].strip()
        if pattern.startswith("!") or not pattern:
            continue
        for name in ("cache", "pipeline"):
            last = pattern.rstrip("/").rpartition("/")[2]
            assert not fnmatch(name, last), f".gitignore hides {name}/: {pattern}"


def test_git_sees_the_packages():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    paths = ["cache/layout.py", "pipeline/stack.py", "cli.py"]
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", *paths], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1, f"git ignores {done.stdout.split()}"
