import random

import numpy as np
import pytest
from banks import (
    RECIPE,
    block_of,
    complete,
    copy_to,
    damage,
    files_of,
    make,
    recipe,
    rows,
    splits,
    write,
    zeros,
)

from cache import BankIncomplete, CacheError, Writer, open_bank

CODECS = ["none", "zstd"]


def every_block(writer):
    return [(split, block) for split, plan in writer.plans.items() for block in range(plan.n_blocks)]


@pytest.mark.parametrize("codec", CODECS)
def test_any_order_and_any_repetition_makes_the_same_files(tmp_path, codec):
    make(tmp_path / "straight", codec=codec)
    with Writer(str(tmp_path / "shuffled"), recipe(codec=codec), splits()) as writer:
        blocks = every_block(writer) * 2
        random.Random(0).shuffle(blocks)
        for split, block in blocks:
            write(writer, split, block)
        writer.finish()

    assert files_of(tmp_path / "shuffled") == files_of(tmp_path / "straight")


@pytest.mark.parametrize("codec", CODECS)
def test_two_writers_one_after_the_other_make_the_same_files(tmp_path, codec):
    make(tmp_path / "one", codec=codec)
    with Writer(str(tmp_path / "two"), recipe(codec=codec), splits()) as first:
        for split, block in every_block(first)[::2]:
            write(first, split, block)
    with Writer(str(tmp_path / "two"), recipe(codec=codec), splits()) as second:
        assert second.missing("train") == [
            block for split, block in every_block(second)[1::2] if split == "train"
        ]
        complete(second)

    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


def test_what_a_killed_worker_left_is_gone_once_the_bank_is_complete(tmp_path):
    make(tmp_path / "undisturbed")
    with Writer(str(tmp_path / "bank"), RECIPE, splits()) as writer:
        for split, block in every_block(writer):
            write(writer, split, block)
        (tmp_path / "bank" / "train" / "word_id" / "c" / "0.node-1.partial").write_bytes(b"half a chunk")
        writer.finish()
    assert files_of(tmp_path / "bank") == files_of(tmp_path / "undisturbed")


@pytest.mark.parametrize("codec", CODECS)
def test_a_complete_bank_is_left_alone(tmp_path, codec):
    copy_to(tmp_path / "bank", codec)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    with Writer(str(tmp_path / "bank"), recipe(codec=codec), splits()) as writer:
        assert writer.complete
        assert writer.missing("train") == writer.missing("dev") == []

    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("chunk", "harm"),
    [
        *(("states/c/2/1/0", harm) for harm in ("flip", "cut", "empty", "gone")),
        ("input_ids/c/1", "flip"),
        ("word_id/c/1", "cut"),
        ("kind/c/1", "gone"),
    ],
)
def test_a_damaged_block_alone_is_missing_and_writing_it_repairs_it(tmp_path, codec, chunk, harm):
    copy_to(tmp_path / "bank", codec)
    whole = files_of(tmp_path)
    path = tmp_path / "bank/train" / chunk
    if harm == "flip":
        damage(path)
    elif harm == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3] if harm == "cut" else b"")

    with Writer(str(tmp_path / "bank"), recipe(codec=codec), splits()) as writer:
        assert writer.missing("train") == [1]
        assert writer.missing("dev") == []
        assert not writer.complete
        with pytest.raises(BankIncomplete):
            open_bank(str(tmp_path / "bank"))
        write(writer, "train", 1)
        assert writer.missing("train") == []
        writer.finish()
    assert {k: v for k, v in files_of(tmp_path).items() if ".lock" not in k} == whole


@pytest.mark.parametrize("codec", CODECS)
def test_a_block_of_fill_alone_is_written_too(tmp_path, codec):
    path = str(tmp_path / "bank")
    with Writer(path, recipe(codec=codec), {"train": rows([0, 0])}) as writer:
        states = zeros(writer, "train")
        small = np.zeros(states.shape[1], np.int32)
        writer.write_block("train", 0, states, {"input_ids": small, "word_id": small, "kind": small})
        assert writer.missing("train") == []
        writer.finish()

    assert not open_bank(path).split("train").numpy().any()


@pytest.mark.parametrize("codec", CODECS)
def test_write_block_tells_the_bytes_it_wrote(tmp_path, codec):
    with Writer(str(tmp_path / "bank"), recipe(codec=codec), splits()) as writer:
        before = sum(map(len, files_of(tmp_path / "bank").values()))
        told = write(writer, "train", 0)

    written = sum(map(len, files_of(tmp_path / "bank").values())) - before
    assert told <= written <= told + 7 * 4, "more than a checksum a chunk apart"


def test_a_bank_with_a_block_missing_cannot_be_finished(tmp_path):
    with Writer(str(tmp_path / "bank"), RECIPE, splits()) as writer:
        for split, block in every_block(writer)[:-1]:
            write(writer, split, block)
        with pytest.raises(BankIncomplete, match=r"split dev, block 0 of .* is not there"):
            writer.finish()

    with pytest.raises(BankIncomplete):
        open_bank(str(tmp_path / "bank"))


@pytest.mark.parametrize(
    ("dtype", "value", "cure"),
    [
        ("float16", np.nan, "--dtype bfloat16 or float32"),
        ("float16", np.inf, "--dtype bfloat16 or float32"),
        ("float16", 70_000.0, "--dtype bfloat16 or float32"),
        ("bfloat16", -np.inf, "another encoder"),
        ("float32", np.nan, "another encoder"),
    ],
)
def test_states_that_are_not_finite_stop_the_run(tmp_path, dtype, value, cure):
    with Writer(str(tmp_path / "bank"), recipe(dtype=dtype, layers=(0, 2, 3)), splits()) as writer:
        plan, block = writer.plans["train"], 1
        states, tokens = block_of(writer, "train", block)
        example = plan.examples(block).start + 1
        token = int(plan.start[example] + plan.length[example] - 1) - block * plan.block_tokens
        with np.errstate(over="ignore"):
            states[1, token, 5] = value
        before = files_of(tmp_path / "bank")
        with pytest.raises(CacheError) as caught:
            writer.write_block("train", block, states, tokens)
        assert files_of(tmp_path / "bank") == before, "some of the block was written"

    message = str(caught.value)
    assert f"layer 2 has a state that is NaN, infinite or too large for {dtype}" in message
    assert f"block 1, token {token}, source row {plan.row[example]}" in message
    assert message.endswith(f"use {cure}")


def test_the_row_of_a_bad_state_is_right_beside_rows_without_tokens(tmp_path):
    lengths = {"train": rows([0, 2, 0, 0, 3, 0])}
    with Writer(str(tmp_path / "bank"), RECIPE, lengths) as writer:
        plan = writer.plans["train"]
        for row, length in enumerate(lengths["train"].length):
            for k in range(length):
                states, tokens = block_of(writer, "train", 0)
                states[0, plan.start[plan.row == row][0] + k] = np.nan
                with pytest.raises(CacheError, match=f"source row {row}\\)"):
                    writer.write_block("train", 0, states, tokens)


def test_a_block_of_another_shape_or_type_is_our_own_bug(tmp_path):
    with Writer(str(tmp_path / "bank"), RECIPE, splits()) as writer:
        states, tokens = block_of(writer, "train", 0)
        for wrong in (states.astype(np.float32), states[:3], states[:, :, :-1]):
            with pytest.raises(AssertionError):
                writer.write_block("train", 0, wrong, tokens)
        with pytest.raises(AssertionError):
            writer.write_block("train", writer.plans["train"].n_blocks, states, tokens)


def test_states_need_not_lie_in_one_piece(tmp_path):
    make(tmp_path / "one")
    with Writer(str(tmp_path / "other"), RECIPE, splits()) as writer:
        for split, block in every_block(writer):
            states, tokens = block_of(writer, split, block)
            spread = np.zeros((4, states.shape[1], 8, 2), states.dtype)
            spread[..., 0] = states
            writer.write_block(split, block, spread[..., 0], tokens)
        writer.finish()

    assert files_of(tmp_path / "other") == files_of(tmp_path / "one")


def test_reports_and_skipped_columns_are_kept(tmp_path):
    with Writer(str(tmp_path / "bank"), RECIPE, {"train": rows([])}) as writer:
        writer.finish({"train": {"words_cut": 3}}, skipped={"id": "a class a row"})

    bank = open_bank(str(tmp_path / "bank"))
    assert bank.split("train").group.attrs["words_cut"] == 3
    assert bank.attrs["skipped"] == {"id": "a class a row"}
