"""An HTTP server on loopback that serves one file and misbehaves in the ways that real ones do, one way per request."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Answer:
    """How to treat one request.

    cut: close the connection after this many bytes of body; None: send all
    ranges: honour a Range header; status: answer with this error instead; location: redirect there
    announce: Content-Length to claim instead of the true one; content: send these bytes instead of the file
    stall: seconds to wait in the middle of the body; trickle: send single bytes with this pause between them
    range_start: begin the 206 answer at this byte instead of the one asked for
    """

    cut: int | None = None
    ranges: bool = True
    status: int | None = None
    location: str | None = None
    announce: int | None = None
    length: bool = True
    content: bytes | None = None
    stall: float = 0.0
    trickle: float = 0.0
    range_start: int | None = None


@dataclass
class FileServer:
    """url: where the file is; answers: taken in turn, the last one for ever; requests: the Range header of each."""

    url: str
    content: bytes
    answers: list[Answer]
    requests: list[str | None] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)

    def next_answer(self) -> Answer:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def _respond(handler: BaseHTTPRequestHandler, server: FileServer) -> None:
    wanted = handler.headers.get("Range")
    server.requests.append(wanted)
    answer = server.next_answer()
    if answer.location is not None:
        handler.send_response(302)
        handler.send_header("Location", answer.location)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return
    if answer.status is not None:
        handler.send_error(answer.status)
        return
    body = server.content if answer.content is None else answer.content
    if wanted and answer.ranges:
        start = int(wanted.removeprefix("bytes=").rstrip("-"))
        start = start if answer.range_start is None else answer.range_start
        if start >= len(body):
            handler.send_error(416)
            return
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        body = body[start:]
    else:
        handler.send_response(200)
    if answer.length:
        handler.send_header("Content-Length", str(len(body) if answer.announce is None else answer.announce))
    handler.end_headers()
    _send(handler, server, body if answer.cut is None else body[: answer.cut], answer)


def _send(handler: BaseHTTPRequestHandler, server: FileServer, body: bytes, answer: Answer) -> None:
    if answer.trickle:
        for byte in body:
            if server.closing.wait(answer.trickle):
                return
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
        return
    half = len(body) // 2 if answer.stall else len(body)
    handler.wfile.write(body[:half])
    handler.wfile.flush()
    if answer.stall:
        server.closing.wait(answer.stall)
        handler.wfile.write(body[half:])


@contextlib.contextmanager
def serving(content: bytes, *answers: Answer) -> Iterator[FileServer]:
    """Serve `content` on a free port of 127.0.0.1, giving `answers` in turn (a faultless one if there are none)."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"  # one request a connection: a cut is then just a close

        def do_GET(self) -> None:
            with contextlib.suppress(OSError):  # the client went away: it is entitled to
                _respond(self, server)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        http.block_on_close = False
        server = FileServer(f"http://127.0.0.1:{http.server_address[1]}/file.bin", content, list(answers) or [Answer()])
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            http.shutdown()
            thread.join()
