"""Banks on a real S3 server on the loopback, with faults between; and on other URLs."""

import os
import pickle
import random
import sys
import threading
import time
import tracemalloc
from contextlib import suppress

import banks
import numpy as np
import pytest
import s3
from banks import RECIPE, complete, files_of, large_recipe, recipe, rows, splits, write
from zarr.core.sync import sync

from cache import BankIncomplete, CacheError, CorruptChunk, Target, Writer, open_bank, remote
from cache.errors import BankAbsent, StoreRefused, StoreUnreachable
from cache.place import place
from cache.verify import verify

LABELS = Target(name="y", kind="class", names=("a", "b"), values=np.arange(12, dtype=np.int32) % 2)
MANY = {"train": rows([16] * 12), "dev": rows([5, 9])}


@pytest.fixture
def proxy(server):
    with s3.Proxy(server.port) as between:
        yield between


@pytest.fixture(autouse=True)
def user(monkeypatch, tmp_path):
    """A user without keys, who does not wait long between tries."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(remote, "_LONGEST_WAIT_S", 0.2)


@pytest.fixture
def keys(proxy, monkeypatch):
    """That user with keys."""
    for name, value in s3.environment(proxy.port).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def url(request, keys):
    return f"s3://{s3.BUCKET}/{request.node.name.replace('[', '-').replace(']', '')}/bank"


def stored(server, url):
    """The objects below a URL, as the server's folder holds them."""
    return files_of(server.folder / url.removeprefix("s3://"))


def fill(path, lengths=None, **changes):
    """A complete bank with a target."""
    with Writer(str(path), recipe(**changes), lengths or splits()) as writer:
        writer.write_target("train", LABELS)
        complete(writer)
    return open_bank(str(path))


def same_arrays(one, other):
    for name in one.splits:
        a, b = one.split(name), other.split(name)
        assert a.numpy().tobytes() == b.numpy().tobytes()
        for array in ("start", "length", "n_words", "row", "text_hash", "input_ids", "word_id", "kind"):
            np.testing.assert_array_equal(getattr(a, array), getattr(b, array))
        for target in a.target_names():
            np.testing.assert_array_equal(a.target(target).values, b.target(target).values)


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    assert s3.SECRET not in text
    return text


@pytest.mark.parametrize(
    "changes", [{}, {"codec": "zstd"}, {"dtype": "bfloat16"}], ids=["plain", "zstd", "bf16"]
)
def test_a_bank_on_s3_is_file_by_file_the_local_one(server, url, tmp_path, changes):
    ours, local = fill(url, **changes), fill(tmp_path / "bank", **changes)
    assert stored(server, url) == files_of(tmp_path / "bank")
    same_arrays(ours, local)
    assert ours.n_bytes == local.n_bytes > 0
    assert verify(ours).ok


def faulty(seed, often, kinds):
    """Faults drawn anew for every request."""
    draw = random.Random(seed)
    return lambda method, path: draw.choice(kinds) if draw.random() < often else None


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_with_faults_between_nothing_is_lost_and_tries_are_bounded(server, proxy, url, tmp_path, codec):
    proxy.fault = faulty(7, 0.25, ["503", "500", "429", "cut", "late", "half"])
    ours = fill(url, codec=codec)
    local = fill(tmp_path / "bank", codec=codec)
    assert stored(server, url) == files_of(tmp_path / "bank")
    same_arrays(ours, local)
    assert all(proxy.count(kind) > 3 for kind in ("503", "500", "429", "cut", "late", "half"))
    assert proxy.most_tries() <= 10, "0.25 ** 10 of a request's tries fail by chance alone"
    assert verify(ours).ok


def test_a_large_file_has_more_time_than_a_chunk(server, proxy, url, monkeypatch):
    content, here = np.random.default_rng(0).bytes(2**20 + 3), place(url)
    monkeypatch.setattr(remote, "_REQUEST_S", 0.5)
    monkeypatch.setattr(remote, "_REQUEST_BYTES", 2**14)
    proxy.fault = lambda method, path: time.sleep(0.7) if method in ("PUT", "GET") else None
    here.put_file("weights", content)
    assert here.read_file("weights") == content
    assert stored(server, url) == {"weights": content}
    assert [method for method, _, _ in proxy.requests if method in ("PUT", "GET")] == ["PUT", "GET"]
    proxy.fault = faulty(2, 0.3, ["503", "cut", "half"])
    here.remove("weights")
    assert here.is_vacant()
    with pytest.raises(FileNotFoundError):
        here.read_file("weights")


@pytest.mark.parametrize("then", ["start", "late start"])
def test_a_server_that_is_killed_and_comes_back_is_waited_for(server, proxy, url, tmp_path, then):
    local, taken = fill(tmp_path / "bank", MANY), []

    def outage():
        server.stop()
        proxy.stop() if then == "late start" else None
        time.sleep(1.0)
        server.start()
        proxy.start() if then == "late start" else None

    def during(action, start_after):
        thread = threading.Timer(start_after, outage)
        thread.start()
        while thread.is_alive():
            taken.append(action())
        thread.join()

    with Writer(url, RECIPE, MANY) as writer:
        writer.write_target("train", LABELS)
        blocks = [(split, block) for split in writer.plans for block in writer.missing(split)]
        during(lambda: [write(writer, *blocks[n % len(blocks)]) for n in range(6)], 0.05)
        complete(writer)
    # Beside them lie left-overs of the killed server, which a bank's reader never asks for.
    assert files_of(tmp_path / "bank").items() <= stored(server, url).items()
    bank = open_bank(url)
    during(lambda: same_arrays(bank, local), 0.05)
    same_arrays(bank, local)


def test_resuming_writes_what_is_missing_alone_and_reads_no_states(server, proxy, url, tmp_path):
    with Writer(url, RECIPE, MANY) as writer:
        for block in (0, 3, 5):
            write(writer, "train", block)
    with pytest.raises(BankIncomplete):
        open_bank(url)
    place(url).put("train/input_ids/c/5", np.zeros(3, np.uint8))
    sync(remote.connect(url).delete("train/states/c/2/3/0"))
    proxy.requests.clear()
    with Writer(url, RECIPE, MANY) as writer:
        assert 0 not in writer.missing("train")
        assert {3, 5} <= set(writer.missing("train"))
        assert not [path for method, path, _ in proxy.requests if method == "GET" and "/states/c/" in path]
        complete(writer)
    banks.make(tmp_path / "bank", MANY)
    assert stored(server, url) == files_of(tmp_path / "bank")


def test_a_damaged_object_is_found_named_and_alone_written_again(server, proxy, url):
    fill(url)
    whole = stored(server, url)
    banks.damage(server.folder / url.removeprefix("s3://") / "train/states/c/1/2/0")
    bank = open_bank(url)
    with pytest.raises(CorruptChunk, match="layer 1, block 2"):
        bank.split("train").read_block(2)
    assert [text[:30] for text in verify(bank).bad] == ["split train, layer 1, block 2 "]
    with Writer(url, RECIPE, splits(), repair=True) as writer:
        assert writer.missing("train") == [2]
        proxy.requests.clear()
        complete(writer)
    chunks = [path for method, path, _ in proxy.requests if method == "PUT" and "/c/" in path]
    assert all("/2" in path for path in chunks)
    assert stored(server, url) == whole


def test_a_plan_that_was_cut_off_is_made_again(server, proxy, url, tmp_path):
    class Killed(BaseException):
        """Nothing catches it."""

    for after in (3, 9, 15):
        puts = iter(range(after))

        def fault(method, path, puts=puts):
            return None if method != "PUT" or next(puts, None) is not None else "403"

        proxy.fault = fault
        with pytest.raises(StoreRefused):
            Writer(url, recipe(seed=after), {"other": rows([3])} | splits()).__enter__()
    proxy.fault = lambda method, path: None
    fill(url)
    fill(tmp_path / "bank")
    assert stored(server, url) == files_of(tmp_path / "bank")


def test_two_writers_at_once_end_with_the_one_bank(server, url, tmp_path):
    with Writer(url, RECIPE, MANY):
        pass
    failed = []

    def run():
        try:
            with Writer(url, RECIPE, MANY) as writer:
                complete(writer)
        except CacheError as error:
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    banks.make(tmp_path / "bank", MANY)
    assert not failed
    assert stored(server, url) == files_of(tmp_path / "bank")


def test_patience_ends_with_one_line_and_a_count(server, proxy, url, monkeypatch):
    monkeypatch.setenv(remote.PATIENCE, "1")
    split = fill(url).split("train")
    proxy.fault = lambda method, path: "503"
    proxy.requests.clear()
    began = time.monotonic()
    with pytest.raises(StoreUnreachable) as error:
        split.read_block(0, [0])
    assert time.monotonic() - began < 3
    tries = proxy.count("503")
    assert 5 <= tries <= 20
    text = one_line(error)
    assert f"was tried {tries} times" in text
    assert "train/states/c/0/0/0" in text
    assert "ProxySays" in text
    assert "run the same command again" in text
    proxy.stop()
    with pytest.raises(StoreUnreachable) as error:
        open_bank(url)
    assert "run the same command again" in one_line(error)


def test_a_store_that_hangs_counts_as_one_that_does_not_answer(proxy, url, monkeypatch):
    monkeypatch.setattr(remote, "_REQUEST_S", 0.2)
    monkeypatch.setenv(remote.PATIENCE, "0.5")
    proxy.fault = lambda method, path: time.sleep(0.5)
    with pytest.raises(StoreUnreachable) as error:
        open_bank(url)
    assert "did not answer" in one_line(error)


@pytest.fixture
def many_objects(server):
    """Objects by key, on a server of their own: that of the others remembers what it has seen."""
    objects = {f"train/{number:05d}": number % 7 for number in range(2100)}
    with s3.Server() as running:
        (running.bucket / "bank" / "train").mkdir(parents=True)
        for key, size in objects.items():
            (running.bucket / "bank" / key).write_bytes(b"x" * size)
        with s3.Proxy(running.port) as between:
            yield objects, between


def test_a_long_listing_goes_on_page_by_page(many_objects, monkeypatch):
    expected, proxy = many_objects
    for name, value in s3.environment(proxy.port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "_REQUEST_S", 1.5)
    lists = []

    def slow(method, path):
        if "list-type=2" not in path:
            return None
        lists.append(path)
        time.sleep(0.6)
        return "503" if len(lists) == 2 else None

    proxy.fault = slow
    assert place(f"s3://{s3.BUCKET}/bank").sizes("train") == expected
    assert len(lists) == 4  # of three pages the second was lost once
    assert sum("continuation-token" not in path and "start-after" not in path for path in lists) == 1


def test_without_patience_nothing_is_tried_again(proxy, url, monkeypatch):
    monkeypatch.setenv(remote.PATIENCE, "0")
    proxy.fault = lambda method, path: "503"
    with pytest.raises(StoreUnreachable):
        open_bank(url)
    assert len(proxy.requests) == 1
    monkeypatch.setenv(remote.PATIENCE, "long")
    with pytest.raises(CacheError, match="LAYERBANK_PATIENCE=long: give seconds"):
        open_bank(url)


def refusal(url, *, reading=False):
    """What is said at once, about reading or writing."""
    began = time.monotonic()
    with pytest.raises(CacheError) as error:
        open_bank(url) if reading else Writer(url, RECIPE, splits()).__enter__()
    assert time.monotonic() - began < 5, "it was tried again"
    return one_line(error)


@pytest.mark.parametrize("reading", [True, False])
def test_a_wrong_key_a_missing_bucket_and_no_bucket_are_said_at_once(proxy, keys, monkeypatch, reading):
    said = refusal("s3://nowhere/bank", reading=reading)
    assert "there is no such bucket" in said or (reading and "no bank at s3://nowhere/bank" in said)
    assert "--store s3://: no bucket is named: give s3://BUCKET/PATH" in refusal("s3://", reading=reading)
    assert "no bucket is named" in refusal("s3:///bank", reading=reading)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody-at-all")
    assert "check the credentials" in refusal(f"s3://{s3.BUCKET}/bank", reading=reading)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-" + s3.SECRET)
    assert "check the credentials" in refusal(f"s3://{s3.BUCKET}/bank", reading=reading)
    assert len(proxy.requests) <= 6


def test_no_credentials_are_said_at_once(proxy, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    # Where a machine of AWS would hand out those of its role.
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{proxy.port}/169.254.169.254")
    proxy.fault = lambda method, path: "404"
    assert "no credentials were found: set AWS_ACCESS_KEY_ID" in refusal(f"s3://{s3.BUCKET}/bank")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    missing = remote.connect("az://bucket/bank")._refusal(
        "reading", "key", OSError("http://169.254.169.254/")
    )
    assert "set AZURE_STORAGE_ACCOUNT_NAME and" in missing


def test_secrets_in_a_url_are_refused_and_not_repeated():
    said = refusal(f"s3://key:{s3.SECRET}@bucket/bank")
    assert "environment variables" in said


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_missing_package_is_named(monkeypatch, scheme):
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    assert "pip install 'layerbank[s3]'" in refusal(f"{scheme}://bucket/bank")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense://bucket/bank", "Protocol not known: nonsense: Give a folder, s3://BUCKET/PATH, gs://"),
        ("s4://bucket/bank", "did you mean s3://?"),
        ("s3:/bucket/bank", "s3:/bucket/bank is no URL: give s3://bucket/bank"),
        ("az://bucket/bank", "set AZURE_STORAGE_ACCOUNT_NAME"),
    ],
)
@pytest.mark.parametrize("reading", [True, False])
def test_a_url_that_cannot_be_right_is_refused_with_what_to_give(url, said, reading, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in refusal(url, reading=reading)
    assert not any(tmp_path.iterdir()), "it was taken for a folder"
    assert place("s3").maps, "a folder may have that name"


def test_an_endpoint_that_is_no_url_is_refused(keys, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    assert "the endpoint 127.0.0.1:9000 is no URL: set http://HOST:PORT" in refusal("s3://bucket/bank")


def test_a_user_in_a_url_is_no_secret_where_it_names_a_container(monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    assert remote.connect("abfss://container@account.dfs.core.windows.net/bank").url.startswith("abfss://c")
    for url in ("abfss://c:secret@account.dfs.core.windows.net/bank", "s3://key@bucket/bank"):
        assert "credentials do not belong into a URL" in refusal(url)


def test_a_store_that_may_only_be_read_is_read_and_not_written(proxy, url):
    fill(url)
    proxy.fault = lambda method, path: None if method in ("GET", "HEAD") else "403"
    bank = open_bank(url)
    assert bank.split("train").read_block(0)
    with pytest.raises(StoreRefused) as error, Writer(url, RECIPE, splits()) as writer:
        write(writer, "train", 0)
    assert "writing train/states/c" in one_line(error)
    assert len([fault for _, _, fault in proxy.requests if fault]) <= 2 * (len(RECIPE.layers) + 3)


@pytest.mark.parametrize("how", ["aws files", "fsspec"])
def test_keys_and_endpoint_may_come_from_elsewhere(proxy, url, monkeypatch, tmp_path, how):
    fill(url)
    for name in s3.environment(0):
        monkeypatch.delenv(name)
    endpoint = f"http://127.0.0.1:{proxy.port}"
    if how == "fsspec":
        for name, value in {"ENDPOINT_URL": endpoint, "KEY": s3.KEY, "SECRET": s3.SECRET}.items():
            monkeypatch.setenv(f"FSSPEC_S3_{name}", value)
    else:
        (tmp_path / "home/.aws").mkdir(parents=True)
        keys = f"[lab]\naws_access_key_id = {s3.KEY}\naws_secret_access_key = {s3.SECRET}\n"
        (tmp_path / "home/.aws/credentials").write_text(keys)
        (tmp_path / "home/.aws/config").write_text(f"[profile lab]\nendpoint_url = {endpoint}\n")
        monkeypatch.setenv("AWS_PROFILE", "lab")
    assert open_bank(url).split("train").read_block(0)


def test_reading_a_block_fetches_its_layers_at_a_time_and_keeps_none(server, proxy, url, tmp_path):
    ours, local = fill(url).split("train"), fill(tmp_path / "bank").split("train")
    proxy.requests.clear()
    proxy.most, proxy.fault = 0, lambda method, path: time.sleep(0.002)
    for block in range(ours.n_blocks):
        found, expected = ours.read_block(block, [3, 1]), local.read_block(block, [3, 1])
        assert all(a.tobytes() == b.tobytes() for a, b in zip(found, expected, strict=True))
        assert all(chunk.flags.writeable for chunk in found)
    assert proxy.most > 1
    assert len(proxy.requests) == 2 * ours.n_blocks
    assert ours._chunks.cache_info().currsize == 0
    ours.read_block(0, [3, 1])
    assert len(proxy.requests) == 2 * ours.n_blocks + 2, "something was kept"


def test_blocks_come_in_the_order_asked_for_and_no_more_than_asked_for_ahead(url, tmp_path, monkeypatch):
    ours, local = fill(url, MANY).split("train"), fill(tmp_path / "bank", MANY).split("train")
    order, real, fetched = [5, 0, 7, 1, 1, 9], ours._block, []
    monkeypatch.setattr(
        ours, "_block", lambda block, indices: fetched.append(block) or real(block, indices)
    )
    seen = []
    for block, states in ours.blocks([2, 0], order=order, ahead=2):
        seen.append(block)
        assert all(
            a.tobytes() == b.tobytes() for a, b in zip(states, local.read_block(block, [2, 0]), strict=True)
        )
        time.sleep(0.02)
        assert len(fetched) <= len(seen) + 2
    assert seen == order
    assert sorted(fetched) == sorted(order)
    stream = ours.blocks(ahead=3)
    next(stream)
    stream.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("bank-ahead")], "threads stayed"


def test_streaming_takes_the_memory_of_a_few_blocks(keys, url):
    long = {"train": rows([500, 500] * 24)}
    with Writer(url, large_recipe(), long) as writer:
        complete(writer)
    split = open_bank(url).split("train")
    block_bytes = len(split.layers) * split.block_tokens * split.width * split.dtype.itemsize
    assert split.n_blocks > 40
    for _ in split.blocks(order=[0, 1], ahead=2):
        pass
    tracemalloc.start()
    try:
        for _, states in split.blocks(ahead=2):
            del states
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * block_bytes, f"{peak / block_bytes:.1f} blocks of {split.n_blocks}"


def test_taking_tokens_fetches_each_chunk_once(proxy, url, tmp_path):
    ours, local = fill(url, MANY).split("train"), fill(tmp_path / "bank", MANY).split("train")
    tokens = np.flatnonzero(local.kind == 2)
    proxy.requests.clear()
    assert ours.take(tokens, [1, 3]).tobytes() == local.take(tokens, [1, 3]).tobytes()
    assert len(proxy.requests) == len({path for _, path, _ in proxy.requests}) == 2 * ours.n_blocks
    some = np.random.default_rng(0).permutation(tokens)
    assert ours.take(some, [1]).tobytes() == local.take(some, [1]).tobytes()
    examples = [3, 11, 4, 0]
    assert ours.gather(examples)[0].tobytes() == local.gather(examples)[0].tobytes()
    assert np.array_equal(ours.dask([2]).compute(scheduler="sync"), local.numpy([2]))


def test_a_split_travels_to_another_process_without_keys(url):
    split = fill(url).split("train")
    sent = pickle.dumps(split)
    assert s3.SECRET.encode() not in sent
    assert pickle.loads(sent).read_block(1)[0].tobytes() == split.read_block(1)[0].tobytes()


def test_below_a_url_banks_are_found(server, url):
    fill(url)
    above = place(url.rpartition("/")[0])
    assert [child.name for child in above.folders()] == [url]
    with pytest.raises(BankAbsent, match="no bank at"):
        open_bank(above.name)


@pytest.mark.parametrize("codec", ["none", "lz4"])
def test_any_url_of_fsspec_holds_a_bank(tmp_path, codec):
    local = fill(tmp_path / "bank", codec=codec)
    path = f"memory://{tmp_path.name}/bank"
    ours = fill(path, codec=codec)
    same_arrays(ours, local)
    assert ours.n_bytes == local.n_bytes
    assert verify(ours).ok
    assert [child.name for child in place(f"memory://{tmp_path.name}").folders()] == [path]
    with Writer(path, recipe(codec=codec), splits()) as writer:
        assert writer.missing("train") == []
    with pytest.raises(CacheError, match="seed = 3, asked for 4"):
        Writer(path, recipe(codec=codec, seed=4), splits()).__enter__()
    with suppress(ImportError):
        import fsspec

        fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def test_a_file_url_is_the_folder(tmp_path):
    ours = fill(f"file://{tmp_path}/bank")
    assert (tmp_path / "bank/zarr.json").exists()
    same_arrays(ours, open_bank(str(tmp_path / "bank")))
