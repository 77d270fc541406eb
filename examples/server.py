"""Serve clips over HTTP with the standard library alone: `python examples/server.py [port] [model]`, then

    curl 'localhost:8080/clip?prompt=calm+piano&seconds=8&seed=7' -o clip.wav

Each request has a thread, and the threads share one model. An invalid request is answered with status 400 and the
reason in one line, a device without memory with status 503.
"""

from __future__ import annotations

import io
import sys
import wave
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import presto_rt
from presto_rt.errors import InvalidInputError, OutOfMemoryError

MAX_SECONDS = 60.0
NUMBERS = {"seconds": float, "seed": int, "steps": int, "guidance": float, "bpm": float, "deadline_ms": float}


def number(name: str, text: str) -> float:
    """Convert the text of a query's number to its type in NUMBERS. Raises InvalidInputError."""
    try:
        return NUMBERS[name](text)
    except ValueError:
        raise InvalidInputError(f"{name} must be a number, not {text!r}") from None


class Handler(BaseHTTPRequestHandler):
    """Handler of `GET /clip?prompt=...&seconds=...`, whose answer is a .wav file."""

    model: presto_rt.Pipeline

    def do_GET(self) -> None:
        """Answer a request for a clip; the name is that of `BaseHTTPRequestHandler`."""
        parts = urlsplit(self.path)
        if parts.path != "/clip":
            self.answer(404, "text/plain", b"request /clip?prompt=...\n")
            return
        try:
            self.answer(200, "audio/wav", self.clip(parse_qs(parts.query)))
        except OutOfMemoryError as error:
            self.answer(503, "text/plain", f"{error}\n".encode())
        except InvalidInputError as error:
            self.answer(400, "text/plain", f"{error}\n".encode())

    def clip(self, query: dict[str, list[str]]) -> bytes:
        """Generate the clip of a query and return it as a 16-bit .wav file."""
        options = {name: number(name, query[name][0]) for name in NUMBERS if name in query}
        if options.get("seconds", 0.0) > MAX_SECONDS:
            raise InvalidInputError(f"seconds must be at most {MAX_SECONDS:g}, not {options['seconds']:g}")
        audio = self.model.generate(query.get("prompt", [""])[0], **options)
        out = io.BytesIO()
        with wave.open(out, "wb") as file:
            file.setnchannels(2)
            file.setsampwidth(2)
            file.setframerate(audio.sample_rate)
            file.writeframes(audio.to_int16().tobytes())
        return out.getvalue()

    def answer(self, code: int, kind: str, body: bytes) -> None:
        """Send a whole answer; `kind` is its media type."""
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def serve(port: int = 8080, model: str = "nano") -> ThreadingHTTPServer:
    """Load the model and return a server, ready for `serve_forever`. Port 0 takes a free port."""
    loaded = presto_rt.load(model, backend="graph")
    handler = type("ModelHandler", (Handler,), {"model": loaded})
    return ThreadingHTTPServer(("127.0.0.1", port), handler)


if __name__ == "__main__":
    with serve(*map(int, sys.argv[1:2]), *sys.argv[2:3]) as server:
        print(f"listening on http://127.0.0.1:{server.server_port}/clip?prompt=calm+piano")
        server.serve_forever()
