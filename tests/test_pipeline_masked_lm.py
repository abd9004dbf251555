"""Masked language models on a bank: the drawing of masks, the encoder's own output layer, perplexity."""

import itertools
import json
import math
from dataclasses import replace

import disks
import numpy as np
import pytest
import torch
import transformers
from encoders import MASKED_LM, SENTENCES, WIDTH, tiny_encoder, tiny_masked_lm
from typer.testing import CliRunner

import cli
from cache import CacheError, Kind, open_bank
from cache.place import place
from cache.removal import remove
from cache.verify import verify
from pipeline.convert import convert
from pipeline.corpus import load_corpus
from pipeline.encoder import Encoder
from pipeline.errors import PipelineError
from pipeline.evaluate import evaluate, open_bank_of
from pipeline.experiments._base import Data, Lab, perform
from pipeline.extract import extract
from pipeline.grid import Grid
from pipeline.job import Schedule
from pipeline.label import label
from pipeline.masking import chunked, masked
from pipeline.output_layer import read_output_layer
from pipeline.predict import Predictor, open_predictor
from pipeline.results import load_run
from pipeline.run import train_run
from pipeline.runner import Plan, Runner
from pipeline.sweep import sweep

MAX_LENGTH = 20
LINES = [*SENTENCES, "", *reversed(SENTENCES)] * 3


def corpus(folder, **columns):
    folder.mkdir()
    for split, lines in (("train", LINES), ("dev", LINES[4:])):
        rows = "".join(json.dumps({"text": line, **columns}) + "\n" for line in lines)
        (folder / f"{split}.jsonl").write_text(rows, encoding="utf-8")
    return load_corpus(str(folder))


def bank(tmp_path, encoder, **options):
    found = corpus(tmp_path / "data")
    options = {"keep": "masked", "dtype": "float32", "max_length": MAX_LENGTH, "maskings": 2, **options}
    return extract(found, Encoder(encoder), str(tmp_path / "bank"), **options)


def draw(encoder, lines=LINES, *, split="dev", maskings=2, seed=0, max_length=MAX_LENGTH):
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    chunks = chunked(tokenizer, [(lines, None)], max_length=max_length)
    draws = {"mask_id": tokenizer.mask_token_id, "vocabulary": len(tokenizer), "maskings": maskings}
    return tokenizer, chunks, masked(chunks, **draws, seed=seed, split=split)


def rows_of(tokens, values):
    return [values[a:b].tolist() for a, b in itertools.pairwise(tokens.start)]


@pytest.mark.parametrize("family", ["bert", "roberta", "albert"])
@pytest.mark.parametrize("max_length", [20, 7, 10_000])
def test_chunks_are_the_running_text(family, max_length):
    tokenizer, chunks, _ = draw(tiny_encoder(family), max_length=max_length)
    running = [i for line in LINES for i in tokenizer(line, add_special_tokens=False)["input_ids"]]
    before, after = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    expected = [
        before + running[k : k + max_length - 2] + after for k in range(0, len(running), max_length - 2)
    ]
    assert rows_of(chunks, chunks.input_ids) == expected
    for kind, word in zip(rows_of(chunks, chunks.kind), rows_of(chunks, chunks.word_id), strict=True):
        assert kind[0] == kind[-1] == Kind.SPECIAL
        assert set(kind[1:-1]) <= {Kind.WORD, Kind.CONTINUATION}
        assert word[0] == word[-1] == -1
        assert word[1:-1] == (np.cumsum(np.array(kind[1:-1]) == Kind.WORD) - 1).tolist()


def test_masks_are_drawn_as_bert_draws_them():
    lines = LINES * 30
    tokenizer, chunks, text = draw(tiny_encoder("bert"), lines, maskings=3)
    predicted, tokens = text.tokens.predicted, text.tokens
    inner = tokens.kind != Kind.SPECIAL
    assert not predicted[~inner].any()
    n = predicted.sum()
    assert n / inner.sum() == pytest.approx(0.15, abs=4 * math.sqrt(0.15 * 0.85 / inner.sum()))
    changed = tokens.input_ids != text.true_ids
    assert not changed[~predicted].any()
    at_mask = (tokens.input_ids == tokenizer.mask_token_id)[predicted]
    kept = ~changed[predicted]
    spread = 4 * math.sqrt(0.2 * 0.8 / n)
    assert at_mask.mean() == pytest.approx(0.8 + 0.1 / len(tokenizer), abs=spread)
    assert kept.mean() == pytest.approx(0.1 + 0.1 / len(tokenizer), abs=spread)
    assert np.array_equal(text.true_ids, np.tile(chunks.input_ids, 3))
    per_masking = np.split(predicted, 3)
    assert not np.array_equal(per_masking[0], per_masking[1])
    again = draw(tiny_encoder("bert"), lines, maskings=3)[2]
    assert np.array_equal(again.tokens.input_ids, tokens.input_ids)
    for change in ({"seed": 1}, {"split": "train"}):
        other = draw(tiny_encoder("bert"), lines, maskings=3, **change)[2]
        assert not np.array_equal(other.tokens.predicted, predicted)


def reference_perplexity(encoder, text):
    """That of `transformers`' own model on the same masked inputs."""
    model = transformers.AutoModelForMaskedLM.from_pretrained(encoder).eval()
    losses = []
    with torch.inference_mode():
        rows = (
            rows_of(text.tokens, v) for v in (text.tokens.input_ids, text.true_ids, text.tokens.predicted)
        )
        for seen, true, predicted in zip(*rows, strict=True):
            logits = model(input_ids=torch.tensor([seen])).logits[0]
            losses += torch.nn.functional.cross_entropy(
                logits[predicted], torch.tensor(true)[predicted], reduction="none"
            ).tolist()
    return math.exp(np.mean(losses))


@pytest.mark.parametrize("family", MASKED_LM)
def test_perplexity_of_the_untouched_encoder_is_that_of_transformers(tmp_path, family):
    encoder = tiny_masked_lm(family)
    result = bank(tmp_path, encoder)
    text = draw(encoder, LINES[4:])[2]
    assert result.splits["dev"]["tokens"] == text.tokens.predicted.sum()
    assert result.splits["dev"]["examples"] == len(text.tokens.length)
    run = str(tmp_path / "run")
    trained = train_run(
        result.store, target="token", out=run, fusion="last_layer", schedule=Schedule(epochs=1)
    )
    assert (trained["parameters"], trained["decoder"], trained["metric"]) == (0, "masked_lm", "perplexity")
    expected = reference_perplexity(encoder, text)
    assert trained["dev"] == pytest.approx(expected, rel=1e-4)
    loaded = load_run(run)
    assert evaluate(loaded, open_bank_of(loaded), "dev")["score"] == pytest.approx(expected, rel=1e-4)


def test_half_precision_keeps_the_perplexity(tmp_path):
    encoder = tiny_masked_lm("bert")
    result = bank(tmp_path, encoder, dtype="float16")
    trained = train_run(
        result.store,
        target="token",
        out=str(tmp_path / "run"),
        fusion="last_layer",
        schedule=Schedule(epochs=1),
    )
    expected = reference_perplexity(encoder, draw(encoder, LINES[4:])[2])
    assert trained["dev"] == pytest.approx(expected, rel=1e-3)


@pytest.fixture(scope="module")
def bert_bank(tmp_path_factory):
    return bank(tmp_path_factory.mktemp("bert"), tiny_masked_lm("bert")).store


def test_a_bank_keeps_the_predicted_positions_with_their_tokens(bert_bank):
    opened = open_bank(bert_bank)
    split = opened.split("dev")
    text = draw(tiny_masked_lm("bert"), LINES[4:])[2]
    rows = [rows_of(text.tokens, v) for v in (text.tokens.input_ids, text.true_ids, text.tokens.predicted)]
    target = split.target("token")
    assert (target.kind, target.metric, len(target.values)) == ("token", "perplexity", split.n_tokens)
    at = 0
    for example, row in enumerate(split.row):
        here = slice(split.start[example], split.start[example] + split.length[example])
        seen, true, predicted = (np.array(values[row]) for values in rows)
        assert split.input_ids[here].tolist() == seen[predicted].tolist()
        assert target.values[at : at + len(true[predicted])].tolist() == true[predicted].tolist()
        at += int(predicted.sum())
    assert opened.recipe.keep == "masked"


def test_learning_lowers_the_perplexity_and_a_head_needs_no_bank(bert_bank, tmp_path):
    scores = {}
    for learn in ("none", "transform", "all"):
        run = str(tmp_path / learn)
        result = train_run(
            bert_bank,
            target="token",
            out=run,
            fusion="last_layer",
            options={"learn": learn},
            schedule=Schedule(epochs=6, batch_size=8),
        )
        scores[learn] = result["dev"]
    assert scores["all"] < scores["transform"] < scores["none"]
    config = json.loads((tmp_path / "all" / "config.json").read_text())
    (tmp_path / "all" / "config.json").write_text(
        json.dumps(config).replace("output_layer.safetensors", "gone.safetensors")
    )
    loaded = load_run(str(tmp_path / "all"))
    assert evaluate(loaded, open_bank(bert_bank), "dev")["score"] == pytest.approx(scores["all"])


def test_a_smaller_bank_has_the_output_layer_and_can_be_removed(bert_bank, tmp_path):
    small = str(tmp_path / "small")
    convert(open_bank(bert_bank), small, layers=[2])
    scores = [
        train_run(
            store,
            target="token",
            out=str(tmp_path / name),
            fusion="last_layer",
            schedule=Schedule(epochs=1),
        )["dev"]
        for name, store in (("large", bert_bank), ("one", small))
    ]
    assert scores[0] == scores[1]
    remove(small)
    assert not (tmp_path / "small").exists()


def test_a_full_disk_under_the_output_layer_is_one_line_and_half_a_file_is_not_left(bert_bank, tmp_path):
    layer = read_output_layer(open_bank(bert_bank).recipe.encoder)
    (tmp_path / "bank").mkdir()
    with (
        disks.small_files(1024),
        pytest.raises(CacheError, match=r"cannot write .*output_layer.safetensors"),
    ):
        layer.save(place(str(tmp_path / "bank")))
    assert list((tmp_path / "bank").iterdir()) == []


def test_damage_to_the_output_layer_is_found(bert_bank, tmp_path):
    small = tmp_path / "small"
    convert(open_bank(bert_bank), str(small), layers=[2])
    layer = small / "output_layer.safetensors"
    whole = layer.read_bytes()
    assert verify(open_bank(str(small))).ok
    changed = bytearray(whole)
    changed[-1] ^= 1
    for content in (bytes(changed), whole[:-4], whole[:100], b"", None):
        layer.unlink() if content is None else layer.write_bytes(content)
        (line,) = verify(open_bank(str(small))).bad
        said = "is not there" if content is None else "is damaged ("
        assert line.startswith(f"{layer} {said}")
        cure = "again" if content is None else "again with --repair"
        assert line.endswith(f"run the same 'layerbank extract' {cure}")


def test_masked_heads_are_swept(bert_bank, tmp_path):
    result = sweep(
        Plan(store=bert_bank, schedule=Schedule(epochs=1), memory_bytes=2**28),
        Grid(targets=["token"], fusions=["last_layer", "attention"], options={"learn": ["none"]}, seeds=2),
        out=str(tmp_path / "sweep"),
    )
    last = [row["dev"] for row in result["rows"] if row["fusion"] == "last_layer"]
    assert len(result["rows"]) == 4
    assert last[0] == last[1]


def test_masks_in_a_text_are_filled_as_transformers_fills_them(bert_bank, tmp_path):
    encoder = tiny_masked_lm("bert")
    run = str(tmp_path / "run")
    train_run(bert_bank, target="token", out=run, fusion="last_layer", schedule=Schedule(epochs=1))
    texts = ["the quick [MASK] fox", "no mask", "[MASK] [MASK] on"]
    said = list(open_predictor([run], encoder=encoder).predict(texts))
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    model = transformers.AutoModelForMaskedLM.from_pretrained(encoder).eval()
    for text, one in zip(texts, said, strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        best = model(**inputs).logits[0].argmax(-1)[inputs["input_ids"][0] == tokenizer.mask_token_id]
        assert one["token"] == tokenizer.convert_ids_to_tokens(best.tolist())
    other = load_run(run)
    other = replace(other, target=replace(other.target, name="other"))
    other.head.decoder.tokens = "first"
    with pytest.raises(PipelineError, match="predict alone"):
        Predictor([load_run(run), other], Encoder(encoder))


def test_an_encoder_without_an_output_layer_lends_its_embeddings(tmp_path):
    encoder = tiny_encoder("bert")
    result = bank(tmp_path, encoder)
    settings = open_bank(result.store).split("train").target("token").settings
    assert settings["learn"] == "transform"
    embeddings = transformers.AutoModel.from_pretrained(encoder).get_input_embeddings().weight
    run = str(tmp_path / "run")
    one = train_run(
        result.store,
        target="token",
        out=run,
        fusion="last_layer",
        schedule=Schedule(epochs=1, batch_size=8),
    )
    decoder = load_run(run).head.decoder
    torch.testing.assert_close(decoder.projection.weight[0], embeddings.T.detach())
    width, vocabulary = decoder.projection.weight.shape[1:]
    assert one["parameters"] == width * width + 3 * width + vocabulary
    more = train_run(
        result.store,
        target="token",
        out=str(tmp_path / "more"),
        fusion="last_layer",
        schedule=Schedule(epochs=8, batch_size=8),
    )
    assert more["dev"] < one["dev"] < vocabulary * 2


def test_a_killed_extraction_goes_on_and_a_second_does_nothing(tmp_path):
    encoder = tiny_masked_lm("bert")
    first = bank(tmp_path, encoder)
    again = extract(
        load_corpus(str(tmp_path / "data")),
        Encoder(encoder),
        first.store,
        keep="masked",
        dtype="float32",
        max_length=MAX_LENGTH,
        maskings=2,
    )
    assert again.blocks_encoded == 0
    with pytest.raises(CacheError, match="name another --store"):
        extract(
            load_corpus(str(tmp_path / "data")),
            Encoder(encoder),
            first.store,
            keep="masked",
            dtype="float32",
            max_length=MAX_LENGTH,
            maskings=2,
            seed=1,
        )


def test_more_maskings_are_further_rows_and_they_alone_are_encoded(tmp_path):
    encoder = tiny_masked_lm("bert")
    first = bank(tmp_path, encoder)
    more = extract(
        load_corpus(str(tmp_path / "data")),
        Encoder(encoder),
        first.store,
        keep="masked",
        dtype="float32",
        max_length=MAX_LENGTH,
        maskings=3,
    )
    text = draw(encoder, LINES[4:], maskings=3)[2]
    assert more.new_rows["dev"] == len(text.tokens.length) / 3
    split = open_bank(more.store).split("dev")
    rows = [rows_of(text.tokens, v) for v in (text.true_ids, text.tokens.predicted)]
    expected = [np.array(rows[0][row])[rows[1][row]] for row in split.row]
    assert split.target("token").values.tolist() == np.concatenate(expected).tolist()


def test_what_cannot_be_masked_is_refused(tmp_path, bert_bank):
    bert = Encoder(tiny_masked_lm("bert"))
    found = corpus(tmp_path / "data", label=["a"])
    with pytest.raises(PipelineError, match="has the target 'token' and no other, 'label' was asked"):
        extract(found, bert, str(tmp_path / "x"), keep="masked", targets=["label"])
    pairs = corpus(tmp_path / "pairs", text_pair="b")
    with pytest.raises(PipelineError, match=r"--keep masked reads plain text, .* has pairs"):
        extract(pairs, bert, str(tmp_path / "x"), keep="masked")
    with pytest.raises(PipelineError, match="the tokenizer has no mask token"):
        extract(found, Encoder(tiny_encoder("gpt2")), str(tmp_path / "x"), keep="masked")
    with pytest.raises(PipelineError, match="adds 2 special tokens, give 3 or more"):
        extract(found, bert, str(tmp_path / "x"), keep="masked", max_length=2)
    with pytest.raises(PipelineError, match="only --keep masked has any, asked was --keep all"):
        extract(found, bert, str(tmp_path / "x"), maskings=2)
    with pytest.raises(PipelineError, match="takes no labels"):
        label(open_bank(bert_bank), load_corpus(str(tmp_path / "data")), "label")
    with pytest.raises(PipelineError, match=r"this head needs .* use another fusion"):
        train_run(bert_bank, target="token", out=str(tmp_path / "run"), fusion="concat")
    with pytest.raises(PipelineError, match="Transformer reads every token, the bank has --keep masked"):
        train_run(bert_bank, target="token", out=str(tmp_path / "run"), fusion="transformer")
    assert not (tmp_path / "x").exists()


def test_the_commands_take_it(tmp_path):
    corpus(tmp_path / "data")
    asked = [
        *("extract", f"wikitext2@{tmp_path}/data", "--encoder", tiny_masked_lm("bert"), "--keep", "masked"),
        *("--maskings", "2", "--store", f"{tmp_path}/bank", "--json"),
    ]
    result = CliRunner().invoke(cli.app, asked)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["targets"] == ["token"]
    shown = CliRunner().invoke(cli.app, ["verify", f"{tmp_path}/bank", "--json"])
    assert json.loads(shown.stdout)["ok"]
    assert CliRunner().invoke(cli.app, ["inspect", f"{tmp_path}/bank"]).exit_code == 0


def lab_of(tmp_path, encoder, target="token"):
    corpus(tmp_path / "data")
    data = (Data(path=str(tmp_path / "data"), targets=(target,)),)
    return Lab(out=tmp_path / "out", encoder=encoder, data=data, banks=tmp_path / "banks")


def test_the_experiment_has_the_encoder_s_own_perplexity_and_lower_ones(tmp_path, monkeypatch):
    encoder = tiny_masked_lm("bert")
    lab = lab_of(tmp_path, encoder)
    options = {"fusions": "last_layer,attention", "lr": "1e-2", "epochs": "2", "max_length": "20"}
    options |= {"maskings": "1", "tune_lr": "1e-3"}
    result = perform("masked-lm", options, lab)
    rows = {(row["fusion"], row["learn"]): row for row in result["tables"][0]["rows"]}
    untouched = rows["untouched encoder", ""]["dev"]
    # The bank has float16 states.
    own = reference_perplexity(encoder, draw(encoder, LINES[4:], maskings=1)[2])
    assert untouched == pytest.approx(own, rel=1e-3)
    assert rows["last_layer", "transform"]["dev"] < untouched
    assert set(rows) == {
        ("untouched encoder", ""),
        ("last_layer", "transform"),
        ("attention", "none"),
        ("attention", "transform"),
        ("fine_tune", "transform"),
    }
    tuned, head = rows["fine_tune", "transform"], rows["last_layer", "transform"]
    assert tuned["dev"] < untouched
    assert tuned["parameters"] > head["parameters"]
    assert tuned["lr"] == 1e-3
    assert rows["attention", "none"]["parameters"] == WIDTH
    monkeypatch.setattr(Runner, "train", lambda *_: pytest.fail("it was there already"))
    monkeypatch.setattr("pipeline.tuning.run.fit", lambda *_: pytest.fail("it was there already"))
    assert perform("masked-lm", options, lab)["tables"] == result["tables"]


def test_the_experiment_says_what_it_cannot_do(tmp_path):
    lab = lab_of(tmp_path, tiny_encoder("bert"), target="label")
    with pytest.raises(PipelineError, match=r"predicts tokens: give .*data::token"):
        perform("masked-lm", {}, lab)
    lab = replace(lab, data=(replace(lab.data[0], targets=("token",)),))
    with pytest.raises(PipelineError, match="no split 'half'"):
        perform("masked-lm", {"train": "half", "max_length": "20"}, lab)
    with pytest.raises(PipelineError, match="has no output layer: give learn=transform"):
        perform("masked-lm", {"learn": "none", "max_length": "20"}, lab)
    with pytest.raises(PipelineError, match="'some' is none of none, transform, all"):
        perform("masked-lm", {"learn": "some"}, lab)
