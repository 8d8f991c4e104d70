"""A server in this process that speaks OpenAI's API, and answers as a test tells it to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

Answer = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class OpenAIServer:
    """Answers POSTs with `answer(body)`; knows the models `models`.

    refusals: statuses that come before any answer, each with Retry-After 0. key: asked for, if any.
    """

    def __init__(self, answer: Answer, models: tuple[str, ...] = ("m",), key: str = "") -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.refusals: list[int] = []
        self.most = 0
        self.seconds = 0.0
        self._running = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if self._key():
                    self._send(200, {"data": [{"id": name} for name in models]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if not self._key():
                    return
                with outer._lock:
                    outer._running += 1
                    outer.most = max(outer.most, outer._running)
                    refusal = outer.refusals.pop(0) if outer.refusals else None
                    if refusal is None:
                        outer.asked.append({"path": self.path, **body})
                time.sleep(outer.seconds)
                with outer._lock:
                    outer._running -= 1
                if refusal is not None:
                    self._send(refusal, {"error": "busy"})
                else:
                    self._send(200, answer(body))

            def _key(self) -> bool:
                outer.keys.add(self.headers["Authorization"])
                if key and self.headers["Authorization"] != f"Bearer {key}":
                    self._send(401, {"error": "who are you"})
                    return False
                return True

            def _send(self, status: int, content: Mapping[str, Any]) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> OpenAIServer:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def says(text: str, finish: str = "stop") -> Answer:
    """A chat's answer: the same text to everything, of three tokens as the server counts."""

    def answer(body: Mapping[str, Any]) -> Mapping[str, Any]:
        choice = {"message": {"content": text}, "finish_reason": finish}
        count = int(body["n"])
        return {"choices": [choice] * count, "usage": {"completion_tokens": 3 * count}}

    return answer
