"""What all experiments share: heads that failed are told and do not count."""

from unittest.mock import Mock

import pytest

from pipeline.corpus import Corpus
from pipeline.errors import PipelineError
from pipeline.experiments import _base
from pipeline.experiments._base import Data, Lab
from pipeline.extract import Extraction
from pipeline.grid import Grid
from pipeline.job import Schedule


def rows(*heads):
    names = ("fusion", "target", "lr", "seed", "status", "dev")
    return [dict(zip(names, head, strict=True)) for head in heads]


@pytest.fixture
def swept(monkeypatch, tmp_path):
    """Runs `Lab.sweep` on rows that are given."""

    def run(found):
        monkeypatch.setattr(_base, "sweep", lambda *_, **__: {"rows": found})
        lab = Lab(out=tmp_path, encoder="e", data=(), banks=tmp_path, device="cpu")
        grid = Grid(targets=["tags"], fusions=["linear"])
        return lab, lab.sweep("en", lab.plan("bank", Schedule()), grid)

    return run


def test_banks_may_lie_at_a_url(monkeypatch, tmp_path):
    def extracted(corpus, opening, store, **_):
        return Mock(spec=Extraction, store=store, blocks_encoded=0)

    monkeypatch.setattr(_base, "load_corpus", lambda *_, **__: Mock(spec=Corpus, words=None))
    monkeypatch.setattr(_base, "extract_once", extracted)
    lab = Lab(out=tmp_path, encoder="e", data=(), banks="s3://b/x", device="cpu")
    assert lab.bank(Data(path="some/folder", targets=("y",))) == "s3://b/x/folder-words"


def test_a_failed_head_is_left_out_and_told(swept):
    ok, failed = (
        ("linear", "tags", 0.1, 0, "ok", 40.0),
        ("linear", "tags", 0.1, 1, "failed at step 9", 52.0),
    )
    lab, found = swept(rows(ok, failed))
    assert [row["dev"] for row in found] == [40.0]
    assert lab.lost == ["en: linear on tags, lr 0.1, seed 1 failed at step 9 and does not count"]


def test_a_fusion_whose_heads_all_failed_ends_the_experiment(swept):
    ok, failed = (
        ("linear", "tags", 0.1, 0, "ok", 40.0),
        ("concat", "tags", 0.1, 0, "failed at step 1", None),
    )
    with pytest.raises(PipelineError, match=r"en: concat on tags, lr 0.1, seed 0 failed at step 1"):
        swept(rows(ok, failed))
