"""What people see: sizes, tables, progress on standard error."""

import json
from types import SimpleNamespace

import pytest
import tiny
from rich.console import Console

from pipeline import terminal
from pipeline.inventory import describe, inventory
from pipeline.job import Epoch


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (461_373_440, "461.4 MB"),
        (2.5e9, "2.5 GB"),
        (3.25e12, "3.25 TB"),
        (4e15, "4000.00 TB"),
    ],
)
def test_sizes(n_bytes, text):
    assert terminal.size(n_bytes) == text


def test_notes_go_to_standard_error_and_the_rest_to_standard_output(capsys):
    terminal.note("a [bold]note[/bold] " + "long " * 60)
    terminal.say("said [1]")
    terminal.facts({"name": "x", "longer name": 1234})
    out, err = capsys.readouterr()
    assert err.startswith("a [bold]note[/bold] long")
    assert err.count("\n") == 1
    assert out.splitlines() == ["said [1]", "name         x", "longer name  1,234"]


def test_table_shows_every_cell(capsys):
    terminal.table(
        "title", ("name", "n", "score", "ok"), [("a", 12345, 1.0, True), ("b", 7, 99.456, False)]
    )
    out, err = capsys.readouterr()
    assert err == ""
    for text in ("title", "name", "score", "12,345", "1.00", "99.46", "yes", "no"):
        assert text in out


@pytest.mark.parametrize("name", ["[hello]", "[/i]", "[bold red]x", ":smile:"])
def test_no_name_is_a_command_to_the_terminal(capsys, name):
    terminal.table(f"title {name}", (f"column {name}",), [(name,)])
    terminal.note(name)
    terminal.facts({"path": name})
    out, err = capsys.readouterr()
    assert out.count(name) == 4
    assert err == f"{name}\n"


def test_table_is_folded_in_a_terminal_only(capsys, monkeypatch):
    path = "a/rather/long/path/" * 8
    terminal.table("", ("path", "n"), [(path, 1)])
    assert path in capsys.readouterr().out
    monkeypatch.setattr(terminal, "_OUT", Console(width=60, force_terminal=True))
    terminal.table("", ("path", "n"), [(path, 1)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 4


def test_table_without_rows(capsys):
    terminal.table("", ("a", "b"), [])
    assert capsys.readouterr().err == ""


def test_extraction_bar_counts_on_standard_error(capsys):
    state = SimpleNamespace(
        split="train", examples=5, tokens=40, written_bytes=2000, n_examples=10, n_tokens=80
    )
    with terminal.extraction_bar() as move:
        move(state)
    out, err = capsys.readouterr()
    assert out == ""
    assert "5/10 examples" in err
    assert "2.0 kB" in err
    with terminal.extraction_bar():
        pass  # nothing to encode, or an error before it
    assert capsys.readouterr() == ("", "")


def extraction(**changes):
    split = {"examples": 3, "tokens": 9, "blocks": 1, "words_cut": 0, "words_empty": 0}
    whole = {
        "store": "S",
        "splits": {"train": split},
        "bytes": 1500,
        "blocks": 1,
        "blocks_encoded": 1,
        "seconds": 2.0,
        "targets": ["tags"],
        "skipped": {},
        "notes": [],
        "new_rows": {},
        "unlabelled": [],
    }
    return {**whole, **changes}


def test_extraction_says_what_was_skipped_and_cut(capsys):
    terminal.show_extraction(extraction())
    out, err = capsys.readouterr()
    assert "S: 1.5 kB, 1 of 1 blocks encoded in 2.0 s" in out
    assert "targets: tags" in out
    assert err.splitlines() == ["no file 'dev' in the data: 'layerbank train' needs it, or --dev-split"]
    cut = {"train": {**extraction()["splits"]["train"], "words_cut": 4}}
    terminal.show_extraction(extraction(blocks_encoded=0, splits=cut, targets=[], skipped={"id": "ids"}))
    out, err = capsys.readouterr()
    assert "S was complete: nothing to encode" in out
    assert "targets: none" in out
    assert "column 'id' is no target: ids" in err
    assert "--max-length" in err


def test_epoch_is_one_line(capsys):
    line = Epoch(epoch=3, loss=0.5, dev={"f1": 41.239, "accuracy": 90.0}, seconds=1.5, lr=1e-3)
    terminal.epoch_note(3, [line])
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "epoch 3: loss 0.5000, dev f1 41.24, accuracy 90.00, 1.50 s\n"


RUN = {
    "run": "R",
    "fusion": "attention",
    "decoder": "regressor",
    "target": "t",
    "metric": "mse",
    "dev": 3.14159,
    "best_epoch": 2,
    "epochs": 3,
    "parameters": 123456,
    "fusion_parameters": 8,
    "seconds": 1.0,
    "store": "S",
}


@pytest.mark.parametrize(("metric", "best_first"), [("f1", "cba"), ("mse", "abc"), ("perplexity", "abc")])
def test_sweep_is_listed_best_first(capsys, metric, best_first):
    same = {"target": "t", "decoder": "d", "options": "{}", "batch_size": 32, "lr": 1e-3, "status": "ok"}
    same |= {"weight_decay": 0.01, "dropout": None, "parameters": 1, "metric": metric, "test": None}
    scores = {"c": 30.0, "lost": None, "a": 1.0, "b": 2.0}
    rows = [{**same, "fusion": name, "dev": dev} for name, dev in scores.items()]
    terminal.show_sweep({"rows": rows, "heads": 4, "seconds": 1.0, "results": "R"})
    fusions = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("t ")]
    assert fusions == [*best_first, "lost"]


def test_run_with_and_without_a_finite_score(capsys):
    terminal.show_run(RUN)
    assert "dev mse 3.14 (epoch 2 of 3), 123,456 parameters, 8 of them" in capsys.readouterr().out
    terminal.show_run({**RUN, "dev": None})
    assert "dev mse None" in capsys.readouterr().out


def test_scores_and_labels_and_verification(capsys):
    terminal.show_scores({"run": "R", "split": "test", "metrics": {"f1": 50.0, "mse": None}})
    target = {"target": "x", "kind": "class", "classes": 3, "splits": ["train", "dev"]}
    terminal.show_labels({"store": "S", "targets": [target]})
    terminal.show_verification({"ok": True, "blocks": 3, "bad": []})
    terminal.show_verification(
        {"ok": False, "blocks": 3, "bad": ["split dev, layer 1, block 0 is damaged"]}
    )
    assert capsys.readouterr().out.splitlines() == [
        "R on test: f1 50.00, mse None",
        "S: target 'x' on train, dev (class, 3 classes)",
        "3 blocks: all whole",
        "split dev, layer 1, block 0 is damaged",
        "3 blocks: 1 damaged",
    ]


def test_bank_and_inventory(capsys, tmp_path):
    bank = tiny.bank(tmp_path / "bank", sizes={"train": 12, "dev": 5})
    terminal.show_bank(describe(bank))
    out = capsys.readouterr().out
    for text in (bank.fingerprint, "tiny", "0, 1, 2, 3 of 0 to 3", "label", "tags", "value", "train, dev"):
        assert text in out
    (tmp_path / "run").mkdir()
    for name in ("config", "result"):
        (tmp_path / "run" / f"{name}.json").write_text(json.dumps({**RUN, "source": {"store": "S"}}))
    (tmp_path / "spoilt").mkdir()
    for name in ("config", "result"):
        (tmp_path / "spoilt" / f"{name}.json").write_text("[]")
    terminal.show_inventory(inventory(str(tmp_path)))
    out = capsys.readouterr().out
    for text in (str(tmp_path / "bank"), "attention", "mse"):
        assert text in out
    assert out.count("cannot be read") == 1
    terminal.show_inventory({"banks": [{"store": "B", "complete": False, "error": "why"}], "runs": []})
    assert "why" in capsys.readouterr().out
    terminal.show_inventory({"banks": [], "runs": []})
    assert capsys.readouterr().out == "no bank and no run here\n"
