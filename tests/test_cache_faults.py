"""What kills, full disks and a second writer leave behind."""

import errno
import os
import random
import subprocess
import sys
from pathlib import Path

import banks
import numpy as np
import pytest
from banks import (
    LARGE,
    RECIPE,
    complete,
    copy_to,
    files_of,
    large_recipe,
    make,
    recipe,
    rows,
    splits,
    write,
)
from faults import FAULT, Killed

from cache import BankIncomplete, BankLocked, CacheError, Target, Writer, open_bank

SMALL = {"train": rows([5, 9, 3, 16, 0])}
LABELS = Target(name="y", kind="class", names=("a", "b"), values=np.arange(5, dtype=np.int32) % 2)


def extract(path, codec="none", dtype="float16"):
    """A whole extraction with a target, on one split of three blocks."""
    with Writer(str(path), recipe(codec=codec, dtype=dtype, layers=(0, 2)), SMALL) as writer:
        writer.write_target("train", LABELS)
        complete(writer)


def moments(path, many, **how):
    """How often an extraction changes its folder: the first and last of them, and a random choice."""
    assert FAULT.run(path, 10**6, Killed(), lambda: extract(path, **how))
    changes = 10**6 - FAULT.left
    assert changes > 60, "the changes were not seen"
    ends = {0, 1, changes - 2, changes - 1}
    return sorted(ends | set(random.Random(1).sample(range(changes), many)))


@pytest.mark.parametrize(
    ("how", "many"), [({}, 14), ({"codec": "lz4"}, 2), ({"dtype": "int8"}, 8)], ids=["plain", "lz4", "int8"]
)
def test_killed_at_any_change_of_any_file_the_next_run_ends_with_the_same_bank(tmp_path, how, many):
    killed = moments(tmp_path / "undisturbed", many, **how)
    expected, again = files_of(tmp_path / "undisturbed"), random.Random(2)
    for change in killed:
        path = tmp_path / f"bank-{change}"
        assert not FAULT.run(path, change, Killed(), lambda at=path: extract(at, **how))
        with pytest.raises(CacheError):
            open_bank(str(path))
        FAULT.run(path, again.randrange(60), Killed(), lambda at=path: extract(at, **how))
        extract(path, **how)
        assert files_of(path) == expected, f"killed at change {change}"


def test_a_disk_full_at_any_change_gives_one_line_and_the_next_run_goes_on(tmp_path):
    full = moments(tmp_path / "undisturbed", 4)
    expected = files_of(tmp_path / "undisturbed")
    for change in full:
        path = tmp_path / f"bank-{change}"
        said = []
        assert not FAULT.run(path, change, OSError(errno.ENOSPC, "full"), lambda at=path: extract(at), said)
        assert "the disk is full" in said[0], f"full at change {change}"
        assert "make room, then run the same command" in said[0]
        extract(path)
        assert files_of(path) == expected, f"full at change {change}"


def test_a_disk_full_in_the_middle_of_a_chunk_leaves_the_earlier_blocks_whole(tmp_path, monkeypatch):
    make(tmp_path / "undisturbed")
    path, real, room = tmp_path / "bank", os.write, 1000

    def write_until_full(descriptor, data):
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = real(descriptor, data[: min(room, 100)])
        room -= done
        return done

    with Writer(str(path), RECIPE, splits()) as writer:
        write(writer, "train", 0)
        write(writer, "train", 1)
        whole = files_of(path)
        with monkeypatch.context() as full:
            full.setattr(os, "write", write_until_full)
            with pytest.raises(CacheError, match="the disk is full"):
                write(writer, "train", 2)
            room = 0
            with pytest.raises(CacheError, match="the disk is full"):
                write(writer, "train", 1)
        assert whole.items() <= files_of(path).items(), "an earlier block was touched"
        assert not list(path.rglob("*.partial")), "left-overs of the chunk that did not fit"
        assert 2 in writer.missing("train")
        assert not {0, 1} & set(writer.missing("train"))
        with pytest.raises(BankIncomplete):
            open_bank(str(path))
    with Writer(str(path), RECIPE, splits()) as writer:
        complete(writer)

    assert files_of(path) == files_of(tmp_path / "undisturbed")


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_left_overs_of_a_killed_writer_do_not_count_and_go_away(tmp_path, codec):
    copy_to(tmp_path / "bank", codec)
    whole = files_of(tmp_path / "bank")
    for place in ("zarr.json", "train/states/c/1/1/0", "train/input_ids/c/0", "train/c/0"):
        left = tmp_path / "bank" / f"{place}.0123.partial"
        left.parent.mkdir(parents=True, exist_ok=True)
        left.write_bytes(b"half")
    assert open_bank(str(tmp_path / "bank")).split("train").numpy().any()
    with Writer(str(tmp_path / "bank"), recipe(codec=codec), splits()) as writer:
        assert writer.missing("train") == []

    assert files_of(tmp_path / "bank") == whole


def test_an_error_while_writing_gives_the_lock_back(tmp_path):
    with pytest.raises(RuntimeError), Writer(str(tmp_path / "bank"), RECIPE, splits()):
        raise RuntimeError

    assert [p.name for p in tmp_path.iterdir()] == ["bank"], "the lock file stayed"
    make(tmp_path / "bank")


def test_a_refused_writer_gives_the_lock_back(tmp_path):
    copy_to(tmp_path / "bank")
    with pytest.raises(CacheError), Writer(str(tmp_path / "bank"), recipe(seed=9), splits()):
        pass

    assert [p.name for p in tmp_path.iterdir()] == ["bank"], "the lock file stayed"


def test_a_second_writer_is_refused_under_any_name_of_the_bank(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "bank")
    monkeypatch.chdir(tmp_path)
    with Writer(str(tmp_path / "bank"), RECIPE, splits()) as writer:
        for name in (str(tmp_path / "bank"), "bank", "./bank/", "link"):
            with pytest.raises(BankLocked, match=f"another process .pid {os.getpid()}."):
                Writer(name, RECIPE, splits()).__enter__()
        complete(writer)

    assert sorted(p.name for p in tmp_path.iterdir()) == ["bank", "link"]


def test_a_bank_in_the_current_folder_is_written(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    make(".")

    assert open_bank(".").splits == ["train", "dev"]


def test_banks_of_one_folder_are_written_at_the_same_time(tmp_path):
    with (
        Writer(str(tmp_path / "one"), RECIPE, splits()) as one,
        Writer(str(tmp_path / "other"), RECIPE, splits()) as other,
    ):
        complete(one)
        complete(other)

    assert files_of(tmp_path / "one") == files_of(tmp_path / "other")


@pytest.fixture
def spawn():
    """Starts writers in processes of their own and ends them."""
    started = []

    def start(path, *mode):
        root = str(Path(__file__).parents[1])
        process = subprocess.Popen(
            [sys.executable, banks.__file__, str(path), *mode],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": root},
        )
        started.append(process)
        assert process.stdout.readline() == "open\n", "the writer did not start"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_process_is_refused_while_the_first_lives(tmp_path, spawn):
    first = spawn(tmp_path / "bank", "hold")
    with pytest.raises(BankLocked, match=f"pid {first.pid}.*: wait for it, or end it"):
        Writer(str(tmp_path / "bank"), large_recipe(), LARGE).__enter__()
    first.kill()
    first.wait()

    assert (tmp_path / ".bank.lock").exists(), "the dead process cleaned up, so this shows nothing"
    with Writer(str(tmp_path / "bank"), large_recipe(), LARGE) as writer:
        assert writer.missing("train")
    assert not (tmp_path / ".bank.lock").exists()


def test_kill_9_at_random_moments_ends_with_the_same_bank(tmp_path, spawn):
    with Writer(str(tmp_path / "undisturbed"), large_recipe(), LARGE) as writer:
        complete(writer)
    moment, path = random.Random(5), tmp_path / "bank"
    for _ in range(4):
        process = spawn(path)
        for _ in range(moment.randrange(4)):
            process.stdout.readline()
        process.kill()
        process.wait()
        with pytest.raises(BankIncomplete):
            open_bank(str(path))

    with Writer(str(path), large_recipe(), LARGE) as writer:
        missing = writer.missing("train")
        assert 0 < len(missing) < writer.plans["train"].n_blocks, "nothing was left, or nothing was done"
        states = path.glob("train/states/c/*/*/0")
        kept = {p: p.stat().st_mtime_ns for p in states if int(p.parts[-2]) not in missing}
        complete(writer)
    assert files_of(path) == files_of(tmp_path / "undisturbed")
    assert all(p.stat().st_mtime_ns == then for p, then in kept.items()), "whole blocks were written again"
