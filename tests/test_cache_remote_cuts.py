"""Writers of a bank at a URL that are cut off before any of their requests: the next one ends the work."""

import random

import fsspec
import numpy as np
import pytest
from banks import complete, files_of, recipe, rows
from faults import Killed

from cache import BankIncomplete, Target, Writer, open_bank, remote
from cache.targets import write_target
from cache.verify import verify

OLD, NEW = {"train": rows([5, 3, 9, 2])}, {"train": rows([5, 3, 9, 2, 12, 7])}
ASKED = recipe(layers=(0, 3))


@pytest.fixture
def requests(monkeypatch):
    """Counts the requests that change something; refuses those from the n-th on, as a kill would."""
    send, state = remote.RemoteStore.attempt, {"sent": 0, "allowed": 10**9}

    async def attempt(self, doing, key, request, **limits):
        if doing in ("writing", "removing"):
            if state["sent"] >= state["allowed"]:
                raise Killed
            state["sent"] += 1
        return await send(self, doing, key, request, **limits)

    monkeypatch.setattr(remote.RemoteStore, "attempt", attempt)
    return state


@pytest.fixture
def memory(tmp_path):
    """A file system in memory, below a name of its own."""
    held = fsspec.filesystem("memory")
    yield Memory(held, f"/{tmp_path.name}")
    held.rm(f"/{tmp_path.name}", recursive=True)


class Memory:
    """The banks in it."""

    def __init__(self, held, root):
        self.held, self.root = held, root

    def url(self, name):
        return f"memory:/{self.root}/{name}"

    def files(self, name):
        found = self.held.find(f"{self.root}/{name}")
        return {path.removeprefix(f"{self.root}/{name}/"): self.held.cat(path) for path in found}

    def start(self, name, files):
        """A bank of these files."""
        for path, content in files.items():
            self.held.pipe(f"{self.root}/{name}/{path}", content)
        return self.url(name)


def cut(requests, allowed, action):
    """Whether an action that may change so many objects came to its end."""
    requests.update(sent=0, allowed=allowed)
    try:
        action()
    except Killed:
        return False
    finally:
        requests["allowed"] = 10**9
    return True


def fill(path, lengths):
    with Writer(str(path), ASKED, lengths) as writer:
        writer.write_target("train", labels(1, n=len(lengths["train"].n_words)))
        complete(writer)


def labels(number, n=4):
    """A target whose every label, name and text says a number, longer than a chunk of it."""
    extra = {"text": np.full(2 * n, number, np.uint8), "n_text": np.full(n, 2, np.int32)}
    values = np.full(n, number, np.int32)
    return Target(name="y", kind="class", names=tuple("abc"[: number + 1]), values=values, extra=extra)


def said(path):
    """The number that labels, names and texts say."""
    split = open_bank(path).split("train")
    found = split.target("y")
    numbers = {*found.values.tolist(), len(found.names) - 1, *split.target_extra("y")["text"].tolist()}
    assert len(numbers) == 1
    return numbers.pop()


def test_cut_off_anywhere_a_target_is_the_old_one_or_the_new_one(requests, memory, tmp_path, monkeypatch):
    monkeypatch.setattr("cache.targets._CHUNK", 3)
    fill(memory.url("old"), OLD)
    fill(tmp_path / "local", OLD)

    def relabel(path):
        write_target(open_bank(str(path)).writable_split("train"), labels(2))

    relabel(tmp_path / "local")
    old, expected = memory.files("old"), files_of(tmp_path / "local")
    url = memory.start("undisturbed", old)
    assert cut(requests, 10**9, lambda: relabel(url))
    assert memory.files("undisturbed") == expected
    found = []
    for change in range(requests["sent"]):
        url = memory.start(f"cut-{change}", old)
        assert not cut(requests, change, lambda at=url: relabel(at))
        found.append(said(url))
        if change % 3 == 0:
            cut(requests, 2, lambda at=url: relabel(at))
            found.append(said(url))
        relabel(url)
        assert said(url) == 2
    assert verify(open_bank(url)).ok
    assert found == sorted(found)
    assert set(found) == {1, 2}


def test_a_growth_that_is_cut_off_anywhere_is_ended_by_the_same_command(requests, memory, tmp_path):
    fill(memory.url("old"), OLD)
    for lengths in (OLD, NEW):
        fill(tmp_path / "local", lengths)
    old, expected = memory.files("old"), files_of(tmp_path / "local")
    url = memory.start("undisturbed", old)
    assert cut(requests, 10**9, lambda: fill(url, NEW))
    changes, draw = requests["sent"], random.Random(2)
    assert memory.files("undisturbed") == expected
    for change in sorted({0, 1, changes - 1, *draw.sample(range(changes), 5)}):
        url = memory.start(f"cut-{change}", old)
        assert not cut(requests, change, lambda at=url: fill(at, NEW))
        try:
            open_bank(url)
        except BankIncomplete:
            cut(requests, draw.randrange(changes), lambda at=url: fill(at, NEW))
        else:
            there = {k: v for k, v in memory.files(f"cut-{change}").items() if ".growth" not in k}
            assert there in (old, expected), f"half a growth opens as whole, cut off at change {change}"
        fill(url, NEW)
        assert memory.files(f"cut-{change}") == expected, f"cut off at change {change}"
