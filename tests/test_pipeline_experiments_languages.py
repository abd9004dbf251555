"""Experiments over languages: pairs on joined banks, frozen queries, groups, means."""

from statistics import mean

import pytest
import safetensors.torch
import tiny
import torch

from cache import JoinedBank, Piece, open_bank
from pipeline import train
from pipeline.errors import PipelineError
from pipeline.experiments._base import Data, Lab, perform
from pipeline.findings import load
from pipeline.job import HeadRates, Schedule, prepare
from pipeline.train import fit

SEEDS, EPOCHS, LR = 2, 1, 1e-2
SHORT = {"seeds": str(SEEDS), "epochs": str(EPOCHS), "lr": str(LR)}
SIZES = {"aa": 24, "bb": 30, "cc": 20}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three languages, of which one lacks an intent, and an encoder."""
    folder = tmp_path_factory.mktemp("languages")
    for name, n in SIZES.items():
        rows = {s: tiny.rows_of_text(s, k) for s, k in (("train", n), ("dev", 14), ("test", 14))}
        if name == "bb":
            rows = {s: [row for row in some if row["intent"] != "sound"] for s, some in rows.items()}
        tiny.write_jsonl(folder / name, rows, ["tokens", "tags", "intent"])
    return folder, tiny.encoder(folder / "encoder")


def run(made, name, out, languages=("aa", "bb", "cc"), targets=("intent",), **options):
    folder, encoder = made
    data = tuple(Data(path=str(folder / one), targets=targets) for one in languages)
    lab = Lab(
        out=out, encoder=encoder, data=data, banks=folder / "banks", device="cpu", precision="float32"
    )
    return perform(name, {**SHORT, **options}, lab)


def rows_of(result, name="scores"):
    return next(table["rows"] for table in result["tables"] if table["name"] == name)


def nothing_trains(monkeypatch):
    def dying(fittings, epoch):
        raise AssertionError("a finished head was trained again")

    monkeypatch.setattr(train, "train_epoch", dying)


def alone(bank, fusion="attention", target="intent"):
    """The mean dev score of heads trained one by one."""
    job = prepare(bank, target, fusion=fusion)
    return mean(fit(job, [HeadRates(seed=s, lr=LR)], Schedule(epochs=EPOCHS))[0].dev for s in range(SEEDS))


def dies_after(monkeypatch, most):
    """Lets an experiment live for some passes over training examples."""
    real, calls = train.train_epoch, []

    def dying(fittings, epoch):
        if len(calls) == most:
            raise KeyboardInterrupt
        calls.append(epoch)
        return real(fittings, epoch)

    monkeypatch.setattr(train, "train_epoch", dying)
    return calls


def test_every_pair_is_trained_on_the_source_and_a_share_of_the_target(made, tmp_path, monkeypatch):
    asked = {"languages": ("aa", "bb"), "share": "0.25", "out": tmp_path}
    with monkeypatch.context() as patch:
        dies_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run(made, "transfer", **asked)
    with monkeypatch.context() as patch:
        calls = dies_after(patch, 99)
        result = run(made, "transfer", **asked)
    assert len(calls) == (6 - 2) * EPOCHS  # two sweeps were finished
    found = {(row["source"], row["language"]): row["dev"] for row in rows_of(result)}
    ends = ("a share of it alone", "all of it")
    assert set(found) == {(end, b) for end in ends for b in ("aa", "bb")} | {("aa", "bb"), ("bb", "aa")}
    stores = {name: str(made[0] / "banks" / f"{name}-words") for name in ("aa", "bb")}
    some = Piece(store=stores["aa"], share=0.25, seed=0)
    for source, pieces in ((ends[0], [some]), ("bb", [Piece(store=stores["bb"]), some])):
        bank = JoinedBank(open_bank(stores["aa"]), "train", pieces)
        assert found[source, "aa"] == pytest.approx(alone(bank))
    assert found[ends[1], "aa"] == pytest.approx(alone(open_bank(stores["aa"])))
    assert len(result["notes"]) == 2
    assert any(path.endswith("figures/pairs-intent.svg") for path in result["files"])
    nothing_trains(monkeypatch)
    assert rows_of(run(made, "transfer", **asked)) == rows_of(result)


def test_a_frozen_query_is_that_of_the_source_s_best_head(made, tmp_path, monkeypatch):
    result = run(made, "frozen-fusion", tmp_path / "out", languages=("aa", "cc"), source="aa")
    lines = {(row["language"], row["query"]): row for row in rows_of(result)}
    own, frozen = lines["cc", "its own"], lines["cc", "frozen"]
    assert frozen["difference"] == pytest.approx(frozen["test"] - own["test"])
    assert set(lines) == {("aa", "its own")} | {
        ("cc", query) for query in ("its own", "frozen", "none, the mean of the layers")
    }
    assert len(result["notes"]) == 1

    def query(sweep):
        [run_folder] = (tmp_path / "out" / "sweeps" / sweep / "heads").iterdir()
        return safetensors.torch.load_file(str(run_folder / "head.safetensors"))["fusion.query"]

    assert torch.equal(query("cc-intent-from-aa"), query("aa-intent"))
    assert not torch.equal(query("cc-intent"), query("aa-intent"))
    nothing_trains(monkeypatch)
    again = run(made, "frozen-fusion", tmp_path / "out", languages=("aa", "cc"), source="aa")
    assert rows_of(again) == rows_of(result)


def test_languages_are_grouped_and_compared_with_the_base(made, tmp_path):
    result = run(
        made, "languages", tmp_path / "out", fusions="last_layer,linear", groups="high:cc,aa;low:bb"
    )
    lines = {(row["language"], row["fusion"]): row for row in rows_of(result)}
    assert [row["language"] for row in rows_of(result)][::2] == ["cc", "aa", "bb"]
    assert {row["group"] for row in rows_of(result)} == {"high", "low"}
    gains = [lines[name, "linear"]["dev"] - lines[name, "last_layer"]["dev"] for name in ("cc", "aa")]
    high = next(r for r in rows_of(result, "groups") if (r["group"], r["fusion"]) == ("high", "linear"))
    assert high["gain"] == pytest.approx(mean(gains))
    assert lines["bb", "linear"]["dev"] == pytest.approx(
        alone(open_bank(str(made[0] / "banks" / "bb-words")), "linear")
    )
    high, low = result["notes"]
    assert high.startswith("intent, high (2 languages): linear is ")
    assert low.startswith("intent, low (1 language): linear is ")
    of_scores, of_gains = (
        {row["fusion"] for rows in one.chart["datasets"].values() for row in rows}
        for one in load(str(tmp_path / "out"))[0].figures
    )
    assert of_scores == of_gains  # so their colours are the same


def test_the_fusion_table_has_shares_of_the_encoder_and_means_over_languages(made, tmp_path):
    from transformers import BertModel

    result = run(made, "fusion-table", tmp_path, targets=("intent", "tags"), languages=("aa", "cc"),
                 fusions="last_layer,attention,linear")  # fmt: skip
    encoder = BertModel.from_pretrained(made[1], add_pooling_layer=False)
    total = sum(p.numel() for p in encoder.parameters())
    lines = rows_of(result)
    assert len(lines) == 2 * 2 * 3
    for line in lines:
        expected = 100 * line["parameters"] / (total + line["parameters"])
        assert line["trained_percent"] == pytest.approx(expected)
    means = {(r["target"], r["fusion"]): r["dev"] for r in rows_of(result, "means")}
    of_linear = [line["dev"] for line in lines if line["fusion"] == "linear"]
    assert means["all", "linear"] == pytest.approx(mean(of_linear))
    attention = means["all", "attention"] > means["all", "linear"]
    assert result["notes"][0].startswith(f"attention is {'above' if attention else 'not above'} linear")
    assert len(result["notes"]) == 2


@pytest.mark.parametrize(
    ("name", "languages", "options", "said"),
    [
        ("transfer", ("aa",), {}, "1 data sets: give 2 or more, one a language"),
        ("transfer", ("aa", "aa"), {}, "two data sets are called aa"),
        ("transfer", ("aa", "zz"), {}, "zz"),
        ("transfer", ("aa", "bb"), {"share": "2"}, "--set share=2"),
        ("transfer", ("aa", "bb"), {"draw": "-1"}, "--set draw -1"),
        ("frozen-fusion", ("aa", "bb"), {"source": "cc"}, "--set source=cc: no data set has that name"),
        ("languages", ("aa", "bb"), {"groups": "high"}, "--set groups=high: give GROUP:LANGUAGE"),
        ("languages", ("aa", "bb"), {"groups": "high:aa"}, "bb is in no group"),
        ("languages", ("aa", "bb"), {"groups": "high:aa,bb,cc"}, "no data set is called 'cc'"),
        ("languages", ("aa", "bb"), {"base": "dwatt"}, "--set base=dwatt: name one of the fusions"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(made, tmp_path, name, languages, options, said):
    with pytest.raises(PipelineError, match=said) as caught:
        run(made, name, tmp_path, languages=languages, **options)
    assert "\n" not in str(caught.value)


def test_other_targets_on_a_language_are_refused(made, tmp_path):
    folder, encoder = made
    data = (
        Data(path=str(folder / "aa"), targets=("intent",)),
        Data(path=str(folder / "bb"), targets=("tags",)),
    )
    lab = Lab(out=tmp_path, encoder=encoder, data=data, banks=folder / "banks")
    with pytest.raises(PipelineError, match="ask for the same targets of each language"):
        perform("transfer", {}, lab)


def test_a_language_without_the_target_is_named_with_what_to_do(made, tmp_path):
    with pytest.raises(PipelineError, match=r"aa-words has no target 'colour' .* 'layerbank label"):
        run(made, "transfer", tmp_path, targets=("colour",))
