"""The same extraction asked for again does nothing; anything else is never taken for the same."""

import json
import os
import shutil
from dataclasses import asdict

import pytest
from banks import damage, files_of
from encoders import copy_of, tiny_encoder
from typer.testing import CliRunner

import cli
from cache import CacheError, open_bank, store
from cache.verify import verify
from pipeline import repeat
from pipeline.checkpoint import files_sha256
from pipeline.corpus import load_corpus
from pipeline.label import label
from pipeline.repeat import extract_once

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
ROWS = [
    {"tokens": WORDS[: i % 9], "tags": ["O", "B-x", "I-x"] * 3, "intent": "abc"[i % 3]} for i in range(40)
]
ROWS = [{**row, "tags": row["tags"][: len(row["tokens"])]} for row in ROWS]
CHUNK = "train/states/c/1/2/0"


def write_rows(folder, rows=ROWS):
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return load_corpus(str(folder))


def opening(name=None):
    return {"name": name or tiny_encoder("bert"), "device": "cpu", "precision": "float32"}


def rot(path):
    """Damage that leaves no trace in the file's facts."""
    before = path.stat()
    damage(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr("pipeline.extract.block_tokens_for", lambda _, max_length: max(64, max_length))


@pytest.fixture(params=["none", "zstd"])
def made(tmp_path, request, small_blocks):
    """A bank with the corpus and the choices that it was made with."""
    corpus, choices = write_rows(tmp_path / "data"), {"codec": request.param, "max_length": 12}
    first = extract_once(corpus, opening(), str(tmp_path / "b"), **choices)
    assert first.blocks == first.blocks_encoded > 3
    return first, choices


def test_the_same_again_loads_no_encoder_and_reads_no_states(tmp_path, made, monkeypatch):
    first, choices = made
    rot(tmp_path / "b" / CHUNK)  # so that reading it would be noticed
    before = files_of(tmp_path / "b")
    monkeypatch.setattr(repeat, "open_encoder", None)
    for name in ("tokenize", "hash_rows"):
        monkeypatch.setattr(f"pipeline.extract.{name}", None)
    again = extract_once(write_rows(tmp_path / "data"), opening(), first.store, **choices)
    assert asdict(again) == {**asdict(first), "blocks_encoded": 0, "seconds": again.seconds}
    assert files_of(tmp_path / "b") == before


@pytest.mark.parametrize("harm", ["cut", "gone", "empty"])
def test_a_file_of_another_size_is_noticed_and_made_anew(tmp_path, made, harm):
    first, choices = made
    whole, chunk = files_of(tmp_path / "b"), tmp_path / "b" / CHUNK
    if harm == "gone":
        chunk.unlink()
    else:
        chunk.write_bytes(chunk.read_bytes()[:-3] if harm == "cut" else b"")
    again = extract_once(write_rows(tmp_path / "data"), opening(), first.store, **choices)
    assert again.blocks_encoded == 1
    assert files_of(tmp_path / "b") == whole


@pytest.mark.parametrize("harm", [rot, damage])
def test_damage_is_found_by_verify_and_repaired_by_the_same_again(tmp_path, made, harm):
    first, choices = made
    whole = files_of(tmp_path / "b")
    harm(tmp_path / "b" / CHUNK)
    (line,) = verify(open_bank(first.store)).bad
    assert "again with --repair, it repairs just that block" in line
    # A disk that rots changes no time: only who asks for it has every byte read.
    corpus = write_rows(tmp_path / "data")
    again = extract_once(corpus, opening(), first.store, repair=harm is rot, **choices)
    assert again.blocks_encoded == 1
    assert files_of(tmp_path / "b") == whole


@pytest.mark.parametrize("changed", ["text", "label", "more", "column", "choice"])
def test_other_data_or_another_choice_is_not_the_same(tmp_path, made, monkeypatch, changed):
    first, choices = made
    rows = [dict(row) for row in ROWS]
    if changed == "text":
        rows[3]["tokens"] = ["the"] * len(rows[3]["tokens"])
    elif changed == "label":
        rows[0]["intent"] = "b"
    elif changed == "more":
        rows.append(rows[5])
    elif changed == "column":
        rows = [{**row, "y": i / 2} for i, row in enumerate(rows)]
    else:
        choices = {**choices, "seed": 1}
    corpus = write_rows(tmp_path / "data", rows)
    if changed in ("text", "choice"):
        with pytest.raises(CacheError, match="name another --store"):
            extract_once(corpus, opening(), first.store, **choices)
        # What was refused has changed nothing.
        monkeypatch.setattr(repeat, "open_encoder", None)
        extract_once(write_rows(tmp_path / "data"), opening(), first.store, **made[1])
        return
    again = extract_once(corpus, opening(), first.store, **choices)
    assert again.new_rows == ({"train": 1} if changed == "more" else {})
    assert (again.blocks_encoded > 0) == (changed == "more")
    assert verify(open_bank(first.store)).ok
    split = open_bank(first.store).split("train")
    values = split.target("intent").values
    assert values[split.row.tolist().index(0)] == (1 if changed == "label" else 0)
    monkeypatch.setattr(repeat, "open_encoder", None)
    assert extract_once(corpus, opening(), first.store, **choices).targets == again.targets


def test_an_encoder_with_other_files_is_not_the_same(tmp_path, made):
    first, choices = made
    other = copy_of("bert", tmp_path / "encoder")
    corpus = write_rows(tmp_path / "data")
    assert extract_once(corpus, opening(other), first.store, **choices).blocks_encoded == 0
    config = tmp_path / "encoder/config.json"
    values = json.loads(config.read_text("utf-8"))
    config.write_text(json.dumps({**values, "layer_norm_eps": 0.5}), "utf-8")
    with pytest.raises(CacheError, match="another encoder"):
        extract_once(corpus, opening(other), first.store, **choices)


def test_after_labels_were_written_by_hand_an_extraction_writes_its_own(tmp_path, made):
    first, choices = made
    rows = [{**row, "intent": "c"} if i == 0 else row for i, row in enumerate(ROWS)]
    label(open_bank(first.store), write_rows(tmp_path / "other", rows), "intent")
    assert "receipt" not in open_bank(first.store).attrs
    extract_once(write_rows(tmp_path / "data"), opening(), first.store, **choices)
    split = open_bank(first.store).split("train")
    assert split.target("intent").values[split.row.tolist().index(0)] == 0


def test_labels_of_another_column_leave_an_extraction_done(tmp_path, made, monkeypatch):
    first, choices = made
    rows = [{**row, "y": i % 2} for i, row in enumerate(ROWS)]
    label(open_bank(first.store), write_rows(tmp_path / "other", rows), "y")
    monkeypatch.setattr(repeat, "open_encoder", None)
    assert (
        extract_once(write_rows(tmp_path / "data"), opening(), first.store, **choices).blocks_encoded == 0
    )
    assert "y" in open_bank(first.store).split("train").target_names()


def test_labels_written_on_a_damaged_bank_do_not_hide_the_damage(tmp_path, made):
    first, choices = made
    damage(tmp_path / "b" / CHUNK)
    rows = [{**row, "y": i % 2} for i, row in enumerate(ROWS)]
    label(open_bank(first.store), write_rows(tmp_path / "other", rows), "y")
    assert (
        extract_once(write_rows(tmp_path / "data"), opening(), first.store, **choices).blocks_encoded == 1
    )
    assert verify(open_bank(first.store)).ok


def test_what_cannot_be_told_without_the_encoder_is_not_told(tmp_path, made):
    corpus = write_rows(tmp_path / "data")
    assert repeat.tell(corpus, opening(), {}) is not None
    assert repeat.tell(corpus, {**opening(), "trust_remote_code": True}, {}) is None
    assert files_sha256("nobody/nothing", None) is None


def test_the_command_says_that_nothing_was_to_do(tmp_path, small_blocks):
    write_rows(tmp_path / "data")
    command = ["extract", tmp_path / "data", "--encoder", tiny_encoder("bert"), "--store", tmp_path / "b"]
    command = [*map(str, command), "--threads", "1"]
    for said in ("blocks encoded in", "was complete: nothing to encode"):
        found = CliRunner().invoke(cli.app, command)
        assert said in found.output, found.output
    shutil.rmtree(tmp_path / "b" / store.chunk_key("train", "kind"))
    found = CliRunner().invoke(cli.app, [*command, "--json"])
    result = json.loads(found.stdout.strip().splitlines()[-1])
    assert result["blocks_encoded"] == result["blocks"]
