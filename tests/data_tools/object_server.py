"""A real S3 server on loopback (moto's) behind a layer that spoils a seeded share of the requests and counts what it did.

Run as a program it prints its port and serves until its standard input ends, so that it never outlives the test that started it.

Four kinds of fault: `503` and `500` without doing anything, `reset` (the connection is reset, in half of the cases after the request was
carried out, so that a caller that asks again finds its own work done), and `short` (the body ends in the middle).

Four more where they are named: `stall` (no answer before the caller's patience ends), `late` (requests that came at once are answered in
another order), `shifted` (another range than was asked for, and said so), and `garbage` (other bytes, and nobody says so).

Asked for it, the layer also kills a process with its N-th request (before or after it is carried out), or damages what is put.

`/-/stats` tells what was asked and spoiled; `/-/set?rate=0.05&seed=1&kinds=503,500&latency=0.02` tells and changes it; `/-/redirect?to=URL`
redirects; `/-/status/404` says so.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import parse_qs

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

STALL = 20.0  # seconds
KINDS = ("503", "500", "reset", "short")
SOMEBODY = "AWS4-HMAC-SHA256 Credential=id/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
PLAIN = [("Content-Type", "application/json")]


class Spoiler:
    """A WSGI layer around the server."""

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self.app = app
        self.lock = threading.Lock()
        self.rate, self.kinds, self.latency, self.rng = 0.0, list(KINDS), 0.0, random.Random(0)
        self.asked: list[tuple[str, str, str, int]] = []  # method, path, range, bytes of the answer
        self.spoiled: Counter[str] = Counter()
        self.now = self.most = 0
        self.victim, self.killing_request, self.late_kill = 0, 0, False

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if not environ.get("HTTP_AUTHORIZATION", "").startswith("AWS4"):  # the web's way, or Google's; all may read and write here
            environ["HTTP_AUTHORIZATION"] = SOMEBODY
            if environ.pop("HTTP_X_GOOG_IF_GENERATION_MATCH", None) == "0":  # where Google's XML interface is not S3's
                environ["HTTP_IF_NONE_MATCH"] = "*"
        if environ["PATH_INFO"].startswith("/-/"):
            return self.control(environ["PATH_INFO"], parse_qs(environ["QUERY_STRING"]), start)
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            kind = self.rng.choice(self.kinds) if self.rng.random() < self.rate else None
            late = self.rng.random() < 0.5
            self.killing_request -= 1
            kills = self.victim and self.killing_request == 0
        try:
            if kills and not self.late_kill:
                os.kill(self.victim, signal.SIGKILL)
            time.sleep(self.latency)
            if kills and self.late_kill:
                list(self.app(environ, lambda *_: None))
                os.kill(self.victim, signal.SIGKILL)
            return self.serve(environ, start, kind, late)
        finally:
            with self.lock:
                self.now -= 1

    def serve(self, environ: dict[str, Any], start: Callable[..., Any], kind: str | None, late: bool) -> Iterable[bytes]:
        if kind in ("500", "503"):
            self.note(environ, 0, kind)
            start(f"{kind} no", [("Content-Length", "0")])
            return []
        if kind == "reset" and not late:
            self.note(environ, 0, kind)
            return reset(environ, start)
        if kind == "stall":
            self.note(environ, 0, kind)
            time.sleep(STALL)
            return reset(environ, start)
        if kind == "late":
            time.sleep(float(str(len(self.asked))[-1]) / 50)
        if kind == "shifted" and (asked := re.fullmatch(r"bytes=(\d+)-(\d+)", environ.get("HTTP_RANGE", ""))):
            environ["HTTP_RANGE"] = f"bytes={int(asked[1]) + 3}-{int(asked[2]) + 3}"
        if kind == "damage" and environ["REQUEST_METHOD"] == "PUT":
            body = bytearray(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"] or 0)))
            body[len(body) // 2] ^= 1
            environ["wsgi.input"] = io.BytesIO(body)
            with self.lock:
                self.spoiled[kind] += 1
        answered: list[Any] = []
        body = b"".join(self.app(environ, lambda status, headers, *_: answered.extend((status, headers))))
        if kind == "reset":
            self.note(environ, 0, kind)
            return reset(environ, start)
        if kind == "short" and len(body) > 1 and environ["REQUEST_METHOD"] != "HEAD":
            self.note(environ, len(body) // 2, kind)
            start(*answered)
            return cut(environ, body)
        if kind == "garbage" and environ["REQUEST_METHOD"] == "GET" and "HTTP_RANGE" in environ:
            body = bytes(byte ^ 1 for byte in body)
        self.note(environ, len(body), kind if kind in ("late", "shifted", "garbage") else None)
        start(*answered)
        return [body]

    def note(self, environ: dict[str, Any], size: int, kind: str | None) -> None:
        with self.lock:
            self.asked.append((environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE", ""), size))
            if kind is not None:
                self.spoiled[kind] += 1

    def control(self, path: str, query: dict[str, list[str]], start: Callable[..., Any]) -> Iterable[bytes]:
        if path == "/-/redirect":
            start("302 there", [("Location", query["to"][0]), ("Content-Length", "0")])
            return []
        if path.startswith("/-/status/"):
            start(f"{path.rpartition('/')[2]} so", [("Content-Length", "0")])
            return []
        with self.lock:
            told = {"asked": self.asked, "spoiled": self.spoiled, "most": self.most}
            if path == "/-/set":
                self.rate = float(query.get("rate", ["0"])[0])
                self.latency = float(query.get("latency", ["0"])[0])
                self.kinds = query.get("kinds", [",".join(KINDS)])[0].split(",")
                self.rng = random.Random(int(query.get("seed", ["0"])[0]))
                self.asked, self.spoiled, self.most = [], Counter(), 0
                self.victim, self.killing_request = int(query.get("kill", ["0"])[0]), int(query.get("at", ["0"])[0])
                self.late_kill = "late" in query
        body = json.dumps(told).encode()
        start("200 OK", [*PLAIN, ("Content-Length", str(len(body)))])
        return [body]


def reset(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
    """Ends the connection with a TCP reset instead of an answer."""
    open_socket = environ["werkzeug.socket"]
    open_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(open_socket.detach())  # `close` would wait for the files that were made of it
    raise ConnectionResetError("as asked")


def cut(environ: dict[str, Any], body: bytes) -> Iterator[bytes]:
    yield body[: len(body) // 2]
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)


class Handler(WSGIRequestHandler):
    def log_request(self, *_: Any) -> None:
        pass

    log = log_request


def main() -> None:
    server = make_server("127.0.0.1", 0, Spoiler(DomainDispatcherApplication(create_backend_app)), threaded=True, request_handler=Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
