"""Scale and shift of int8 banks: what they are, and what kills and damage make of them."""

import re
import shutil

import numpy as np
import pytest
import zarr
from banks import (
    block_of,
    calibration_of,
    clipped_of,
    complete,
    copy_to,
    damage,
    files_of,
    make,
    recipe,
    rows,
    splits,
    write,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cache import BankIncomplete, CacheError, Calibration, Kind, Writer, open_bank
from cache.calibration import calibration_split, first_tokens, from_ranges
from cache.plan import deal
from cache.verify import verify

INT8 = recipe(dtype="int8")


def ranges_of(states, n_tokens=100):
    """The calibration of states of two groups: group layer token width."""
    counts = np.full(2, n_tokens) if np.isscalar(n_tokens) else np.array(n_tokens)
    return from_ranges(states.min(2), states.max(2), counts)


@given(
    states=arrays.arrays(np.float32, (2, 2, 9, 5), elements=st.floats(-1e4, 1e4, width=32)),
    offset=st.floats(-100, 100, width=32),
)
def test_what_calibrated_is_in_range_with_some_to_spare(states, offset):
    # In 64ths: below the smallest normal number a range is given up.
    states = np.round(64 * (states + np.float32(offset))) / np.float32(64)
    made = ranges_of(states)
    steps = (states.astype(np.float64) - made.shift[:, :, None]) / made.scale[:, :, None]
    largest = np.abs(states).max(2)
    moves = states.max(2) - states.min(2) > 0.02 * np.maximum(
        largest, np.median(largest, axis=-1, keepdims=True)
    )

    assert (np.isfinite(made.scale) & (made.scale > 0)).all()
    assert np.abs(steps).max() <= 127 / 2 * 1.01
    np.testing.assert_allclose(np.abs(steps).max(2)[moves], 127 / 2, rtol=1e-3)


def test_the_fewer_tokens_were_seen_the_wider_is_the_range_around_them():
    random = np.random.default_rng(0)
    states = random.standard_normal((2, 1, 4000, 16)).astype(np.float32)
    for n, spare in ((4000, 1.158), (100, 2), (16, 3.5)):
        seen = np.ptp(states[:, :, :n], axis=2)
        np.testing.assert_allclose(
            254 * ranges_of(states[:, :, :n], n).scale, spare * seen, rtol=1e-3, err_msg=str(n)
        )
        beyond = np.abs(states - ranges_of(states[:, :, :n], n).shift[:, :, None]) > (
            127 * ranges_of(states[:, :, :n], n).scale[:, :, None]
        )
        assert beyond.mean() < 1e-3


def test_a_channel_that_stands_still_is_given_room_for_rounding():
    states = (
        np.full((2, 1, 6, 4), 0.3, np.float32) + np.float32(1e-6) * np.arange(6, dtype=np.float32)[:, None]
    )
    made = ranges_of(states)

    assert (np.abs(states * (1 + 1e-4) - made.shift[:, :, None]) < 127 * made.scale[:, :, None]).all()
    assert (made.scale < 1e-4).all()


def test_one_huge_channel_takes_no_precision_from_the_others():
    random = np.random.default_rng(0)
    states = random.standard_normal((2, 1, 500, 64)).astype(np.float32)
    plain = ranges_of(states).scale
    states[..., 7] *= 3000
    huge = ranges_of(states).scale

    assert (huge[..., 7] > 1000 * plain[..., 7]).all()
    assert np.array_equal(np.delete(huge, 7, -1), np.delete(plain, 7, -1))


@pytest.mark.parametrize("keep", ["all", "words", "first", "masked"])
def test_first_tokens_are_those_of_examples_and_of_options(keep):
    kind = np.array([Kind.SPECIAL, Kind.WORD, Kind.OPTION, Kind.WORD, Kind.OPTION, Kind.SPECIAL], np.uint8)
    found = first_tokens(keep, kind, np.array([0, 2]))

    assert np.flatnonzero(found).tolist() == ([2, 4] if keep == "masked" else [0, 2, 4])


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ({"test": [3], "dev": [3], "train": [3]}, "train"),
        ({"test": [3], "dev": [3], "train": [0, 0]}, "dev"),
        ({"zeta": [3], "alpha": [3], "train": []}, "alpha"),
        ({"train": [], "dev": [0]}, None),
    ],
)
def test_the_split_that_calibrates_depends_on_the_data_alone(lengths, expected):
    plans = {name: deal(np.array(n, np.int32), block_tokens=16, seed=0) for name, n in lengths.items()}
    backwards = dict(reversed(plans.items()))

    assert calibration_split(plans) == calibration_split(backwards) == expected


@pytest.fixture
def path(tmp_path):
    make(tmp_path / "bank", dtype="int8")
    return tmp_path / "bank"


def test_clipped_states_are_counted_once_however_often_a_block_is_written(path):
    with Writer(str(path), INT8, splits()) as writer:
        blocks = [(split, block) for split, plan in writer.plans.items() for block in range(plan.n_blocks)]
        counts = dict.fromkeys(writer.plans, 0)
        for split, block in blocks:
            counts[split] += int(clipped_of(writer, split, block).sum())
        write(writer, "train", 1)
        write(writer, "train", 1)

    bank = open_bank(str(path))
    for name, count in counts.items():
        split = bank.split(name)
        assert count > 0
        assert split.clipped_frac == count / (split.n_tokens * 4 * 8)


def test_a_block_cannot_be_written_before_the_calibration(tmp_path):
    with Writer(str(tmp_path / "bank"), INT8, splits()) as writer:
        assert writer.calibration is None
        block = (*block_of(writer, "train", 0), clipped_of(writer, "train", 0))
        with pytest.raises(AssertionError, match="before scale and shift"):
            writer.write_block("train", 0, *block)
        with pytest.raises(BankIncomplete):
            writer.finish()


def test_a_calibration_that_was_cut_off_is_made_again(tmp_path, path, monkeypatch):
    def die(*_, **__):
        raise KeyboardInterrupt

    other = tmp_path / "cut off"
    with Writer(str(other), INT8, splits()) as writer, monkeypatch.context() as patch:
        patch.setattr(zarr.Group, "update_attributes", die)
        with pytest.raises(KeyboardInterrupt):
            writer.calibrate(calibration_of(INT8))
    with Writer(str(other), INT8, splits()) as writer:
        assert writer.calibration is None, "half a calibration counts as one"
        complete(writer)

    assert files_of(other) == files_of(path)


@pytest.mark.parametrize("harm", ["flip", "gone"])
def test_a_split_that_lost_its_scale_gets_it_from_another(path, harm):
    whole = files_of(path)
    chunk = path / "train/scale/c/0/0/0"
    damage(chunk) if harm == "flip" else chunk.unlink()
    with pytest.raises(CacheError, match="train/scale is damaged"):
        _ = open_bank(str(path)).split("train").scale
    report = verify(open_bank(str(path)))
    assert [line for line in report.bad if "train/scale is damaged" in line] == report.bad
    assert not report.ok
    with Writer(str(path), INT8, splits()) as writer:
        assert writer.missing("train") == []
        assert writer.calibration.digest == calibration_of(INT8).digest

    assert files_of(path) == whole


def test_a_scale_lost_everywhere_is_made_again_but_never_another(path):
    whole = files_of(path)
    for split in ("train", "dev"):
        damage(path / split / "shift/c/0/0/0")
    with Writer(str(path), INT8, splits()) as writer:
        assert writer.calibration is None
        same = calibration_of(INT8)
        with pytest.raises(CacheError, match=r"damaged in every split, .* come out otherwise"):
            writer.calibrate(Calibration(scale=same.scale * 2, shift=same.shift))
        writer.calibrate(same)

    assert files_of(path) == whole


@pytest.mark.parametrize("harm", ["flip", "cut", "gone"])
def test_a_block_whose_counts_are_damaged_is_written_again(path, harm):
    whole = files_of(path)
    chunk = path / "train/clipped/c/1/0"
    if harm == "flip":
        damage(chunk)
    elif harm == "gone":
        chunk.unlink()
    else:
        chunk.write_bytes(chunk.read_bytes()[:-3])
    (line,) = verify(open_bank(str(path))).bad
    assert "split train, clipped, block 1 is damaged" in line
    with Writer(str(path), INT8, splits()) as writer:
        assert writer.missing("train") == [1]
        complete(writer)

    assert {k: v for k, v in files_of(path).items() if ".lock" not in k} == whole


def test_a_scale_of_another_bank_is_noticed(tmp_path, path):
    other = recipe(dtype="int8", encoder=INT8.encoder, layers=(1, 1, 1, 1))
    with Writer(str(tmp_path / "other"), INT8, {"train": rows([3])}) as writer:
        same = calibration_of(other)
        writer.calibrate(Calibration(scale=same.scale, shift=same.shift))
        complete(writer)
    shutil.copy(tmp_path / "other/train/scale/c/0/0/0", path / "train/scale/c/0/0/0")

    (line,) = verify(open_bank(str(path))).bad
    assert re.search("split train: scale and shift are not those of", line)


def test_a_bank_of_one_scale_for_all_tokens_is_refused(path):
    group = zarr.open_group(path / "train")
    group.create_array("scale", data=np.ones((4, 8), np.float32), overwrite=True)
    said = "train/scale is the same for all tokens.*extract again, into another --store"
    with pytest.raises(CacheError, match=said):
        open_bank(str(path)).split("train").numpy()
    with pytest.raises(CacheError, match=said), Writer(str(path), INT8, splits()):
        pass


def test_the_files_of_other_banks_stay_what_they_were(tmp_path):
    copy_to(tmp_path / "bank")

    assert not [name for name in files_of(tmp_path / "bank") if re.search("scale|shift|clipped", name)]
    assert open_bank(str(tmp_path / "bank")).split("train").clipped_frac is None
