"""int8 banks end to end: what extraction stores, what heads read, what goes wrong."""

import json
import random

import numpy as np
import pytest
import tiny
import torch
from banks import channels_of, files_of
from encoders import SENTENCES, tiny_encoder
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cache import CacheError, Calibration, Kind, Writer, open_bank
from cache.calibration import from_ranges
from pipeline import batches
from pipeline.arrays import channel_range, to_float, to_torch
from pipeline.corpus import load_corpus
from pipeline.encoder import Encoder
from pipeline.extract import extract
from pipeline.feed import Resident, Streamed
from pipeline.head import build_head, plan_head
from pipeline.quantise import quantise

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of so few tokens that a small corpus has many."""
    monkeypatch.setattr("pipeline.extract.block_tokens_for", lambda _, max_length: max(64, max_length))


@pytest.fixture(scope="module")
def encoder():
    return Encoder(tiny_encoder("bert"), device="cpu", words=True)


@pytest.fixture
def corpus(tmp_path):
    """40 rows of words to learn from and 12 to choose by."""
    draw = random.Random(4)
    pool = [word for sentence in SENTENCES for word in sentence.split()]
    for name, n in (("train", 40), ("dev", 12)):
        rows = [{"tokens": draw.choices(pool, k=draw.randrange(12)), "y": i % 2} for i in range(n)]
        (tmp_path / "data").mkdir(exist_ok=True)
        lines = "\n".join(json.dumps(row) for row in rows)
        (tmp_path / "data" / f"{name}.jsonl").write_text(lines + "\n", "utf-8")
    return load_corpus(str(tmp_path / "data"))


@given(
    states=arrays.arrays(np.float32, (2, 7, 3), elements=st.floats(-1e3, 1e3, width=32)),
    scale=arrays.arrays(np.float32, (2, 2, 3), elements=st.floats(0.015625, 10, width=32)),
    shift=arrays.arrays(np.float32, (2, 2, 3), elements=st.floats(-100, 100, width=32)),
    first=st.sets(st.integers(0, 6)),
)
def test_each_state_goes_to_the_nearest_step_in_range_of_its_group(states, scale, shift, first):
    out = torch.full(states.shape, 99, dtype=torch.int8)
    places = torch.tensor(sorted(first), dtype=torch.int64)
    found = quantise(*map(torch.from_numpy, (states, scale, shift)), places, out=out)

    made = Calibration(scale=scale, shift=shift)
    scale, shift = channels_of(made, np.isin(np.arange(7), sorted(first)))
    exact = (states.astype(np.float64) - shift) / scale
    off = np.abs(out.numpy() - np.clip(exact, -127, 127))
    assert (off <= 0.5 + 1e-3).all()
    assert (np.abs(out.numpy().astype(int)) <= 127).all()
    sure, possible = np.abs(exact) > 127.51, np.abs(exact) > 127.49
    assert (sure.sum((1, 2)) <= found.clipped.numpy()).all()
    assert (found.clipped.numpy() <= possible.sum((1, 2))).all()
    assert found.finite.all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_found(value):
    states = torch.zeros(3, 5, 4)
    states[1, 3, 2] = value
    found = quantise(
        states,
        torch.ones(2, 3, 4),
        torch.zeros(2, 3, 4),
        torch.tensor([0]),
        out=torch.zeros(3, 5, 4, dtype=torch.int8),
    )

    assert (~found.finite).nonzero().tolist() == [[1, 3]]


@pytest.mark.parametrize(("room", "enough"), [(64, False), (160, True)])
def test_a_bank_holds_the_float32_states_rounded_to_its_scale(
    tmp_path, corpus, encoder, monkeypatch, room, enough
):
    monkeypatch.setattr("pipeline.extract.block_tokens_for", lambda *_: room)
    for dtype in ("float32", "int8"):
        result = extract(corpus, encoder, str(tmp_path / dtype), dtype=dtype)
    plain, short = (open_bank(str(tmp_path / dtype)) for dtype in ("float32", "int8"))
    first = plain.split("train").numpy()[:, : plain.split("train").block_tokens]
    kinds = plain.split("train").kind[: first.shape[1]]
    opens = np.isin(np.arange(len(kinds)), plain.split("train").start)
    assert bool(opens.sum() >= 8) == enough
    own = ((kinds > 0) & ~opens, opens if enough else kinds > 0)
    found = [first[:, chosen] for chosen in own]
    made = from_ranges(
        np.stack([part.min(1) for part in found]),
        np.stack([part.max(1) for part in found]),
        np.array([part.shape[1] for part in found]),
    )
    for name in ("train", "dev"):
        one, two = plain.split(name), short.split(name)
        np.testing.assert_array_equal(two.scale, made.scale)
        np.testing.assert_array_equal(two.shift, made.shift)
        used = one.kind > 0
        scale, shift = channels_of(made, np.isin(np.flatnonzero(used), one.start))
        steps = np.rint((one.numpy()[:, used] - shift) * (1 / scale))
        stored = two.take(np.flatnonzero(used))
        np.testing.assert_array_equal(stored, np.clip(steps, -127, 127).astype(np.int8))
        share = (np.abs(steps) > 127).mean()
        assert result.splits[name]["clipped_frac"] == two.clipped_frac == pytest.approx(share)
        np.testing.assert_array_equal(two.input_ids, one.input_ids)
        assert not np.concatenate([chunk for _, chunks in two.blocks() for chunk in chunks])[
            np.tile(~used.reshape(two.n_blocks, 1, -1), (1, 3, 1)).reshape(-1)
        ].any(), "fill is not zero"
    assert short.fingerprint != plain.fingerprint
    assert short.n_bytes < 0.6 * plain.n_bytes, "more small files than states in so small a bank"


@pytest.mark.parametrize(
    ("when", "codec"),
    [
        ("before the calibration", "none"),
        ("after it", "none"),
        ("among the blocks", "none"),
        ("among the blocks", "zstd"),
    ],
)
def test_a_run_that_was_cut_off_ends_with_the_same_bank(
    tmp_path, corpus, encoder, monkeypatch, when, codec
):
    class Killed(BaseException):
        pass

    extract(corpus, encoder, str(tmp_path / "whole"), dtype="int8", codec=codec)
    path, written = str(tmp_path / "cut"), []
    with monkeypatch.context() as patch:
        real = Writer.write_block

        def write_block(self, split, block, *rest):
            # Out of order, so that the block that calibrates is there when the others are made.
            if when == "among the blocks" and len(written) < 3:
                written.append(block)
                return real(self, split, block, *rest)
            raise Killed

        def die(*_):
            raise Killed

        patch.setattr(Writer, "write_block", write_block)
        if when == "before the calibration":
            patch.setattr(Writer, "calibrate", die)
        with pytest.raises(Killed):
            extract(corpus, encoder, path, dtype="int8", codec=codec)
    assert len(written) == (3 if when == "among the blocks" else 0)
    result = extract(corpus, encoder, path, dtype="int8", codec=codec)

    assert result.blocks_encoded == result.blocks - len(written)
    assert files_of(path) == files_of(tmp_path / "whole")


def test_a_scale_lost_everywhere_comes_back_without_a_block_written(tmp_path, corpus, encoder):
    extract(corpus, encoder, str(tmp_path / "b"), dtype="int8")
    whole = files_of(tmp_path / "b")
    for split in ("train", "dev"):
        (tmp_path / "b" / split / "scale/c/0/0/0").unlink()
    with pytest.raises(CacheError, match=r"scale is damaged .* run the same 'layerbank extract' again"):
        open_bank(str(tmp_path / "b")).split("train").numpy()

    assert extract(corpus, encoder, str(tmp_path / "b"), dtype="int8").blocks_encoded == 0
    assert files_of(tmp_path / "b") == whole


@pytest.mark.parametrize("calibrates", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_states_that_are_not_finite_stop_the_run(tmp_path, corpus, encoder, monkeypatch, calibrates, value):
    real, place = Encoder.encode, {}

    def encode(self, tokens, examples, **how):
        real(self, tokens, examples, **how)
        first = 0 not in place
        place[0] = True
        if first is calibrates:
            how["out"][2, 3, 5] = value

    monkeypatch.setattr(Encoder, "encode", encode)
    with pytest.raises(CacheError) as caught:
        extract(corpus, encoder, str(tmp_path / "b"), dtype="int8")
    message = str(caught.value)
    assert "layer 2 has a state that is NaN, infinite or too large for int8" in message
    assert "token 3, source row" in message
    assert message.endswith("use another encoder")
    assert f"split train, block {0 if calibrates else 1}" in message


def test_a_split_beyond_the_calibrated_range_is_counted(tmp_path, corpus, encoder, monkeypatch):
    real = Encoder.encode

    def encode(self, tokens, examples, **how):
        real(self, tokens, examples, **how)
        if len(tokens.length) == 12:  # the rows of dev
            how["out"].mul_(3)

    monkeypatch.setattr(Encoder, "encode", encode)
    result = extract(corpus, encoder, str(tmp_path / "b"), dtype="int8")

    assert result.splits["dev"]["clipped_frac"] > 0.1 > result.splits["train"]["clipped_frac"]


def test_rows_without_any_token_make_an_int8_bank(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text('{"text": ""}\n{"text": ""}\n')
    plain = Encoder(tiny_encoder("gpt2"), device="cpu")
    extract(load_corpus(str(tmp_path / "data")), plain, str(tmp_path / "b"), dtype="int8")
    split = open_bank(str(tmp_path / "b")).split("train")

    assert (split.n_tokens, split.clipped_frac) == (0, 0.0)
    assert np.isfinite(split.numpy()).all()


@pytest.mark.parametrize("memory_bytes", [2**30, 0], ids=["resident", "streamed"])
@pytest.mark.parametrize(
    ("dtype", "steps", "share"), [(torch.float32, 0.51, 0), (torch.bfloat16, 0.51, 2**-8)]
)
def test_heads_read_an_int8_bank_as_numbers(memory_bytes, dtype, steps, share):
    bank = tiny.shared(dtype="int8", layers=(0, 2, 3))
    part = bank.split("dev")
    target = part.target("tags")
    spec = plan_head(
        fusion="attention", decoder=None, target=target, kept=bank.recipe.layers, last=3, width=8
    )
    feeds = batches.Feeds(memory_bytes=memory_bytes)
    data = batches.load(part, build_head(spec, seed=0), spec.layers, target, feeds)
    assert isinstance(data.feed, Resident if memory_bytes else Streamed)
    order = data.feed.order(seed=0, epoch=1)
    for first, (inputs, _, _) in zip(
        range(0, 50, 8), data.batches(order, batch_size=8, dtype=dtype), strict=True
    ):
        assert inputs.states.dtype == dtype
        rows = [tiny.example("dev", int(part.row[i])) for i in order[first : first + 8]]
        exact = np.concatenate([row.states[:, row.kind == Kind.WORD] for row in rows], axis=1)[[0, 2, 3]]
        off = np.abs(inputs.states.float().numpy() - exact)
        assert (off <= steps * part.scale[0, :, None] + share * np.abs(exact)).all()


@pytest.mark.parametrize("memory_bytes", [2**30, 0], ids=["resident", "streamed"])
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_heads_read_first_tokens_by_their_own_scale(memory_bytes, pooling):
    part = tiny.shared(dtype="int8", layers=(0, 2, 3)).split("dev")
    target = part.target("label")
    spec = plan_head(
        fusion="attention",
        decoder=None,
        target=target,
        kept=part.layers,
        last=3,
        width=8,
        options={"pooling": pooling},
    )
    feeds = batches.Feeds(memory_bytes=memory_bytes)
    data = batches.load(part, build_head(spec, seed=0), spec.layers, target, feeds)
    order = data.feed.order(seed=0, epoch=1)
    whole = part.numpy()
    for first, (inputs, _, _) in zip(range(0, 50, 8), data.batches(order, batch_size=8), strict=True):
        lengths = part.length if pooling == "mean" else np.ones_like(part.length)
        rows = [slice(part.start[i], part.start[i] + lengths[i]) for i in order[first : first + 8]]
        expected = np.concatenate([whole[:, row] for row in rows], axis=1)
        np.testing.assert_allclose(inputs.states.numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
def test_to_float_gives_the_numbers_of_the_reader(dtype):
    split = tiny.shared(dtype=dtype).split("dev")
    layers, everything = [3, 1], np.arange(30)
    opens = split.start[split.start < 30]
    for position in (everything, opens, np.setdiff1d(everything, opens)):
        stored, first = to_torch(split.take(position, layers)), np.isin(position, opens)
        floats = to_float(stored, channel_range(split, layers, CPU), first, torch.float32)

        assert floats.dtype == torch.float32
        if first.all() or not first.any():
            only = channel_range(split, layers, CPU, group=int(first.any()))
            assert torch.equal(to_float(stored, only, None, torch.float32), floats)
        expected = split.numpy(layers)[:, position].astype(np.float32)
        np.testing.assert_allclose(floats.numpy(), expected, rtol=0, atol=1e-6 if dtype == "int8" else 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_gpu_quantises_as_a_cpu_does():
    random = torch.Generator().manual_seed(0)
    states = torch.randn(3, 500, 16, generator=random)
    scale, shift = torch.full((2, 3, 16), 2.5 / 127), torch.full((2, 3, 16), 0.1)
    first = torch.arange(0, 500, 20)
    outs, counts = [], []
    for device in ("cpu", "cuda"):
        out = torch.zeros(states.shape, dtype=torch.int8, device=device)
        found = quantise(*(part.to(device) for part in (states, scale, shift, first)), out=out)
        outs.append(out.cpu())
        counts.append(found.clipped.cpu())

    assert torch.equal(*outs)
    assert torch.equal(*counts)
