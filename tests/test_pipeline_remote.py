"""Both stages on a bank behind a real S3 server that fails now and then: as on a local disk."""

import json
import os
import random
import time
from threading import Timer

import pytest
import s3
import tiny
from banks import files_of
from encoders import SENTENCES, tiny_masked_lm
from typer.testing import CliRunner

import cli
from cache import open_bank, remote
from cache.layout import OUTPUT_LAYER
from cache.place import place
from cache.verify import verify
from pipeline.convert import convert
from pipeline.corpus import load_corpus
from pipeline.encoder import Encoder
from pipeline.extract import extract
from pipeline.inventory import inventory
from pipeline.job import Schedule
from pipeline.run import train_run

COLUMNS = ["tokens", "tags", "intent", "score"]
SPLITS = {"train": 60, "dev": 12, "test": 8}


@pytest.fixture
def proxy(server, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr("pipeline.extract.block_tokens_for", lambda _, max_length: max(64, max_length))
    with s3.Proxy(server.port) as between:
        for name, value in s3.environment(between.port).items():
            monkeypatch.setenv(name, value)
        yield between


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An encoder and a data folder."""
    folder = tmp_path_factory.mktemp("remote")
    tiny.encoder(folder / "encoder")
    tiny.write_jsonl(
        folder / "data", {name: tiny.rows_of_text(name, n) for name, n in SPLITS.items()}, COLUMNS
    )
    return folder


def run(*arguments, code=0):
    found = CliRunner().invoke(cli.app, [*map(str, arguments), *([] if code else ["--json"])])
    assert found.exit_code == code, found.output + str(found.exception)
    return json.loads(found.stdout.strip().splitlines()[-1]) if not code else found.stderr


def test_masked_text_is_kept_converted_trained_on_and_removed_there(server, proxy, tmp_path):
    """The encoder's output layer, which is no chunk, goes where the bank goes."""
    draw, url = random.Random(5), f"s3://{s3.BUCKET}/masked"
    proxy.fault = lambda *_: draw.choice(["503", "cut", "late", "half"]) if draw.random() < 0.1 else None
    (tmp_path / "data").mkdir()
    for split, texts in (("train", SENTENCES * 3), ("dev", SENTENCES)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / "data" / f"{split}.jsonl").write_text(lines, "utf-8")
    corpus, encoder = load_corpus(str(tmp_path / "data")), Encoder(tiny_masked_lm("bert"), device="cpu")
    dev = {}
    for kind, where in (("local", str(tmp_path / "banks")), ("remote", url)):
        extract(corpus, encoder, f"{where}/bank", keep="masked", max_length=20)
        convert(open_bank(f"{where}/bank"), f"{where}/small", layers=[2])
        for name in ("bank", "small"):
            out = str(tmp_path / kind / name)
            options = {"fusion": "last_layer", "schedule": Schedule(epochs=1)}
            dev[where, name] = train_run(f"{where}/{name}", target="token", out=out, **options)["dev"]
    assert len(set(dev.values())) == 1
    files = files_of(tmp_path / "banks")
    assert files_of(server.bucket / "masked") == files
    assert sum(name.endswith(OUTPUT_LAYER) for name in files) == 2
    place(f"{url}/small").remove(OUTPUT_LAYER)
    assert "output_layer.safetensors is not there" in verify(open_bank(f"{url}/small")).bad[0]
    assert "give --yes" in run("remove", f"{url}/bank", code=1)
    run("remove", f"{url}/bank", "--yes")
    assert [bank["store"] for bank in inventory(url)["banks"]] == [f"{url}/small"]
    assert not (server.bucket / "masked/bank").exists()


def test_an_outage_in_the_middle_is_waited_for(server, proxy, made, tmp_path, monkeypatch):
    """Stopped at the first chunk of states that is written, and at the first one that is read."""
    url, outages = f"s3://{s3.BUCKET}/outage/bank", []

    def at(verb):
        def fault(method, path):
            if method == verb and "/train/states/c/" in path and verb not in outages:
                outages.append(verb)
                Timer(0, stop).start()
                time.sleep(0.1)
                return "cut"
            return None

        return fault

    def stop():
        proxy.stop()
        Timer(1.5, proxy.start).start()

    proxy.fault = at("PUT")
    extract = ["extract", made / "data", "--encoder", made / "encoder", "--keep", "words", "--threads", "1"]
    run(*extract, "--store", url)
    run(*extract, "--store", tmp_path / "bank")
    assert files_of(server.bucket / "outage/bank") == files_of(tmp_path / "bank")
    proxy.fault = at("GET")
    train = ["--target", "intent", "--epochs", "2", "--threads", "1", "--out"]
    found = run("train", url, *train, tmp_path / "run")
    assert found["dev"] == run("train", tmp_path / "bank", *train, tmp_path / "local")["dev"]
    assert outages == ["PUT", "GET"]
    proxy.stop()
    monkeypatch.setenv(remote.PATIENCE, "0.3")
    said = run("train", url, *train, tmp_path / "other", code=1)
    assert said.count("\n") == 1
    assert "run the same command again" in said
