"""Memory that training frees is there for the next step; that of an extraction does not add up."""

import resource
import subprocess
import sys

import pyarrow as pa
import pytest
import torch

from pipeline.mapped import in_file, let_go
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
    assert sum(step() for _ in range(20)) < 8000  # 20 times 16 MB are 80,000 pages


def test_a_long_table_lies_in_a_file_and_a_short_one_does_not():
    table = pa.table({"text": ["a", "b"] * 2**10, "tags": [["x"], []] * 2**10, "n": [1, None] * 2**10})
    assert in_file(table) == (table, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.mapped.IN_MEMORY_BYTES", table.nbytes - 1)
        before = pa.total_allocated_bytes()
        found, mapped = in_file(table)
    assert mapped is not None
    assert pa.total_allocated_bytes() - before < table.nbytes / 4  # its columns are the file's pages
    let_go(mapped)
    assert found == table


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone has malloc_trim")
def test_what_lies_free_between_what_stays_is_given_back():
    program = """
from pipeline.memory import give_back

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

pieces = [bytearray(64 * 2**10) for _ in range(1024)]
kept = pieces[::8]
del pieces
before = resident()
give_back()
print(before - resident())
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert int(done.stdout) > 32 * 2**20  # of 56 MB
