import os
import threading

import pytest
import torch

from pipeline import device
from pipeline.device import SHARED_PRODUCTS, pick_device, set_threads, side_by_side
from pipeline.errors import PipelineError


@pytest.fixture
def unasked(monkeypatch):
    """An environment that asks for no number of threads."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_the_fastest_device_there_is(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device("auto").type == expected


def test_a_device_is_taken_by_its_name():
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:99", "mps:7", "cpu;"])
def test_a_device_that_is_not_there_is_refused_with_the_names_that_work(name):
    with pytest.raises(
        PipelineError, match=f"--device {name}: not available here, use --device auto or cpu"
    ):
        pick_device(name)


@pytest.mark.usefixtures("unasked")
def test_threads_are_as_many_as_asked_and_one_a_core_by_default(monkeypatch):
    assert set_threads(3) == torch.get_num_threads() == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2}, raising=False)
    assert set_threads(None) == torch.get_num_threads() == 2


@pytest.mark.usefixtures("unasked")
def test_threads_are_counted_where_the_system_cannot_bind_a_process_to_cores(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert set_threads(None) == torch.get_num_threads() == 5


@pytest.mark.parametrize(
    ("asked", "count"), [("3", 3), (" 4,2", 4), ("0", 2), ("", 2), ("many", 2), ("-1", 2)]
)
def test_threads_are_as_many_as_the_environment_asks_for_where_no_flag_does(monkeypatch, asked, count):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2}, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert set_threads(None) == torch.get_num_threads() == count
    assert set_threads(5) == torch.get_num_threads() == 5


@pytest.mark.parametrize("count", [0, -2])
def test_fewer_than_one_thread_is_refused(count):
    with pytest.raises(PipelineError, match=f"--threads {count}: give 1 or more"):
        set_threads(count)


def test_jobs_side_by_side_have_a_thread_each_and_give_their_results_in_order():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    meet = threading.Barrier(2, timeout=60)  # passed only by two jobs at a time
    try:
        with side_by_side(torch.device("cpu"), 2) as run:
            found = run([lambda k=k: (meet.wait() >= 0, torch.get_num_threads(), k) for k in range(2)])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert found == [(True, 1, 0), (True, 1, 1)]


def test_fewer_jobs_than_threads_come_one_after_the_other_on_all_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with side_by_side(torch.device("cpu"), 2) as run:
            found = run(
                [lambda k=k: (threading.current_thread(), torch.get_num_threads(), k) for k in range(2)]
            )
    finally:
        torch.set_num_threads(before)
    assert found == [(threading.current_thread(), 3, 0), (threading.current_thread(), 3, 1)]


@pytest.mark.parametrize(
    ("n_products", "threads"), [(SHARED_PRODUCTS - 1.0, 1), (SHARED_PRODUCTS + 0.0, 3)]
)
def test_threads_share_no_product_of_a_small_job(n_products, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with side_by_side(torch.device("cpu"), 1, n_products) as run:
            assert run([torch.get_num_threads]) == [threads]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "1600000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu.max": "nonsense"}, 8),
        ({}, 8),
    ],
)
def test_threads_are_no_more_than_a_containers_quota(files, count, monkeypatch, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(device, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert device.usable_cores() == count
