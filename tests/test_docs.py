"""The pages name what the code has."""

import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

# Written in parts, so that this file names no host either.
HOSTS = [
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("anaconda", "org"),
        ("download", "pytorch", "org"),
        ("npmjs", "org"),
        ("crates", "io"),
        ("proxy", "golang", "org"),
    )
]


def part_names(folder):
    return sorted(p.stem for p in (ROOT / "pipeline" / folder).glob("[!_]*.py"))


def page(name):
    return (DOCS / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("generate_cli", DOCS / "generate_cli.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commands(generator):
    import typer

    root = typer.main.get_command(generator.cli.app)
    return {c.info_name: c for c in generator._contexts(root, "layerbank", None)}


def test_every_command_is_documented(generator):
    text = page("cli.md")
    for context in commands(generator).values():
        assert f"## `{generator._path(context)}`\n" in text


def test_commands_page_is_what_the_program_says(generator):
    assert page("cli.md") == generator.render(), "run 'python docs/generate_cli.py'"


def test_commands_page_names_what_help_names(generator):
    from typer.testing import CliRunner

    for name, context in commands(generator).items():
        asked = [] if name == "layerbank" else [name]
        shown = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(
            generator.cli.app, [*asked, "--help"]
        )
        assert shown.exit_code == 0
        section = page("cli.md").split(f"## `{generator._path(context)}`\n")[1].split("\n## ")[0]
        options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", shown.stdout))
        assert options <= set(re.findall(r"--[a-z][a-z-]*", section))


def test_generator_is_stable(generator, monkeypatch):
    before = generator.render()
    monkeypatch.setenv("COLUMNS", "40")
    assert generator.render() == before


@pytest.mark.parametrize("folder", ["fusions", "decoders"])
def test_every_part_is_in_the_method_page(folder):
    text = page("method.md")
    missing = [name for name in part_names(folder) if f"`{name}`" not in text]
    assert not missing, f"docs/method.md does not name {missing}"


def test_every_method_is_in_the_early_fusion_page():
    text = page("early-fusion.md")
    missing = [name for name in part_names("early_fusion") if f"`{name}`" not in text]
    assert not missing, f"docs/early-fusion.md does not name {missing}"


def test_every_task_is_in_the_extending_page():
    text = page("extending.md")
    missing = [name for name in part_names("tasks") if f"`{name}`" not in text]
    assert not missing, f"docs/extending.md does not name {missing}"


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "LICENSE", "constraints.txt"])
def test_top_level_file_exists(name):
    assert (ROOT / name).is_file()


def test_readme_marks_the_test_command_that_ci_runs():
    marked = re.findall(
        r"<!-- test command -->\s*```[a-z]*\n(.+?)\n```", (ROOT / "README.md").read_text(encoding="utf-8")
    )
    assert len(marked) == 1
    assert marked[0].endswith(".venv/bin/pytest -n 2 --dist worksteal")


def test_readme_names_every_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for extra in extras["optional-dependencies"].keys() - {"test", "docs"}:
        assert f"`{extra}`" in text or f"[{extra}" in text, extra


def test_pages_install_what_their_commands_need():
    for name in ("tutorial.md", "early-fusion.md"):
        assert "layerbank tune" in page(name)
        assert re.search(r"pip install .*\[(demo,)?tune\]", page(name)), name


def test_the_extending_page_shows_a_task_as_it_is():
    assert (ROOT / "pipeline" / "tasks" / "wnut17.py").read_text(encoding="utf-8") in page("extending.md")


def test_every_decision_is_listed():
    index = page("decisions/index.md")
    for path in (DOCS / "decisions").glob("0*.md"):
        assert path.stem in index


def test_no_file_names_a_registry_host():
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    for path in (ROOT / name for name in done.stdout.split("\0") if name):
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="ignore").lower()
            found = [host for host in HOSTS if host in text]
            assert not found, f"{path.relative_to(ROOT)} names {found}"
