"""Memory that training frees is there for the next step."""

import resource
import sys

import pytest
import torch

from pipeline.memory import keep_freed


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone has mallopt")
def test_freed_memory_is_taken_again_without_page_faults():
    keep_freed()

    def step() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for size in (3, 8, 5):  # MB: above glibc's first threshold, below its last
            torch.ones(size * 2**18)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    step()
    assert sum(step() for _ in range(20)) < 2000  # 20 times 16 MB are 80,000 pages
