"""A real S3 server on the loopback, and a proxy before it that cuts, refuses and stops.

The server is ``rclone serve s3``. It serves a folder: a bank written through it lies there as files, to be
compared with a bank that was written locally. It lists folders from a memory of its own, so objects come
and go through it alone.
"""

import http.client
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

KEY, SECRET, BUCKET = "loopback-key", "loopback-secret-0123", "bucket"


def rclone() -> str | None:
    """An rclone that can serve S3, of this environment or the path: Debian's are too old."""
    beside = Path(sys.executable).with_name("rclone")
    found = str(beside) if beside.exists() else shutil.which("rclone")
    if found is None:
        return None
    known = subprocess.run([found, "serve", "s3", "--help"], capture_output=True, text=True)
    return found if "serve s3" in known.stdout.splitlines()[0] else None


def environment(port: int) -> dict[str, str]:
    """What a client needs to know, as AWS's own tools are told."""
    return {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }


class Server:
    """The server in a process of its own; a context manager that ends it."""

    def __init__(self) -> None:
        self.program = rclone()
        self.folder = Path(tempfile.mkdtemp(prefix="layerbank-s3-"))
        self.bucket = self.folder / BUCKET
        self.bucket.mkdir()
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def start(self) -> None:
        """Starts it, the second time on the port it had."""
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind(("127.0.0.1", self.port))
            self.port = free.getsockname()[1]
        flags = [
            "--addr",
            f"127.0.0.1:{self.port}",
            "--auth-key",
            f"{KEY},{SECRET}",
            "--config",
            os.devnull,
        ]
        command = [str(self.program), "serve", "s3", *flags, str(self.folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except OSError:
                time.sleep(0.05)
        raise RuntimeError("the S3 server did not start")

    def stop(self) -> None:
        """Ends it at once, as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


class Proxy:
    """Passes HTTP requests on, or does what `fault` says of one.

    Faults: ``503``, ``403`` and other numbers are answered; ``cut`` closes before anything is passed on,
    ``late`` after the server has done it and before the answer, ``half`` in the middle of the answer.
    """

    def __init__(self, port: int) -> None:
        self.upstream, self.port = port, 0
        self.fault = lambda method, path: None
        self.requests: list[tuple[str, str, str]] = []
        self.now = self.most = 0
        self.lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> "Proxy":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listens, the second time on the port it had."""
        self._server = _Listener(("127.0.0.1", self.port), type("Handler", (_Handler,), {"proxy": self}))
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Refuses connections and cuts those that are open."""
        if self._server is None:
            return
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._server = None
        with self.lock:
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def count(self, *faults: str) -> int:
        """How many requests met one of some faults."""
        return sum(fault in faults for _, _, fault in self.requests)

    def most_tries(self) -> int:
        """How often the request that failed most often in a row was sent."""
        run, most = Counter(), 0
        for method, path, fault in self.requests:
            run[method, path] = run[method, path] + 1 if fault else 0
            most = max(most, run[method, path] + 1)
        return most


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """A connection that was cut is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body leave together: apart, each answer waits for the other side's delayed acknowledgement.
    wbufsize = -1
    disable_nagle_algorithm = True
    proxy: Proxy

    def setup(self) -> None:
        super().setup()
        with self.proxy.lock:
            self.proxy._connections.add(self.connection)

    def finish(self) -> None:
        with self.proxy.lock:
            self.proxy._connections.discard(self.connection)
        super().finish()

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""

    def _pass(self) -> None:
        proxy = self.proxy
        with proxy.lock:
            fault = str(proxy.fault(self.command, self.path) or "")
            proxy.requests.append((self.command, self.path, fault))
            proxy.now += 1
            proxy.most = max(proxy.most, proxy.now)
        try:
            self._answer(fault)
        finally:
            with proxy.lock:
                proxy.now -= 1

    def _answer(self, fault: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault == "cut":
            self._cut()
            return
        if fault.isdigit():
            text = b"<Error><Code>ProxySays</Code><Message>not now</Message></Error>"
            self._send(int(fault), {}, text)
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy.upstream, timeout=30)
        try:
            with closing(connection) as upstream:
                upstream.request(self.command, self.path, body=body or None, headers=dict(self.headers))
                answer = upstream.getresponse()
                found, headers = answer.read(), dict(answer.getheaders())
        except (OSError, http.client.HTTPException):
            self._cut()
            return
        if fault == "late":
            self._cut()
            return
        self._send(answer.status, headers, found, half=fault == "half")

    def _send(self, status: int, headers: dict[str, str], body: bytes, *, half: bool = False) -> None:
        self.send_response_only(status)
        skipped = ("transfer-encoding", "connection", "content-length")
        for name, value in headers.items():
            if name.lower() not in skipped:
                self.send_header(name, value)
        length = {k.lower(): v for k, v in headers.items()}.get("content-length", str(len(body)))
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if half else body)
        if half:
            self._cut()

    def _cut(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)


for _method in ("GET", "PUT", "HEAD", "DELETE", "POST"):
    setattr(_Handler, f"do_{_method}", _Handler._pass)
