"""Extraction on a cluster one of whose processes is killed, sweeps on it, and clusters that fail."""

import os
import signal
import sys
import time
from dataclasses import replace
from functools import partial

import dask
import pytest
import tiny
import torch
from banks import files_of

from cache import open_bank
from cache.verify import verify
from pipeline import cluster, spread
from pipeline.corpus import load_corpus
from pipeline.encoder import Encoder
from pipeline.errors import PipelineError
from pipeline.extract import extract
from pipeline.grid import Grid
from pipeline.job import Schedule
from pipeline.results import load_run
from pipeline.runner import Plan
from pipeline.stage import Stage
from pipeline.sweep import sweep

pytest.importorskip("distributed", reason="the extra 'cluster' is not installed")


PATIENCE_S = 300
"""A loaded machine may need minutes for what takes seconds: to start a worker, to answer, to end."""


@pytest.fixture(scope="module")
def client():
    patient = {
        "distributed.comm.timeouts.connect": f"{PATIENCE_S} s",
        "distributed.scheduler.worker-ttl": None,  # a worker that is slow to answer is not given up
    }
    with pytest.MonkeyPatch.context() as patch, dask.config.set(patient):
        patch.setattr(cluster, "_WITHOUT_WORKERS_S", PATIENCE_S)
        with cluster.connect("local:2", threads=1) as found:
            yield found
            pids = list(found.run(os.getpid).values())
    for pid in pids:
        assert ends(pid), f"the worker of process {pid} outlives its cluster"


def ends(pid):
    """Whether a process ends, sooner or later."""
    for _ in range(PATIENCE_S * 10):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A data folder of many small blocks and the encoder."""
    folder = tmp_path_factory.mktemp("cluster")
    tiny.encoder(folder / "encoder")
    rows = {"train": tiny.rows_of_text("train", 400), "dev": tiny.rows_of_text("dev", 40)}
    tiny.write_jsonl(folder / "data", rows, ["tokens", "tags", "intent"])
    return folder


@pytest.fixture
def ready(place, monkeypatch):
    """Corpus and encoder; blocks are small, so that there are many."""
    monkeypatch.setattr("pipeline.extract.block_tokens_for", lambda _, max_length: max(96, max_length))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_corpus(str(place / "data")), Encoder(str(place / "encoder"), words=True, device="cpu")
    torch.set_num_threads(before)


@pytest.mark.slow
def test_a_killed_worker_costs_its_blocks_in_flight_and_the_bank_is_the_same(ready, tmp_path, client):
    data, encoder = ready
    alone = extract(data, encoder, str(tmp_path / "alone"), dtype="float32")
    assert alone.blocks > 20
    seen, killed = [], []

    def kill_one(progress):
        seen.append(progress)
        if len(seen) == alone.blocks // 2:
            pids = client.run(os.getpid)
            killed.append(next(iter(pids.values())))
            os.kill(killed[0], signal.SIGKILL)

    there = extract(
        data,
        encoder,
        str(tmp_path / "there"),
        dtype="float32",
        progress=kill_one,
        spread=spread.on_cluster(client, threads=1),
    )
    assert killed
    assert there.blocks_encoded == alone.blocks
    assert files_of(tmp_path / "there") == files_of(tmp_path / "alone")
    assert seen[-1].tokens == seen[-1].n_tokens == alone.tokens
    assert seen[-1].written_bytes > 0
    nothing = extract(
        data, encoder, str(tmp_path / "there"), dtype="float32", spread=spread.on_cluster(client)
    )
    assert nothing.blocks_encoded == 0


@pytest.mark.slow
def test_what_a_worker_lacks_is_told_with_its_name(ready, tmp_path, client, monkeypatch):
    data, encoder = ready
    run = partial(extract, data, encoder, str(tmp_path / "b"), spread=spread.on_cluster(client, threads=1))
    with monkeypatch.context() as patch:
        patch.setitem(encoder.opening, "name", str(tmp_path / "nowhere"))
        with pytest.raises(
            PipelineError, match=r"worker tcp://\S+: --encoder \S+nowhere: no such dir"
        ) as said:
            run()
        assert "\n" not in str(said.value)
    with monkeypatch.context() as patch:
        ours = cluster.versions()
        patch.setattr(cluster, "versions", lambda: {**ours, "transformers": "4.0.0"})
        with pytest.raises(
            PipelineError, match=r"worker tcp://\S+ has transformers .*, this process 4.0.0: "
        ):
            run()
    assert run().blocks_encoded > 20
    assert verify(open_bank(str(tmp_path / "b"))).ok


def _slow_square(number):
    return number * number


@pytest.mark.slow
def test_tasks_go_out_a_few_at_a_time(client):
    taken, given = [0], []

    def items():
        for number in range(30):
            taken[0] += 1
            yield number

    for number, result in cluster.run(client, _slow_square, items(), ahead=2):
        given.append(number)
        assert result == number * number
        assert taken[0] - len(given) <= 2 * 2 + 2, "more tasks than the workers can hold were sent"
    assert sorted(given) == list(range(30))


def _fail(number):
    raise PipelineError(f"item {number} is bad")


@pytest.mark.slow
def test_what_a_task_raises_comes_back(client):
    with pytest.raises(PipelineError, match="item 0 is bad"):
        list(cluster.run(client, _fail, [0]))


@pytest.mark.slow
def test_sweep_on_a_cluster_equals_one_on_this_machine(tmp_path, client):
    def run(folder, targets=("label", "tags"), **where):
        grid = Grid(targets=targets, fusions=["linear", "attention"], dropout=[0.1], seeds=2)
        plan = Plan(store=tiny.shared().path, schedule=Schedule(epochs=3))
        rows = sweep(plan, grid, out=str(tmp_path / folder), **where)["rows"]
        return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]

    with pytest.raises(PipelineError, match="did you mean 'label'"):
        run("c", ["labl"], client=client)
    assert run("a", client=client) == run("b")
    for name in ("label-linear-batch=32", "tags-attention-batch=32"):
        a, b = (load_run(str(tmp_path / folder / "heads" / name)).head.state_dict() for folder in "ab")
        assert all((a[key] == b[key]).all() for key in b)


# Without a cluster.


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("local:0", "give local:N with N processes"),
        ("local:two", "give local:N with N processes"),
        ("foo://host:1", "no Dask scheduler answers there"),
        ("not an address", "no Dask scheduler answers there"),
        ("tcp://127.0.0.1:1", "no Dask scheduler answers there .*: start one with 'dask scheduler'"),
    ],
)
def test_a_cluster_that_cannot_be_reached_is_told_in_one_line(address, said, monkeypatch):
    monkeypatch.setattr(cluster, "_CONNECT_S", 0.3)
    with pytest.raises(PipelineError, match=said) as error, cluster.connect(address):
        pass
    assert "\n" not in str(error.value)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with (
        pytest.raises(PipelineError, match=r"pip install 'layerbank\[cluster\]'"),
        cluster.connect("local:2"),
    ):
        pass


@pytest.fixture
def jobs(ready, tmp_path):
    """What a worker would be sent, and the bank that it would write to."""
    return jobs_of(ready, tmp_path / "jobs")


def jobs_of(ready, path, dtype="float32"):
    data, encoder = ready
    sent, setting = [], []

    def keep(stage: Stage) -> int:
        stage.calibrate()
        sent.extend(spread._jobs(stage, 3))
        setting.append(
            spread.Setting(
                path=str(stage.writer.path), recipe=stage.writer.recipe, opening=encoder.opening, threads=1
            )
        )
        for job in sent:
            stage.note(job.split, job.blocks, spread.make_blocks(setting[0], job))
        return len(stage.todo)

    extract(data, encoder, str(path), dtype=dtype, spread=keep)
    return setting[0], sent


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_several_blocks_of_one_task_are_those_of_one_process(ready, tmp_path, dtype):
    data, encoder = ready
    extract(data, encoder, str(tmp_path / "alone"), dtype=dtype)
    _, jobs = jobs_of(ready, tmp_path / "jobs", dtype)
    assert max(len(job.blocks) for job in jobs) == 3
    assert files_of(tmp_path / "jobs") == files_of(tmp_path / "alone")


def test_a_worker_that_does_not_see_the_bank_or_has_other_weights_says_so(jobs, tmp_path, place):
    setting, (job, *_) = jobs
    with pytest.raises(PipelineError, match=r"worker here: no bank at .*: the store must lie where"):
        spread.prepare(replace(setting, path=str(tmp_path / "elsewhere")))
    other = tiny.encoder(tmp_path / "other", seed=5)
    with pytest.raises(PipelineError, match=r"worker here: --encoder .*: its weights there are others"):
        spread.prepare(replace(setting, opening={**setting.opening, "name": other}))
    chunk = tmp_path / "jobs" / "train" / "states" / "c" / "0"
    for path in chunk.iterdir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    chunk.rmdir()
    chunk.write_text("in the way")
    with pytest.raises(PipelineError, match=r"worker here: cannot write .*states/c/0"):
        spread.make_blocks(setting, job)


def test_a_state_that_does_not_fit_is_named_by_its_row_in_the_source(jobs, monkeypatch):
    setting, (job, *_) = jobs
    monkeypatch.setattr("cache.codecs.first_nonfinite", lambda states: 0)
    first = job.plan.source[job.plan.examples(job.blocks[0])][0]
    with pytest.raises(PipelineError, match=rf"worker here: layer 0 .*source row {first}\)"):
        spread.make_blocks(setting, job)
