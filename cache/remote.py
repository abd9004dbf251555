"""Object stores: connecting to one, and requests that survive its bad minutes.

``s3://``, ``gs://`` and ``az://`` go through obstore, every other URL through fsspec; both are wrapped
once, so that a cut connection, a 503, a time-out or a server that is down for a while costs a wait and
no more. What a wait cannot cure (no credentials, no bucket, no permission) is said at once.
"""

import asyncio
import configparser
import logging
import os
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from zarr.abc.store import Store
from zarr.storage import FsspecStore, ObjectStore, WrapperStore

from cache.errors import CacheError, StoreRefused, StoreUnreachable

PATIENCE = "LAYERBANK_PATIENCE"
"""Environment variable: seconds for which a request is tried again before the command gives up."""

_PATIENCE_S = 60.0
_REQUEST_S = 30.0
_LISTING_S = 600.0  # fsspec lists all in one call, which shows no progress
_PAGE = 1000  # names in the answer of an object store, at most
_REQUEST_BYTES = 64 * 2**20
"""What may pass in the time of a request; one for more has more time."""

_LONGEST_REQUEST_S = 3600.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 5.0
_NOTICE_S = 5.0

_GOOGLE, _AZURE = {"gs", "gcs"}, {"az", "azure", "abfs", "abfss", "adl"}
OBSTORE = {"s3", "s3a"} | _GOOGLE | _AZURE
"""Kinds of URL that name a bucket."""

_NO_USE = (
    "PermissionDeniedError", "UnauthenticatedError", "NotSupportedError", "InvalidPathError",
    "NoCredentialsError", "PartialCredentialsError", "UnknownConfigurationKeyError",
)  # fmt: skip
"""Errors of obstore, botocore and others that no wait cures. By name: none of them need be installed."""

_OWN_FAULTS = (ValueError, TypeError, KeyError, AttributeError, AssertionError)

_log = logging.getLogger(__name__)
T = TypeVar("T")


class _Objects(ObjectStore[Any]):  # type: ignore[misc]
    """A bucket through obstore."""

    async def set(self, key: str, value: Any) -> None:
        """Writes an object by one PUT, which is whole or has not happened."""
        import obstore

        self._check_writable()
        await obstore.put_async(self.store, key, value.as_buffer_like(), use_multipart=False)

    async def set_if_not_exists(self, key: str, value: Any) -> None:
        """Writes an object where there is none.

        Asks first: servers that know no conditional PUT overwrite silently, and Zarr puts an empty group
        above every array this way.
        """
        if not await self.exists(key):
            await self.set(key, value)

    async def pages(self, prefix: str, after: str | None) -> AsyncIterator[dict[str, int]]:
        """Bytes of every object below a prefix and after a key, a page at a time, in the order of keys."""
        import obstore

        async for page in obstore.list(self.store, prefix or None, offset=after, chunk_size=_PAGE):
            yield {meta["path"]: int(meta["size"]) for meta in page}

    async def folders(self) -> list[str]:
        """Names right below the root that have something below them."""
        import obstore

        found = await obstore.list_with_delimiter_async(self.store)
        return sorted(prefix.rstrip("/").rpartition("/")[2] for prefix in found["common_prefixes"])


class _Files(FsspecStore):  # type: ignore[misc]
    """Any other file system, through fsspec."""

    async def pages(self, prefix: str, after: str | None) -> AsyncIterator[dict[str, int]]:
        """Bytes of every file below a prefix, as one page."""
        root = f"{self.path}/{prefix}".rstrip("/")
        found = await self.fs._find(root, detail=True)
        yield {path.removeprefix(f"{self.path}/"): int(facts["size"]) for path, facts in found.items()}

    async def folders(self) -> list[str]:
        """Names of the folders right below the root."""
        try:
            found = await self.fs._ls(self.path, detail=True)
        except FileNotFoundError:
            return []
        folders = (facts["name"] for facts in found if facts["type"] == "directory")
        return sorted(name.rstrip("/").rpartition("/")[2] for name in folders)


def connect(url: str, read_only: bool = False) -> "RemoteStore":
    """Opens a URL as a Zarr store whose requests are tried again.

    Raises:
        CacheError: the URL names no bucket or carries a secret, or its package is not installed.
    """
    parts = urlsplit(url)
    # abfss://CONTAINER@ACCOUNT… and sftp://USER@HOST… say no secret; s3://KEY@… would.
    if parts.password or (parts.username and parts.scheme in OBSTORE - _AZURE):
        raise CacheError(
            f"--store {parts.scheme}://…@{parts.hostname}{parts.path}: credentials do not belong into a "
            "URL, which is stored and printed: give them by environment variables"
        )
    if not parts.netloc and parts.scheme in OBSTORE:
        raise CacheError(f"--store {url}: no bucket is named: give {parts.scheme}://BUCKET/PATH")
    try:
        made = _objects(url.rstrip("/")) if parts.scheme in OBSTORE else _Files.from_url(url.rstrip("/"))
    except ImportError as error:
        package = "layerbank[s3]" if parts.scheme in OBSTORE else None
        cure = f"pip install '{package}'" if package else reason_of(error)
        raise CacheError(f"--store {url}: a package for such URLs is not installed: {cure}") from error
    except CacheError:
        raise
    except Exception as error:
        cure = _keys_for(parts.scheme) if parts.scheme in OBSTORE else _other_kind(parts.scheme)
        raise CacheError(f"--store {url} cannot be used: {reason_of(error)}: {cure}") from error
    return RemoteStore(made.with_read_only(read_only), url=url.rstrip("/"))


def _keys_for(scheme: str) -> str:
    """Where the user gives the credentials of a kind of store."""
    if scheme in _AZURE:
        return "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"
    if scheme in _GOOGLE:
        return "set GOOGLE_APPLICATION_CREDENTIALS to the file of a key"
    return (
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or AWS_SKIP_SIGNATURE=true for a "
        "public bucket"
    )


def _other_kind(scheme: str) -> str:
    near = get_close_matches(scheme, ["s3", "gs", "az", "file"], 1, cutoff=0.5)
    meant = f"did you mean {near[0]}://? " if near else ""
    return f"{meant}Give a folder, s3://BUCKET/PATH, gs://, az://, or a URL that fsspec knows"


def _objects(url: str) -> _Objects:
    from obstore.store import from_url

    # How long a request may take is bounded where its size is known.
    options: Any = {"timeout": f"{_LONGEST_REQUEST_S:.0f}s", "connect_timeout": "5s"}
    config: Any = _s3_config() if urlsplit(url).scheme in ("s3", "s3a") else {}
    endpoint = str(config.get("endpoint", ""))
    if endpoint and not re.match("https?://.", endpoint):
        raise CacheError(
            f"--store {url}: the endpoint {endpoint.rpartition('@')[2]} is no URL: set http://HOST:PORT or "
            "https://"
        )
    if endpoint.startswith("http://"):
        options["allow_http"] = True
    # Tried again here, where the user's patience is known, and not in two places.
    return _Objects(from_url(url, config=config, client_options=options, retry_config={"max_retries": 0}))


def _s3_config() -> dict[str, Any]:
    """Endpoint, region and keys: of AWS's environment variables, fsspec's configuration, AWS's files.

    obstore itself reads the environment and asks a cloud machine for its role.
    """
    config = _aws_files() if "AWS_ACCESS_KEY_ID" not in os.environ else {}
    fsspec = _fsspec_config()
    names = {"key": "access_key_id", "secret": "secret_access_key", "token": "session_token"}
    for name, ours in {**names, "endpoint_url": "endpoint", "anon": "skip_signature"}.items():
        if fsspec.get(name):
            config[ours] = str(fsspec[name])
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        if os.environ.get(name):
            config["endpoint"] = os.environ[name]
    return config


def _fsspec_config() -> dict[str, Any]:
    from fsspec import config

    now: dict[str, dict[str, Any]] = {}
    config.set_conf_env(now)
    found = {**config.conf.get("s3", {}), **now.get("s3", {})}
    return {**found.get("client_kwargs", {}), **found}


def _aws_files() -> dict[str, Any]:
    """A profile of ``~/.aws``, as the AWS command line keeps it."""
    home, profile = Path("~/.aws").expanduser(), os.environ.get("AWS_PROFILE", "default")
    parser, found = configparser.ConfigParser(interpolation=None), dict[str, Any]()
    keys = os.environ.get("AWS_SHARED_CREDENTIALS_FILE", str(home / "credentials"))
    try:
        parser.read([os.environ.get("AWS_CONFIG_FILE", str(home / "config")), keys])
    except configparser.Error:  # not a file of that kind; the store says what it lacks
        return found
    names = {
        "aws_access_key_id": "access_key_id",
        "aws_secret_access_key": "secret_access_key",
        "aws_session_token": "session_token",
        "region": "region",
        "endpoint_url": "endpoint",
    }
    for section in (f"profile {profile}", profile):
        if parser.has_section(section):
            found |= {
                ours: parser[section][name] for name, ours in names.items() if name in parser[section]
            }
    if "AWS_REGION" in os.environ or "AWS_DEFAULT_REGION" in os.environ:
        found.pop("region", None)
    return found


def patience_s() -> float:
    """Seconds for which a request is tried again.

    Raises:
        CacheError: the environment variable is no number.
    """
    text = os.environ.get(PATIENCE, "")
    try:
        return max(0.0, float(text)) if text else _PATIENCE_S
    except ValueError as error:
        raise CacheError(f"{PATIENCE}={text}: give seconds, such as 60") from error


def _limit_s(n_bytes: int) -> float:
    """How long a request may take in which so many bytes pass."""
    return min(_LONGEST_REQUEST_S, _REQUEST_S * max(1.0, n_bytes / _REQUEST_BYTES))


class RemoteStore(WrapperStore[Any]):  # type: ignore[misc]
    """A Zarr store whose every request is tried again until it is answered or patience ends.

    Every request may be sent twice: each writes or reads the same bytes again.
    """

    _noticed_s = -_NOTICE_S

    def __init__(self, store: Any, *, url: str) -> None:
        super().__init__(store)
        self.url = url
        self._patience_s = patience_s()
        self._answered = False

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy in another process connects itself; no key travels with it."""
        return connect, (self.url, self.read_only)

    def __str__(self) -> str:
        return self.url

    def _with_store(self, store: Any) -> "RemoteStore":
        return type(self)(store, url=self.url)

    async def attempt(
        self, doing: str, key: str, request: Callable[[], Awaitable[T]], *, limit_s: float = _REQUEST_S
    ) -> T:
        """Sends a request until it is answered.

        Args:
            doing: what it does, for the messages.
            key: to what.
            request: sends it once.
            limit_s: after which one that is not answered counts as lost.

        Raises:
            StoreRefused: the store says no, and would say it again.
            StoreUnreachable: patience ended.
        """
        began, tries = time.monotonic(), 0
        while True:
            tries += 1
            try:
                answer = await asyncio.wait_for(request(), limit_s)
                self._answered = True
                return answer
            except (CacheError, *_OWN_FAULTS):
                raise
            except Exception as error:
                if is_final(error, answered=self._answered):
                    raise StoreRefused(self._refusal(doing, key, error)) from error
                wait = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (tries - 1)) * random.uniform(0.5, 1.0)
                waited = time.monotonic() - began
                if waited + wait > self._patience_s:
                    raise StoreUnreachable(
                        f"{self.url} did not answer: {doing} {key or 'it'} was tried {tries} times in "
                        f"{waited:.0f} s ({reason_of(error)}). What is written is whole: run the same "
                        f"command again when the store is back, or set {PATIENCE} to more seconds"
                    ) from error
                self._notice(waited, error)
                await asyncio.sleep(wait)

    def _notice(self, waited: float, error: BaseException) -> None:
        """Tells the user why nothing moves; of many requests that wait, one speaks."""
        now = time.monotonic()
        if waited > 1 and now - RemoteStore._noticed_s > _NOTICE_S:
            RemoteStore._noticed_s = now
            _log.warning("%s does not answer, trying again (%s)", self.url, reason_of(error))

    def _refusal(self, doing: str, key: str, error: BaseException) -> str:
        why, status = reason_of(error), _status(error)
        if "169.254.169.254" in str(error) or "Credentials" in type(error).__name__:
            return f"{self.url}: no credentials were found: {_keys_for(urlsplit(self.url).scheme)}"
        if status == 404 or isinstance(error, FileNotFoundError):
            return f"{self.url}: there is no such bucket or place ({why}): make it, or name another"
        if isinstance(error, NotImplementedError):
            return f"{self.url}: such a URL can be read only: name another --store"
        return (
            f"{self.url}: {doing} {key or 'it'} was refused ({why}): check the credentials and their rights"
        )

    async def get(self, key: str, prototype: Any, byte_range: Any = None, *, n_bytes: int = 0) -> Any:
        """Reads an object, None where there is none."""
        request = partial(self._store.get, key, prototype, byte_range)
        return await self.attempt("reading", key, request, limit_s=_limit_s(n_bytes))

    async def get_partial_values(self, prototype: Any, key_ranges: Iterable[Any]) -> Any:
        """Reads ranges of objects."""
        wanted = list(key_ranges)
        return await self.attempt("reading", "", lambda: self._store.get_partial_values(prototype, wanted))

    async def exists(self, key: str) -> bool:
        """Whether there is an object."""
        return await self.attempt("looking for", key, lambda: self._store.exists(key))

    async def set(self, key: str, value: Any) -> None:
        """Writes an object."""
        await self.attempt(
            "writing", key, lambda: self._store.set(key, value), limit_s=_limit_s(len(value))
        )

    async def set_if_not_exists(self, key: str, value: Any) -> None:
        """Writes an object where there is none."""
        await self.attempt("writing", key, lambda: self._store.set_if_not_exists(key, value))

    async def delete(self, key: str) -> None:
        """Removes an object."""
        await self.attempt("removing", key, lambda: self._store.delete(key))

    async def delete_dir(self, prefix: str) -> None:
        """Removes what is below a prefix."""
        await self.attempt("removing", prefix, lambda: self._store.delete_dir(prefix))

    async def clear(self) -> None:
        """Removes everything."""
        await self.delete_dir("")

    async def is_empty(self, prefix: str) -> bool:
        """Whether nothing is below a prefix."""
        return not [key async for key in self.list_dir(prefix)]

    async def getsize(self, key: str) -> int:
        """Bytes of an object."""
        return await self.attempt("looking for", key, lambda: self._store.getsize(key))

    async def sizes(self, prefix: str) -> Mapping[str, int]:
        """Bytes of every object below a prefix, by key."""
        return {key: size async for page in self._pages(prefix) for key, size in page.items()}

    async def _pages(self, prefix: str) -> AsyncIterator[Mapping[str, int]]:
        """What is below a prefix, by key. A page that got lost is asked for again, no page before it."""
        pages: AsyncIterator[dict[str, int]] | None = None
        last: str | None = None

        async def following() -> dict[str, int] | None:
            nonlocal pages
            mine = self._store.pages(prefix, last) if pages is None else pages
            pages = None  # where this fails
            page = await anext(mine, None)
            pages = mine
            return page

        limit_s = _LISTING_S if isinstance(self._store, _Files) else _REQUEST_S
        while (page := await self.attempt("listing", prefix, following, limit_s=limit_s)) is not None:
            yield page
            last = max(page, default=last)

    async def folders(self) -> list[str]:
        """Names right below the root that have something below them."""
        return await self.attempt("listing", "", self._store.folders)

    def list(self) -> AsyncIterator[str]:
        """Every key."""
        return self._keys("")

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Every key below a prefix."""
        return self._keys(prefix)

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Names right below a prefix."""
        return self._names(prefix)

    async def _keys(self, prefix: str) -> AsyncIterator[str]:
        async for page in self._pages(prefix):
            for key in page:
                yield key

    async def _names(self, prefix: str) -> AsyncIterator[str]:
        async def collect() -> Any:
            return [name async for name in self._store.list_dir(prefix)]

        for name in await self.attempt("listing", prefix, collect):
            yield name

    async def _set_many(self, values: Iterable[tuple[str, Any]]) -> None:
        # Not of the wrapped store, whose requests nobody tries again.
        await Store._set_many(self, values)

    async def _get_many(self, requests: Iterable[Any]) -> Any:
        async for answer in Store._get_many(self, requests):
            yield answer


def is_final(error: BaseException, *, answered: bool) -> bool:
    """Whether trying again is of no use.

    Args:
        error: of one request.
        answered: whether the store has answered before: then missing credentials are a passing trouble
            of the service that hands them out.
    """
    status = _status(error)
    if "169.254.169.254" in str(error):
        return not answered
    if status is not None:
        return 400 <= status < 500 and status not in (408, 425, 429)
    final = (PermissionError, FileNotFoundError, NotImplementedError, ImportError)
    return isinstance(error, final) or type(error).__name__ in _NO_USE


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error of obstore's, aiohttp's or botocore's."""
    status = getattr(error, "status", None)
    found = re.search(r"status code: (\d{3})", str(error))
    return int(found[1]) if found else status if isinstance(status, int) else None


def reason_of(error: BaseException) -> str:
    """What went wrong, in a few words and without a secret."""
    text = str(error).partition("\n\nDebug source")[0]
    code, message = (re.search(rf"<{tag}>(.*?)</{tag}>", text, re.S) for tag in ("Code", "Message"))
    if code and message:
        text = f"{code[1]}: {message[1]}"
    text = " ".join(re.sub(r"^.* - (?=HTTP error|Server returned)", "", text, flags=re.S).split())
    for name, value in os.environ.items():
        if value and len(value) > 3 and re.search("SECRET|TOKEN|PASSWORD", name):
            text = text.replace(value, "…")
    return text[:200] or type(error).__name__
