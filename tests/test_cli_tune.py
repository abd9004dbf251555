"""The command `tune`, and its runs in the hands of the other commands."""

import json
import shutil

import pytest
import safetensors.torch
import tiny
import torch
import tuning
from typer.testing import CliRunner

import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli-tune")
    tuning.data(folder / "data")
    tiny.encoder(folder / "encoder")
    return folder


def call(*args):
    """Runs a command; returns exit code, standard output, standard error."""
    done = CliRunner().invoke(cli.app, [str(arg) for arg in args])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def tune(folder, out, *more):
    data = folder / "data"
    flags = ["--encoder", folder / "encoder", "--target", "intent", "--epochs", 1, "--threads", 1]
    return call("tune", data, *flags, "--device", "cpu", "--out", folder / out, *more)


def test_a_run_from_the_command_line_and_back(folder):
    further = ["--task", f"{folder / 'data'}::tags", "--set", "pooling=mean", "--fusion", "linear"]
    code, out, err = tune(folder, "runs/one", "--method", "bitfit", *further, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert out.count("\n") == 1
    assert (result["method"], result["fusion"]) == ("bitfit", "linear")
    assert "epoch 1: loss" in err
    chosen = ["--split", "dev", "--json", "--device", "cpu", "--target"]
    for target, name in (("intent", "data.intent.accuracy"), ("data.tags", "data.tags.f1")):
        code, out, err = call("evaluate", folder / "runs/one", *chosen, target)
        assert code == 0, err
        assert json.loads(out)["score"] == pytest.approx(result["dev_metrics"][name], abs=1e-3)
    for target in ("intent", "tags"):
        words = ["open the red door", "--target", target, "--device", "cpu"]
        code, out, err = call("predict", folder / "runs/one", *words)
        assert code == 0, err
        assert set(json.loads(out)) == {"tokens", target}
    assert len(json.loads(out)["tags"]) == 4
    for command in (["evaluate"], ["predict", "open the red door"]):
        code, out, err = call(command[0], folder / "runs/one", *command[1:], "--device", "cpu")
        assert (code, out) == (1, "")
        assert "several tasks: name one by --target, of data.intent, data.tags" in err
    code, out, _ = call("list", folder / "runs", "--json")
    assert [run["store"] for run in json.loads(out)["runs"]] == [str(folder / "data")]
    code, out, _ = tune(folder, "runs/one", "--method", "bitfit", "--overwrite")
    assert code == 0
    assert "bitfit on intent, dev accuracy" in out
    assert "% of all" in out


RANDOM = ("--set", "transfer=false", "--set", "length=2")
"""Options with which `attempt` needs no prompts."""


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--method", "bitfitt"], 1, "did you mean 'bitfit'"),
        (["--method", "attempt"], 1, "give --prompts"),
        (["--method", "attempt", "--prompts", "nowhere"], 1, "--prompts nowhere: no such file or folder"),
        (["--method", "prompt_tuning", "--set", "length=99"], 1, "position table of the encoder has 32"),
        (["--task", "data"], 2, "give DATA::TARGET"),
        (["--verbalizer", "yes"], 2, "--verbalizer yes: give name=value"),
        (["--verbalizer", "move=go"], 1, "--verbalizer is for models from text to text"),
        (["--precision", "int4"], 2, "int4"),
        (["--lr", "0"], 1, "--lr 0.0: give a number above 0"),
        (["--fusion", "single_layer", "--set", "layer=9"], 1, "reads layer 9, the encoder has 0 to 3"),
        (["--dev-split", "nowhere"], 1, "no split 'nowhere'"),
        (["--max-length", "99"], 1, "--max-length 99: the encoder has 32 positions"),
        (["--max-length", "0"], 1, "--max-length 0: the encoder adds 2 special tokens, give 3 or more"),
        (["--method", "attempt", *RANDOM, "--set", "temperature=1000"], 1, "--set temperature=1000"),
        (["--precision", "bf16"], 2, "bfloat16"),
    ],
)
def test_foreseen_faults_are_one_line(folder, flags, code, said):
    found, out, err = tune(folder, "bad", *flags)
    assert (found, out) == (code, "")
    assert said in " ".join(err.split())
    assert code == 2 or err.strip().count("\n") == 0
    assert not (folder / "bad").exists()


def test_evaluate_takes_other_data_for_a_tuned_run_only(folder, tmp_path):
    tune(folder, "run", "--method", "bitfit")
    code, _, err = call("evaluate", folder / "run", "--target", "tags", "--device", "cpu")
    assert code == 1
    assert "--target tags" in err
    assert "learned no such task: known: data.intent" in err
    for command in (["evaluate"], ["predict", "a text"]):
        code, _, err = call(command[0], folder / "encoder", *command[1:], "--target", "intent")
        assert code == 2
        assert "has one target" in " ".join(err.replace("│", " ").split())
    more = tuning.data(tmp_path / "more", columns=["tokens", "intent"], test=20)
    code, out, err = call("evaluate", folder / "run", "--data", more, "--json", "--device", "cpu")
    assert code == 0, err
    assert json.loads(out)["split"] == "test"
    code, _, err = call("evaluate", folder / "encoder", "--data", more)
    assert code == 2
    assert "--data is for runs of tune" in err
    code, _, err = call("evaluate", folder / "data", "--encoder", folder / "encoder")
    assert code == 2
    assert "--encoder is for runs of tune" in err


def test_evaluate_and_predict_take_the_encoder_s_new_place(folder, tmp_path):
    tuning.data(tmp_path / "data")
    shutil.copytree(folder / "encoder", tmp_path / "encoder")
    assert tune(tmp_path, "run", "--method", "bitfit")[0] == 0
    moved = (tmp_path / "encoder").rename(tmp_path / "moved")
    asked = ["evaluate", tmp_path / "run", "--split", "dev", "--device", "cpu", "--threads", 1]
    assert call(*asked)[0] == 1
    assert call(*asked, "--encoder", moved, "--trust-remote-code")[0] == 0
    asked = ["predict", tmp_path / "run", "open the door", "--device", "cpu", "--threads", 1]
    assert call(*asked, "--encoder", moved, "--trust-remote-code")[0] == 0


def test_runs_of_both_kinds_compared_and_a_mixture_on_a_tuned_encoder(folder, tmp_path):
    bank, threads = tmp_path / "bank", ("--threads", 1)
    extract = ["extract", folder / "data", "--encoder", folder / "encoder", "--store", bank]
    assert call(*extract, "--device", "cpu", *threads)[0] == 0
    for seed in (0, 1):
        train = ["train", bank, "--target", "intent", "--epochs", 1, "--seed", seed, *threads]
        assert call(*train, "--out", tmp_path / "late" / f"{seed}")[0] == 0
    mixture = ["--method", "bitfit", "--fusion", "mixture", "--set", f"sources={tmp_path / 'late'}"]
    assert tune(folder, tmp_path / "mixture", *mixture)[0] == 0
    both = ["--task", f"{folder / 'data'}::tags", "--method", "bitfit"]
    assert tune(folder, tmp_path / "both", *both)[0] == 0
    config = json.loads((tmp_path / "mixture" / "config.json").read_text())
    assert "taken" not in config["tasks"][0]["head"]
    weights = safetensors.torch.load_file(tmp_path / "mixture" / "tuned.safetensors")
    (kept,) = (value for name, value in weights.items() if name.endswith("fusion.sources"))
    for seed in (0, 1):
        source = safetensors.torch.load_file(tmp_path / "late" / f"{seed}" / "head.safetensors")
        assert torch.equal(kept.flatten(0, -2)[seed], source["fusion.query"])
    runs = [tmp_path / "late", tmp_path / "mixture", tmp_path / "both"]
    code, out, err = call("compare", *runs, "--json")
    assert code == 0, err
    rows = {row["run"]: row for row in json.loads(out)["runs"]}
    assert rows[str(tmp_path / "mixture")]["method"] == "bitfit+mixture"
    scores = json.loads((tmp_path / "both" / "result.json").read_text())["dev_metrics"]
    assert rows[str(tmp_path / "both")]["dev"] == scores["data.intent.accuracy"]
    assert rows[str(tmp_path / "both")]["task"] == "data.intent"
    code, out, err = call("compare", *runs, "--target", "tags", "--json", "--out", tmp_path / "pictures")
    assert code == 0, err
    compared = json.loads(out)
    (row,) = compared["runs"]
    assert (compared["target"], compared["metric"]) == ("tags", "f1")
    assert (row["dev"], row["decoder"]) == (scores["data.tags.f1"], "tagger")
    assert "3 runs have not learned tags: left out" in compared["notes"]
    assert any("learned together" in note for note in compared["notes"])
    code, _, err = call("compare", tmp_path / "both")
    assert code == 1
    assert "have learned intent, tags: name one by --target" in err
    code, out, _ = call("list", tmp_path)
    assert "data.intent, data.tags" in " ".join(out.split())
    page = tmp_path / "page.html"
    code, out, err = call("report", *runs, "--out", page, "--json")
    assert code == 0, err
    assert json.loads(out)["runs"] == 4
    text = page.read_text()
    for title in ("Runs on intent", "Runs on tags", f"{tmp_path / 'both'}, data.tags"):
        assert title in text
    code, _, err = call("report", tmp_path / "both", "--out", page, "--one-table")
    assert code == 1
    assert "have learned intent, tags: leave out --one-table" in err
    for row in rows.values():
        assert row["seconds_to_own_95"] > 0 or not row["dev"]
        assert row["peak_memory_bytes"] > 10**7
