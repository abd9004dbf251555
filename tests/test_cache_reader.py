import pickle
import resource
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import tensorstore
import zarr
from banks import (
    DEV,
    RECIPE,
    TRAIN,
    calibration_of,
    copy_to,
    damage,
    files_of,
    make,
    numbers_of,
    recipe,
    rows,
    states_of,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec

from cache import CacheError, CorruptChunk, open_bank, store
from cache.codecs import DTYPES

KINDS = [(dtype, codec) for dtype in DTYPES for codec in ("none", "lz4", "zstd")]
LENGTHS = {"train": TRAIN, "dev": DEV}


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def bank(request, tmp_path_factory):
    dtype, codec = request.param
    return make(tmp_path_factory.mktemp("bank") / "bank", dtype=dtype, codec=codec)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make(tmp_path_factory.mktemp("plain") / "bank")


def bits(states):
    """The bits of an array, so that comparing knows no tolerance."""
    return np.ascontiguousarray(states).view(np.uint8)


def expected(split, *, fill=True):
    """The states of a split put together from those of its rows, without a reader."""
    whole = np.zeros((len(split.layers), split.n_blocks * split.block_tokens, split.width), split.dtype)
    for row, start, length in zip(split.row, split.start, split.length, strict=True):
        whole[:, start : start + length] = states_of(split.recipe, split.name, row, length)
    return whole


def numbers(split, states):
    """States put together by `expected`, as numbers."""
    if split.dtype != np.int8:
        return states
    return numbers_of(states, calibration_of(split.recipe), firsts(split))


def firsts(split):
    """Which tokens are the first of an example."""
    return np.isin(np.arange(split.n_blocks * split.block_tokens), split.start[split.length > 0])


def test_every_way_to_read_gives_the_states_that_were_written(bank):
    split = bank.split("train")
    whole = expected(split)
    everything = np.arange(whole.shape[1])
    streamed = np.concatenate([np.stack(chunks) for _, chunks in split.blocks()], axis=1)

    assert whole.any()
    assert np.array_equal(bits(streamed), bits(whole)), "blocks"
    assert np.array_equal(bits(split.take(everything)), bits(whole)), "take"
    assert np.array_equal(bits(split.numpy()), bits(numbers(split, whole))), "numpy"
    assert np.array_equal(bits(split.dask().compute(scheduler="sync")), bits(numbers(split, whole))), "dask"
    assert np.array_equal(bits(split.to_float(whole, everything)), bits(numbers(split, whole))), "to_float"
    assert streamed.dtype == split.dtype == DTYPES[bank.recipe.dtype]
    assert split.numpy().dtype == split.dask().dtype == numbers(split, whole).dtype


def test_states_of_some_layers_of_int8_become_numbers_by_their_own_scale(tmp_path):
    split = make(tmp_path / "bank", dtype="int8", layers=(0, 2, 3)).split("train")
    whole = numbers(split, expected(split))

    assert np.array_equal(split.numpy([3, 2]), whole[[2, 1]])
    assert np.array_equal(split.dask([3]).compute(scheduler="sync"), whole[[2]])
    some = np.array([39, 0, 17, 5, 16, 30])
    assert firsts(split)[some].any()
    assert not firsts(split)[some].all()
    assert np.array_equal(split.to_float(split.take(some, [2, 0]), some, [2, 0]), whole[[1, 0]][:, some])
    assert (split.scale.shape, split.shift.shape) == ((2, 3, 8), (2, 3, 8))
    assert make(tmp_path / "other").split("train").scale is None


def test_splits_are_kept_apart(bank):
    split = bank.split("dev")

    assert expected(split).any()
    assert np.array_equal(bits(split.numpy()), bits(numbers(split, expected(split))))


def test_blocks_come_in_order(plain):
    assert [block for block, _ in plain.split("train").blocks()] == list(
        range(plain.split("train").n_blocks)
    )


def test_gather_gives_the_states_of_each_example(bank):
    split = bank.split("train")
    chosen = np.random.default_rng(0).permutation(split.n_examples)
    states, lengths = split.gather(chosen)

    parts = [states_of(bank.recipe, "train", split.row[i], split.length[i]) for i in chosen]
    assert lengths.tolist() == [part.shape[1] for part in parts]
    assert np.array_equal(bits(states), bits(np.concatenate(parts, axis=1)))


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_gather_and_take_agree_with_slices_for_any_choice(plain, data):
    split = plain.split("train")
    whole = expected(split)
    layers = data.draw(st.none() | st.lists(st.sampled_from(split.layers), max_size=5))
    chosen = data.draw(st.lists(st.integers(0, split.n_examples - 1), max_size=30))
    tokens = np.array(data.draw(st.lists(st.integers(0, whole.shape[1] - 1), max_size=30)), dtype=np.int64)
    picked = whole if layers is None else whole[layers]

    slices = [picked[:, split.start[i] : split.start[i] + split.length[i]] for i in chosen]
    gathered = np.concatenate([picked[:, :0], *slices], axis=1)
    assert np.array_equal(split.gather(chosen, layers)[0], gathered)
    assert np.array_equal(split.take(tokens, layers), picked[:, tokens])


@pytest.mark.parametrize("layers", [[2], [3, 0], [1, 1], []], ids=str)
def test_a_choice_of_layers_is_the_same_in_every_way_to_read(plain, layers):
    split = plain.split("train")
    whole = expected(split)[layers]
    streamed = [np.stack(chunks) for _, chunks in split.blocks(layers) if chunks]

    assert np.array_equal(bits(split.numpy(layers)), bits(whole)), "numpy"
    assert np.array_equal(bits(split.dask(layers).compute(scheduler="sync")), bits(whole)), "dask"
    assert np.array_equal(bits(split.take(np.arange(whole.shape[1]), layers)), bits(whole)), "take"
    if streamed:
        assert np.array_equal(bits(np.concatenate(streamed, axis=1)), bits(whole)), "blocks"


def test_a_bank_of_some_layers_is_read_by_their_numbers(tmp_path):
    split = make(tmp_path / "bank", layers=(0, 2, 3)).split("train")

    assert split.layers == (0, 2, 3)
    assert np.array_equal(split.numpy(), expected(split))
    assert np.array_equal(split.numpy([3, 2]), expected(split)[[2, 1]])
    assert np.array_equal(split.chunk(1, 0), expected(split)[1, : split.block_tokens])


@pytest.mark.parametrize("read", ["numpy", "dask", "take", "gather", "blocks"])
@pytest.mark.parametrize("layer", [1, 4, -1])
def test_a_layer_that_is_not_kept_is_named(tmp_path_factory, read, layer):
    path = tmp_path_factory.getbasetemp() / "some-layers"
    if not path.exists():
        make(path, layers=(0, 2, 3))
    split = open_bank(str(path)).split("train")
    calls = {
        "numpy": lambda: split.numpy([0, layer]),
        "dask": lambda: split.dask([0, layer]),
        "take": lambda: split.take(np.arange(2), [0, layer]),
        "gather": lambda: split.gather([0], [0, layer]),
        "blocks": lambda: next(split.blocks([0, layer])),
    }

    with pytest.raises(CacheError, match=rf"layer {layer} is not in the bank, which keeps layers 0, 2, 3"):
        calls[read]()


def test_small_arrays_speak_of_the_examples_in_dealt_order(bank):
    split, source = bank.split("train"), rows(TRAIN)

    assert split.n_examples == len(TRAIN)
    assert split.n_tokens == sum(TRAIN)
    assert sorted(split.row) == list(range(len(TRAIN)))
    assert np.array_equal(split.length, source.length[split.row])
    assert np.array_equal(split.n_words, source.n_words[split.row])
    assert np.array_equal(split.text_hash, source.text_hash[split.row])
    for row, start, length in zip(split.row, split.start, split.length, strict=True):
        here = slice(start, start + length)
        assert split.input_ids[here].tolist() == [1000 * row + k for k in range(length)]
        assert split.word_id[here].tolist() == list(range(length))
        assert (split.kind[here] == 2).all()
    assert (split.kind != 0).sum() == sum(TRAIN), "fill is not marked as fill"


def test_zarr_reads_the_bank_without_our_reader(bank):
    group = zarr.open_group(bank.path, mode="r")
    split = bank.split("train")

    assert np.array_equal(bits(group["train/states"][:]), bits(expected(split)))
    assert np.array_equal(group["train/start"][:], split.start)
    assert np.array_equal(group["train/input_ids"][:], split.input_ids)
    assert group["train/states"].metadata.dimension_names == ("layer", "token", "width")


def test_tensorstore_reads_the_bank(bank):
    def read(array):
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{bank.path}/train/{array}"}}
        return tensorstore.open(spec, read=True).result().read().result()

    split = bank.split("train")
    assert read("states").dtype == split.dtype
    assert np.array_equal(bits(read("states")), bits(expected(split)))
    assert np.array_equal(read("word_id"), split.word_id)
    assert np.array_equal(read("text_hash"), split.text_hash)
    if bank.recipe.dtype == "int8":
        made = calibration_of(bank.recipe)
        assert np.array_equal(read("scale"), made.scale)
        assert np.array_equal(read("shift"), made.shift)
        assert read("clipped").sum(1).all(), "the bank was made so that every block has some"


@pytest.mark.parametrize("dtype", DTYPES)
def test_raw_chunks_are_byte_for_byte_those_that_zarr_writes(tmp_path, dtype):
    split = make(tmp_path / "bank", dtype=dtype).split("train")
    other = zarr.create_group(str(tmp_path / "other"))
    for name in ("states", "input_ids", "word_id", "kind"):
        ours = split.group[name]
        theirs = other.create_array(
            name, shape=ours.shape, chunks=ours.chunks, dtype=ours.dtype, compressors=[Crc32cCodec()]
        )
        theirs[:] = expected(split) if name == "states" else getattr(split, name)

        chunks = files_of(tmp_path / "other" / name / "c")
        assert files_of(tmp_path / "bank" / "train" / name / "c") == chunks, name
        assert len(chunks) == split.n_blocks * (len(split.layers) if name == "states" else 1)


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_a_bank_behind_a_url_is_read_through_zarr(tmp_path, codec):
    copy_to(tmp_path / "bank", codec)
    split = open_bank(f"file://{tmp_path / 'bank'}").split("train")

    assert np.array_equal(split.numpy(), expected(split))
    (tmp_path / "bank/train/states/c/2/1/0").unlink()
    with pytest.raises(CorruptChunk, match="split train, layer 2, block 1 is damaged"):
        open_bank(f"file://{tmp_path / 'bank'}").split("train").numpy()


def test_dask_has_one_lazy_chunk_for_each_stored_one(tmp_path):
    bank = copy_to(tmp_path / "bank")
    split = bank.split("train")
    lazy = split.dask()

    assert lazy.shape == split.group["states"].shape
    assert lazy.chunks == ((1,) * 4, (16,) * split.n_blocks, (8,))
    damage(tmp_path / "bank/train/states/c/1/1/0")
    fresh = open_bank(bank.path).split("train").dask()
    assert np.array_equal(fresh[0].compute(scheduler="sync"), expected(split)[0]), (
        "read more than it had to"
    )
    with pytest.raises(CorruptChunk, match="layer 1, block 1"):
        fresh[1].compute(scheduler="sync")


@pytest.mark.parametrize("codec", ["none", "lz4"])
def test_a_split_travels_to_another_process(tmp_path, codec):
    split = copy_to(tmp_path / "bank", codec).split("train")
    split.numpy()
    copy = pickle.loads(pickle.dumps(split))

    assert np.array_equal(bits(copy.numpy()), bits(expected(split)))
    assert len(pickle.dumps(split)) < 50_000, "the states travel with it"


@pytest.mark.parametrize("codec", ["none", "lz4"])
@pytest.mark.parametrize("lengths", [[], [0, 0, 0]], ids=["no rows", "no tokens"])
def test_a_split_without_tokens_reads_in_every_way(tmp_path, codec, lengths):
    split = make(tmp_path / "bank", {"train": rows(lengths)}, codec=codec).split("train")
    room = len(split.kind)

    assert (split.n_examples, split.n_tokens) == (len(lengths), 0)
    assert split.numpy().shape == split.dask().compute(scheduler="sync").shape == (4, room, 8)
    assert len(list(split.blocks())) == split.n_blocks
    states, counts = split.gather(np.arange(len(lengths)))
    assert states.shape == (4, 0, 8)
    assert counts.tolist() == lengths
    assert split.take(np.array([], dtype=np.int64)).shape == (4, 0, 8)


def test_writing_into_a_mapped_chunk_leaves_the_file_as_it_is(tmp_path):
    bank = copy_to(tmp_path / "bank")
    before = files_of(tmp_path)
    chunk = bank.split("train").chunk(0, 0)

    assert chunk.flags.writeable, "torch takes writable memory only"
    chunk[:] = 7
    del chunk
    assert files_of(tmp_path) == before


def test_what_is_read_is_a_copy_where_it_says_so(plain):
    split = plain.split("train")
    split.numpy()[:] = 7
    split.take(np.arange(3))[:] = 7
    split.gather([0, 1])[0][:] = 7

    assert np.array_equal(split.numpy(), expected(split))


def test_a_chunk_is_checked_once_however_often_it_is_mapped(tmp_path, monkeypatch):
    bank = copy_to(tmp_path / "bank")
    checked = []
    fits = store.checksum_fits
    monkeypatch.setattr(store, "mappable_files", lambda: 2)
    monkeypatch.setattr(store, "checksum_fits", lambda stored: checked.append(1) or fits(stored))
    split = bank.split("train")
    for _ in range(3):
        assert np.array_equal(split.gather(range(len(TRAIN)))[0].shape, (4, sum(TRAIN), 8))

    assert len(checked) == 4 * split.n_blocks
    assert split._chunks.cache_info().currsize == 2


def test_damage_after_the_first_touch_is_left_to_verify(tmp_path):
    split = copy_to(tmp_path / "bank").split("train")
    split.chunk(0, 0)
    damage(tmp_path / "bank/train/states/c/0/0/0")

    split.chunk(0, 0)
    assert [str(error)[:29] for error in split.damaged_states(0)] == ["split train, layer 0, block 0"]


def test_a_bank_of_more_chunks_than_file_descriptors_is_read(tmp_path):
    lengths = {"train": rows([16] * 40)}
    bank = make(tmp_path / "bank", lengths)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
        split = bank.split("train")
        chunks = [chunk for _, block in split.blocks() for chunk in block]
        assert len(chunks) == 160
        assert np.array_equal(np.concatenate(chunks[::4]), expected(split)[0])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("soft", [100, 1024])
def test_a_hard_limit_of_descriptors_bounds_the_maps(monkeypatch, soft):
    monkeypatch.setattr(store.sys, "version_info", (3, 12))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, soft))
    monkeypatch.setattr(resource, "setrlimit", lambda *asked: pytest.fail(f"asked for {asked}"))

    assert store.mappable_files() == soft // 4


def test_a_decoded_bank_larger_than_its_memory_is_not_kept_whole(tmp_path, monkeypatch):
    bank = copy_to(tmp_path / "bank", "zstd")
    monkeypatch.setattr("cache.chunks._DECODED_BYTES", 6 * 16 * 8 * 2)
    split = bank.split("train")
    for _ in split.blocks():
        assert split._chunks.cache_info().currsize <= 6
    fresh = bank.split("train")
    fresh.numpy()
    assert fresh._chunks.cache_info().currsize == 0, "kept twice in memory"


DAMAGES = {
    "a flipped bit": damage,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "a byte too many": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "empty": lambda path: path.write_bytes(b""),
    "two bytes": lambda path: path.write_bytes(b"ab"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("codec", ["none", "lz4"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_chunk_names_split_layer_and_block(tmp_path, codec, kind):
    bank = copy_to(tmp_path / "bank", codec)
    DAMAGES[kind](tmp_path / "bank/dev/states/c/2/0/0")
    reads = {
        "numpy": lambda split: split.numpy(),
        "take": lambda split: split.take(np.array([0])),
        "gather": lambda split: split.gather(range(len(DEV))),
        "blocks": lambda split: list(split.blocks()),
        "dask": lambda split: split.dask().compute(scheduler="sync"),
    }

    for read in reads.values():
        with pytest.raises(CorruptChunk, match="split dev, layer 2, block 0 is damaged") as caught:
            read(bank.split("dev"))
        assert "layerbank extract" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert bank.split("dev").numpy([0, 3]).shape[0] == 2, "layers that are whole must still be read"
    assert np.array_equal(bank.split("train").numpy(), expected(bank.split("train")))


@pytest.mark.parametrize("codec", ["none", "lz4"])
@pytest.mark.parametrize("kind", ["a flipped bit", "empty", "gone"])
@pytest.mark.parametrize("array", ["start", "input_ids"])
def test_a_damaged_small_array_gives_one_line(tmp_path, codec, kind, array):
    last = "c/2" if array == "input_ids" else "c/0"
    bank = copy_to(tmp_path / "bank", codec)
    DAMAGES[kind](tmp_path / "bank/train" / array / last)
    with pytest.raises(CacheError, match=rf"train[/, ]+{array}.* is damaged") as caught:
        getattr(bank.split("train"), array)
    assert "\n" not in str(caught.value)
    assert "layerbank extract" in str(caught.value)
    if last == "c/2":
        assert "block 2" in str(caught.value)


def test_a_chunk_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    split = copy_to(tmp_path / "bank").split("train")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(store, "map_file", refuse)
    with pytest.raises(CacheError, match=r"cannot read .*Permission denied") as caught:
        split.numpy()
    assert not isinstance(caught.value, CorruptChunk)


def test_splits_are_listed_in_their_usual_order(tmp_path):
    names = ("zulu", "test", "dev", "train")
    bank = make(tmp_path / "bank", {name: rows([2], name) for name in names})

    assert bank.splits == ["train", "dev", "test", "zulu"]
    with pytest.raises(CacheError, match="has no split 'validation', it has: train, dev, test, zulu"):
        bank.split("validation")


def test_recipe_survives_the_round_trip(bank):
    assert bank.recipe == recipe(dtype=bank.recipe.dtype, codec=bank.recipe.codec)
    assert bank.recipe.columns == RECIPE.columns


def test_bytes_of_a_bank_are_those_of_its_files(tmp_path):
    bank = copy_to(tmp_path / "bank")

    assert bank.n_bytes == sum(map(len, files_of(tmp_path / "bank").values()))


def test_a_wide_bank_keeps_each_block_apart(tmp_path):
    encoder = replace(RECIPE.encoder, width=33, n_layers=2)
    bank = make(tmp_path / "bank", encoder=encoder, layers=(0, 1), dtype="bfloat16")
    split = bank.split("train")

    for block, chunks in split.blocks():
        here = slice(block * split.block_tokens, (block + 1) * split.block_tokens)
        assert np.array_equal(bits(np.stack(chunks)), bits(expected(split)[:, here]))
    assert all(a.start <= b.start for a, b in pairwise([slice(s, s) for s in split.start]))
