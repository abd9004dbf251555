"""The command `experiment`: from rows of the user's own, from a bank that is there, and again."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner

import cli
from cache import open_bank
from pipeline import repeat, train
from pipeline.encoder import Encoder
from pipeline.experiments import _base

SHORT = ["--set", "fusions=last_layer,attention", "--set", "seeds=2", "--set", "epochs=1"]
EARLY = [
    *("--set", "methods=bitfit", "--set", "fusions=last_layer"),
    *("--set", "epochs=1", "--set", "early_epochs=1"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts in a column of another name, and an encoder."""
    folder = tmp_path_factory.mktemp("cli-experiment")
    rows = {split: tiny.rows_of_text(split, n) for split, n in (("train", 24), ("dev", 10), ("test", 8))}
    rows = {split: [{**row, "utterance": row["text"]} for row in some] for split, some in rows.items()}
    tiny.write_jsonl(folder / "data", rows, ["utterance", "intent", "score"])
    tiny.encoder(folder / "encoder")
    return folder


def call(name, *args):
    """Runs an experiment; returns exit code, standard output, standard error."""
    flags = ["--device", "cpu", "--threads", 1, "--json"]
    done = CliRunner().invoke(cli.app, [str(arg) for arg in ("experiment", name, *args, *flags)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def succeed(name, *args):
    code, out, err = call(name, *args)
    assert code == 0, err
    assert out.count("\n") == 1
    return json.loads(out)


def scores(result):
    return next(table["rows"] for table in result["tables"] if table["name"] == "scores")


def never(*_, **__):
    raise AssertionError("this was done before")


def test_own_texts_then_again_then_their_bank(folder, tmp_path, monkeypatch):
    reading = ["--text", "utterance", "--max-length", 5, "--layers", "0,2,3", "--dtype", "float32"]
    asked = [f"{folder / 'data'}::intent", "--encoder", folder / "encoder", *SHORT, *reading]
    made = succeed("fusion-table", *asked, "--out", tmp_path / "out")
    assert made["name"] == "fusion-table"
    assert [(row["fusion"], row["metric"]) for row in scores(made)] == [
        ("last_layer", "accuracy"), ("attention", "accuracy"),
    ]  # fmt: skip
    assert all(Path(file).is_file() for file in made["files"])
    [store] = (tmp_path / "out" / "banks").iterdir()
    recipe = open_bank(str(store)).recipe
    assert (recipe.columns["text"], recipe.max_length, recipe.dtype) == ("utterance", 5, "float32")
    assert tuple(recipe.layers) == (0, 2, 3)

    # Whatever is there already is taken: of the same command, and of a bank without its encoder's name.
    monkeypatch.setattr(Encoder, "encode", never)
    monkeypatch.setattr(repeat, "open_encoder", never)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_epoch", never)
        again = succeed("fusion-table", *asked, "--out", tmp_path / "out")
    assert scores(again) == scores(made)
    of_bank = succeed("fusion-table", f"{store}::intent", *SHORT, "--out", tmp_path / "of-bank")
    other = {"data": store.name}
    assert scores(of_bank) == [{**row, **other} for row in scores(made)]
    assert not (tmp_path / "of-bank" / "banks").exists()


def test_options_to_choose_from(folder, tmp_path):
    made = [
        {"question": f"which is the {colour}", "answers": list(tiny.COLOURS), "right": number}
        for number, colour in enumerate(tiny.COLOURS)
    ]
    choices = tiny.write_jsonl(
        tmp_path / "data", {"train": 8 * made, "dev": 2 * made}, ["question", "answers", "right"]
    )
    asked = [f"{choices}::right", "--encoder", folder / "encoder", "--text", "question", *EARLY]
    result = succeed("convergence", *asked, "--options", "answers", "--out", tmp_path / "out")
    [table] = result["tables"]
    assert {(row["method"], row["metric"]) for row in table["rows"]} == {
        ("bitfit", "accuracy"), ("last_layer", "accuracy"),
    }  # fmt: skip
    [store] = (tmp_path / "out" / "banks").iterdir()
    bank = open_bank(str(store))
    assert bank.recipe.columns["options"] == "answers"
    assert bank.split("dev").target("right").kind == "choice"
    code, _, err = call("convergence", *asked, "--options", "none", "--out", tmp_path / "other")
    assert code == 1
    assert "no column 'none'" in err


def test_a_revision_of_the_hub_reaches_bank_and_run(folder, tmp_path, monkeypatch):
    import datasets

    rows = {split: tiny.rows_of_text(split, n) for split, n in (("train", 24), ("dev", 10))}
    seen = []

    def load(hub, *, revision, **_):
        seen.append((hub, revision))
        columns = ("text", "intent") if revision == "v2" else ("text", "score")
        made = {
            split: datasets.Dataset.from_list([{name: row[name] for name in columns} for row in some])
            for split, some in rows.items()
        }
        return datasets.DatasetDict(made)

    monkeypatch.setattr(datasets, "load_dataset", load)
    asked = ["org/name::intent", "--encoder", folder / "encoder", *EARLY, "--out", tmp_path / "out"]
    result = succeed("convergence", *asked, "--revision", "v2")
    assert set(seen) == {("org/name", "v2")}
    assert {row["method"] for row in result["tables"][0]["rows"]} == {"bitfit", "last_layer"}
    stores = {path.name for path in (tmp_path / "out" / "banks").iterdir()}
    code, _, err = call("convergence", *asked)
    assert (code, seen[-1]) == (1, ("org/name", None))
    assert "intent" in err
    assert stores < {path.name for path in (tmp_path / "out" / "banks").iterdir()}


def test_another_reading_is_another_bank_and_another_run(folder, tmp_path, monkeypatch):
    asked = []

    def noted(one, plan, **_):
        asked.append(one)
        return {}

    monkeypatch.setattr(_base, "tune_run", noted)
    data = _base.Data(path=str(folder / "data"), targets=("intent",))
    labs = [
        _base.Lab(
            out=tmp_path, encoder=str(folder / "encoder"), data=(data,), banks=tmp_path, device="cpu",
            reading=reading,
        )
        for reading in (
            _base.Reading(text="utterance"),
            _base.Reading(text="utterance", max_length=4),
            _base.Reading(text="utterance", dtype="int8"),
        )
    ]  # fmt: skip
    stores = [lab.bank(data) for lab in labs]
    assert len(set(stores)) == 3
    assert [open_bank(store).recipe.max_length for store in stores] == [32, 4, 32]
    assert [open_bank(store).recipe.dtype for store in stores] == ["float16", "float16", "int8"]
    assert labs[0].bank(data) == stores[0]
    for lab in labs[:2]:
        lab.tune("run", "bitfit", [(data, "intent")], plan={"epochs": 1})
    assert [one.tasks[0].columns for one in asked] == [{"text": "utterance"}] * 2
    assert [one.max_length for one in asked] == [None, 4]
    assert asked[0].out != asked[1].out


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("cost", [], "is a bank, and an extraction or a run through the encoder needs the text"),
        ("convergence", [], "give the data that it was made of, or --set methods=none"),
        ("attempt-table", ["--set", "sources=1"], "is a bank, and an extraction or a run"),
        ("fusion-table", ["--text", "utterance"], "--text: all DATA are banks, which stay as they are"),
    ],
)
def test_what_a_bank_is_not_enough_for(folder, bank, tmp_path, name, more, said):
    code, out, err = call(name, f"{bank}::intent", f"{bank}::score", *more, "--out", tmp_path / "out")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert said in err


def test_runs_without_the_encoder_converge_on_a_bank(bank, tmp_path):
    fusions = ["--set", "fusions=last_layer,linear", "--set", "epochs=2", "--set", "methods=none"]
    made = succeed("convergence", f"{bank}::intent", *fusions, "--out", tmp_path / "out")
    [runs] = [table["rows"] for table in made["tables"]]
    assert {row["method"] for row in runs} == {"last_layer", "linear"}


def test_banks_of_another_encoder_are_refused(folder, bank, tmp_path):
    other = tiny.encoder(tmp_path / "other", seed=1)
    asked = [f"{bank}::intent", *SHORT, "--out", tmp_path / "out"]
    code, _, err = call("fusion-table", *asked, "--encoder", other)
    assert code == 1
    assert f"{bank} is of the encoder {folder / 'encoder'}, the experiment of {other}" in err
    assert err.count("\n") == 1
    moved = Path(shutil.copytree(folder / "encoder", tmp_path / "moved"))
    succeed("fusion-table", *asked, "--encoder", moved)


def test_data_need_an_encoder(folder, tmp_path):
    code, _, err = call("fusion-table", f"{folder / 'data'}::intent", "--out", tmp_path / "out")
    assert code == 1
    assert "no --encoder, and" in err
    assert err.count("\n") == 1


@pytest.fixture(scope="module")
def bank(folder, tmp_path_factory):
    """A bank of the user's own, made by `extract`."""
    store = tmp_path_factory.mktemp("bank") / "own"
    asked = ["extract", folder / "data", "--encoder", folder / "encoder", "--store", store]
    flags = ["--text", "utterance", "--device", "cpu", "--threads", 1]
    done = CliRunner().invoke(cli.app, [str(arg) for arg in (*asked, *flags)])
    assert done.exit_code == 0, done.stderr
    return store
