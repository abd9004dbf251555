"""What is below a folder, whole or broken."""

import json
import shutil
import tempfile
from pathlib import Path

import disks
import pytest
import tiny

from cache import Target, open_bank
from cache.targets import write_target
from pipeline.errors import PipelineError
from pipeline.inventory import describe, inventory
from pipeline.job import Schedule
from pipeline.run import train_run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two banks and a run."""
    folder = tmp_path_factory.mktemp("work")
    bank = tiny.bank(folder / "banks" / "a", sizes={"train": 20, "dev": 10}, skipped={"id": "ids"})
    tiny.bank(folder / "banks" / "b", sizes={"dev": 5}, keep="words", dtype="float16")
    train_run(bank.path, target="label", out=str(folder / "runs" / "r"), schedule=Schedule(epochs=1))
    (folder / "empty").mkdir()
    (folder / ".hidden").mkdir()
    shutil.copytree(folder / "runs" / "r", folder / ".hidden" / "r")
    return folder


def test_description_has_the_promised_keys(place):
    found = describe(open_bank(str(place / "banks" / "a")))
    assert {"format_version", "fingerprint", "encoder", "dtype", "keep", "bytes", "splits", "targets"} <= (
        found.keys()
    )
    json.dumps(found, allow_nan=False)
    assert found["format_version"] == 1
    assert found["complete"] is True
    assert found["encoder"]["name"] == "tiny"
    assert found["layers"] == [0, 1, 2, 3]
    assert found["bytes"] == sum(
        p.stat().st_size for p in (place / "banks" / "a").rglob("*") if p.is_file()
    )
    assert {name: split["examples"] for name, split in found["splits"].items()} == {"train": 20, "dev": 10}
    assert found["targets"]["tags"] == {"kind": "tags", "classes": 4, "splits": ["train", "dev"]}
    assert found["skipped"] == {"id": "ids"}


def test_column_labelled_later_is_no_longer_skipped(tmp_path):
    bank = tiny.bank(tmp_path / "b", sizes={"dev": 5}, skipped={"mood": "unseen class", "id": "ids"})
    target = tiny.targets(tiny.examples("dev", 5))[0]
    write_target(
        bank.writable_split("dev"),
        Target(name="mood", kind="class", names=("a", "b", "c"), values=target.values),
    )
    found = describe(open_bank(bank.path))
    assert "mood" in found["targets"]
    assert found["skipped"] == {"id": "ids"}


def test_banks_and_runs_are_found(place):
    found = inventory(str(place))
    assert [bank["store"] for bank in found["banks"]] == [str(place / "banks" / name) for name in "ab"]
    assert [run["run"] for run in found["runs"]] == [str(place / "runs" / "r")]
    assert found["runs"][0]["store"] == str(place / "banks" / "a")
    assert found["runs"][0]["fusion"] == "attention"
    assert all(bank["complete"] for bank in found["banks"])
    assert [b["fingerprint"] for b in found["banks"]] == [
        open_bank(b["store"]).fingerprint for b in found["banks"]
    ]
    json.dumps(found, allow_nan=False)


def test_folder_may_be_the_bank_or_the_run(place):
    assert [b["store"] for b in inventory(str(place / "banks" / "a"))["banks"]] == [
        str(place / "banks" / "a")
    ]
    assert len(inventory(str(place / "runs" / "r"))["runs"]) == 1
    assert inventory(str(place / "empty")) == {"banks": [], "runs": []}


def test_what_is_broken_is_listed_as_that(place, tmp_path):
    work = shutil.copytree(place, tmp_path / "work")
    attrs = work / "banks" / "a" / "zarr.json"
    attrs.write_text(attrs.read_text().replace('"complete": true', '"complete": false'))
    other = work / "banks" / "b" / "zarr.json"
    other.write_text(other.read_text().replace('"format_version": 1', '"format_version": 9'))
    for k, content in enumerate(["[]", "{", "null", '{"source": 3}']):
        shutil.copytree(work / "runs" / "r", work / "runs" / f"x{k}")
        (work / "runs" / f"x{k}" / "config.json").write_text(content)
    found = inventory(str(work))
    assert [bank["complete"] for bank in found["banks"]] == [False, False]
    assert "bank format 9" in found["banks"][1]["error"]
    assert ["error" in run for run in found["runs"]] == [False, True, True, True, True]


def test_no_folder_there(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("none", "file"):
        with pytest.raises(PipelineError, match="name one that holds banks or runs"):
            inventory(str(tmp_path / name))


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111])
def test_folder_that_may_not_be_looked_into_holds_nothing(place, mode):
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are the super-user's alone
        shutil.copytree(place / "runs", Path(name) / "runs")
        (Path(name) / "locked" / "below").mkdir(parents=True)
        Path(name).chmod(0o755)
        (Path(name) / "locked").chmod(mode)
        with disks.no_super_user():
            found = inventory(name)
        (Path(name) / "locked").chmod(0o755)
    assert [run["run"] for run in found["runs"]] == [f"{name}/runs/r"]
    assert found["banks"] == []


def test_runs_in_the_making_are_not_listed(place, tmp_path):
    shutil.copytree(place / "runs", tmp_path / "runs")
    for name in ("r.partial-12", "r.aside-12"):
        shutil.copytree(place / "runs" / "r", tmp_path / "runs" / name)
    assert [run["run"] for run in inventory(str(tmp_path))["runs"]] == [str(tmp_path / "runs" / "r")]


def test_circle_of_links_ends(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    assert inventory(str(tmp_path)) == {"banks": [], "runs": []}
