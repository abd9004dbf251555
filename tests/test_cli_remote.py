"""Every command on banks behind a real S3 server that fails now and then: as on a local disk."""

import json
import os
import random

import pytest
import s3
import tiny
import torch
from banks import files_of
from typer.testing import CliRunner

import cli
from cache import JoinedBank, Piece, open_bank, remote
from pipeline.batches import Feeds
from pipeline.feed import Streamed
from pipeline.job import HeadRates, Schedule, prepare
from pipeline.train import fit

COLUMNS = ["tokens", "tags", "intent", "score"]
SPLITS = {"train": 60, "dev": 12, "test": 8}
KINDS = ["503", "cut", "late", "half"]
SMALL = ["--memory", "0.01MiB"]
"""Less than the states take."""


@pytest.fixture(scope="module")
def user():
    """A user with keys, whose blocks are small and who does not wait long between tries."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
            patch.delenv(name)
        patch.setattr(remote, "_FIRST_WAIT_S", 0.01)
        patch.setattr("pipeline.extract.block_tokens_for", lambda _, max_length: max(64, max_length))
        # Pictures take longer than all else here.
        patch.setattr("pipeline.findings.save_figure", lambda *_: [])
        patch.setattr("pipeline.plot.save_pictures", lambda *_: [])
        yield patch


@pytest.fixture(scope="module")
def proxy(server, user):
    with s3.Proxy(server.port) as between:
        for name, value in s3.environment(between.port).items():
            user.setenv(name, value)
        yield between


def failing(share, seed):
    """A fault for some of the requests, by chance."""
    draw = random.Random(seed)
    return lambda *_: draw.choice(KINDS) if draw.random() < share else None


@pytest.fixture(autouse=True)
def faults(proxy):
    """One request in thirty fails."""
    proxy.fault = failing(0.03, seed=7)
    proxy.requests.clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An encoder and a data folder that grows: `few`, then `all`."""
    folder = tmp_path_factory.mktemp("urls")
    tiny.encoder(folder / "encoder")
    rows = {name: tiny.rows_of_text(name, n) for name, n in SPLITS.items()}
    tiny.write_jsonl(folder / "all", rows, COLUMNS)
    tiny.write_jsonl(folder / "few", {**rows, "train": rows["train"][:40]}, COLUMNS)
    return folder


def run(command, *arguments, code=0):
    flags = (
        [] if command in ("verify", "label", "list", "remove", "inspect", "compare") else ["--threads", 1]
    )
    given = [command, *arguments, *flags, *(["--json"] if command != "predict" else [])]
    done = CliRunner().invoke(cli.app, [str(one) for one in given])
    assert done.exit_code == code, f"{given}: {done.output}{done.exception}"
    return json.loads(done.stdout.strip().splitlines()[-1]) if not code else done.stderr


@pytest.fixture(scope="module")
def bank(proxy, folder):
    """The same bank at a URL and on the disk, grown and labelled twice by the commands."""
    proxy.fault = failing(0.03, seed=3)
    found = {"url": f"s3://{s3.BUCKET}/banks/bank", "disk": str(folder / "banks/bank")}
    for store in found.values():
        asked = ["--encoder", folder / "encoder", "--store", store, "--target", "intent"]
        first = run("extract", folder / "few", *asked)
        run("label", store, folder / "few", "--target", "tags")
        grown = run("extract", folder / "all", *asked)
        assert (grown["new_rows"], grown["unlabelled"]) == ({"train": 20}, ["tags"])
        assert grown["blocks_encoded"] == grown["blocks"] - first["blocks"] > 0
        run("label", store, folder / "all", "--target", "tags")
    return found


def test_a_bank_grows_there_by_its_new_rows_alone_and_is_the_local_one(server, bank, folder):
    assert files_of(server.bucket / "banks/bank") == files_of(bank["disk"])
    asked = ["--encoder", folder / "encoder", "--target", "intent", "--store", bank["url"]]
    again = run("extract", folder / "all", *asked)
    assert (again["blocks_encoded"], again["new_rows"]) == (0, {})
    assert run("verify", bank["url"]) == {"ok": True, "blocks": again["blocks"], "bad": []}


def test_it_is_converted_from_there_and_to_there_listed_and_removed(server, proxy, bank, folder):
    disk, url = f"{folder}/banks", f"s3://{s3.BUCKET}/banks"
    asked = ["--dtype", "int8", "--layers", "0,3", "--keep", "words"]
    run("convert", bank["disk"], f"{disk}/small", *asked)
    for source, store in (
        (bank["url"], f"{url}/small"),
        (bank["disk"], f"{url}/up"),
        (bank["url"], f"{disk}/down"),
    ):
        run("convert", source, store, *asked)
        kept = folder / "banks" if store.startswith(disk) else server.bucket / "banks"
        assert files_of(kept / store.rpartition("/")[2]) == files_of(f"{disk}/small")
    found = run("list", f"s3://{s3.BUCKET}")["banks"]
    assert [one["store"] for one in found] == [f"{url}/{name}" for name in ("bank", "small", "up")]
    assert run("remove", f"{url}/up", "--yes")["removed"]
    assert not (server.bucket / "banks/up").exists()
    assert proxy.count(*KINDS) > 3


def test_training_streams_from_there_and_the_run_is_used_with_faults_between(proxy, bank, folder):
    """The states are more than `--memory`, so every epoch reads them again, ahead of the steps."""
    of, proxy.fault = {}, failing(0.1, seed=7)
    for where in bank:
        proxy.requests.clear()
        out = folder / f"streamed-{where}"
        run("train", bank[where], "--target", "tags", "--epochs", 2, "--out", out, *SMALL)
        of[where] = [(out / "head.safetensors").read_bytes(), scores(out)]
        read = [
            path for method, path, _ in proxy.requests if "/train/states/c/" in path and method == "GET"
        ]
        assert (len(read) > len(set(read)) > 0) == (where == "url"), "read once, so it was not streamed"
        of[where].append(run("evaluate", out, *SMALL)["metrics"])
        of[where].append(run("predict", out, "open the red door"))
        looked = run("analyze", out, bank[where], "--out", folder / f"analysis-{where}")
        of[where].append([table["rows"] for table in looked["tables"]])
        assert (proxy.count(*KINDS) > 3) == (where == "url")
        assert proxy.most_tries() < 10
    assert of["url"] == of["disk"]
    both = run("compare", *(folder / f"streamed-{where}" for where in bank))["runs"]
    assert both[0]["bank_bytes"] == both[1]["bank_bytes"] > 0


def scores(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["dev"]) for line in lines]


def test_a_sweep_that_was_cut_off_goes_on_there(bank, folder, monkeypatch):
    asked = ["--target", "intent,tags", "--fusion", "last_layer", "--epochs", 1, "--crf", "false"]
    notes = []

    def note(*_):
        notes.append(1)
        if len(notes) == 2:  # one target is done
            raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.terminal.stack_note", note)
    assert "run the same command again" in run(
        "sweep", bank["url"], *asked, "--out", folder / "sweep-url", code=130
    )
    found = {where: run("sweep", bank[where], *asked, "--out", folder / f"sweep-{where}") for where in bank}
    assert len(notes) == 2 + 1 + 2, "what was done was done again"
    rows = [[(row["fusion"], row["dev"], row["test"]) for row in one["rows"]] for one in found.values()]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 2


def test_tasks_of_banks_there_are_learned_together(bank, folder):
    mixture = [
        "--fusion",
        "mixture",
        "--set",
        "random_sources=2",
        "--set",
        "size=4",
        "--epochs",
        1,
        "--no-crf",
    ]
    found = {
        where: run(
            "train", store, "--target", "intent", "--task", f"{store}::tags", *mixture, *SMALL,
            "--out", folder / f"together-{where}",
        )
        for where, store in bank.items()
    }  # fmt: skip
    assert list(found["url"]["tasks"]) == ["bank.intent", "bank.tags"]
    assert found["url"]["dev"] == found["disk"]["dev"]


def test_pieces_of_banks_there_are_read_as_on_the_disk(bank):
    """Streamed: half of one bank's rows, and another split of it."""
    heads = []
    for store in bank.values():
        pieces = [Piece(store=store, share=0.5, seed=1), Piece(store=store, split="test")]
        joined = JoinedBank(open_bank(store), "train", pieces)
        job = prepare(joined, "tags", fusion="attention", feeds=Feeds(memory_bytes=0))
        assert isinstance(job.train.feed, Streamed)
        heads.append(fit(job, [HeadRates(lr=1e-2)], Schedule(epochs=2))[0].head.state_dict())
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])


def test_an_experiment_fills_and_reads_banks_there(server, folder):
    short = ["--set", "fusions=last_layer", "--set", "seeds=1", "--set", "epochs=1"]
    asked = [f"{folder / 'few'}::intent", "--encoder", folder / "encoder", *short]
    url = f"s3://{s3.BUCKET}/experiment"
    made = run("experiment", "fusion-table", *asked, "--banks", url, "--out", folder / "made")
    [store] = [f"{url}/{path.name}" for path in (server.bucket / "experiment").iterdir()]
    of_bank = run("experiment", "fusion-table", f"{store}::intent", *short, "--out", folder / "of-bank")
    scores = [[row["test"] for row in one["tables"][0]["rows"]] for one in (made, of_bank)]
    assert scores[0] == scores[1] != []


@pytest.mark.parametrize("command", ["train", "sweep", "analyze", "experiment"])
def test_runs_and_tables_are_not_written_there(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = (
        ["x::y"] if command == "experiment" else ["x"] if command == "analyze" else ["x", "--target", "y"]
    )
    name = ["fusion-table"] if command == "experiment" else []
    said = run(command, *name, *asked, "--out", f"s3://{s3.BUCKET}/run", code=2)
    assert "a URL is for banks alone" in " ".join(said.replace("│", " ").split())
    assert not any(tmp_path.iterdir())


def test_a_url_that_holds_no_bank_is_said_to_hold_none(proxy, tmp_path):
    url = f"s3://{s3.BUCKET}/nothing"
    asked = {"train": ["--target", "y"], "analyze": [], "verify": [], "convert": []}
    for command, more in asked.items():
        out = (
            [tmp_path / "new"]
            if command == "convert"
            else []
            if command == "verify"
            else ["--out", tmp_path]
        )
        said = run(command, url, *more, *out, code=1)
        assert said.startswith(f"error: no bank at {url}: make one with")
        assert said.count("\n") == 1
