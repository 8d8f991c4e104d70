"""Asking one vLLM server: many requests at a time, over connections that stay open.

What is asked may be asked again: a request names its tokens and its seed, and nothing that is
generated changes the server. So a connection that breaks, or a server that is busy, is tried
again; a server that is gone is not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import httpx2

from headwater.errors import StageError
from headwater.rollout.vllm_extension.headwater_vllm import PROTOCOL

#: Waits between tries in seconds: a server that was restarted by its owner is back by then.
_WAITS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
#: Closed by us before vLLM closes it, after five seconds.
_KEEPALIVE_SECONDS = 4.0
_CONNECT_SECONDS = 10.0
_BUSY = frozenset({429, 503})
#: An engine that died answers with an error once, and its server then ends.
_DYING_SECONDS = 5.0
_LEAVE_SECONDS = 5.0

Json = Mapping[str, Any]


class ServerDied(Exception):
    """A server that was there is gone; its message quotes the server's last words."""


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server says it is.

    workers: processes that share the model. copies: engines behind the address, with all of it.
    """

    vocab_size: int
    max_model_len: int
    max_logprobs: int
    logprobs_mode: str
    dtype: str
    workers: int = 1
    copies: int = 1


class VLLMClient:
    """One server, asked by at most `in_flight` requests at once.

    url, key: where it is, and the key it asks for. request_seconds: how long an answer may take.
    is_alive, last_words: what is known of the server's process, if it is ours.
    """

    def __init__(
        self,
        url: str,
        key: str,
        *,
        in_flight: int,
        request_seconds: float,
        is_alive: Callable[[], bool] | None = None,
        last_words: Callable[[], str] | None = None,
    ) -> None:
        self.url = url
        self._is_alive = is_alive
        self._last_words = last_words
        self._http = httpx2.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(request_seconds, connect=_CONNECT_SECONDS, pool=None),
            limits=httpx2.Limits(
                max_connections=in_flight + 1,
                max_keepalive_connections=in_flight + 1,
                keepalive_expiry=_KEEPALIVE_SECONDS,
            ),
            trust_env=is_alive is None,  # proxies are for servers elsewhere
        )
        self._threads = ThreadPoolExecutor(in_flight, thread_name_prefix="vllm")

    def close(self) -> None:
        """Close all connections; requests under way are not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._http.close()

    def info(self) -> ServerInfo:
        """What the server is. Raises StageError for one that lacks our extension."""
        found = self._ask("GET", "/headwater/info", None)
        if found["protocol"] != PROTOCOL:
            raise StageError(
                f"{self.url} runs headwater's extension with protocol {found['protocol']}, "
                f"expected {PROTOCOL}: start it again with this version's on its PYTHONPATH"
            )
        names = ServerInfo.__dataclass_fields__
        return ServerInfo(**{name: found[name] for name in names})

    def load(self, folder: str, version: str, vocab_size: int) -> None:
        """Let it answer with the weights of the safetensors in `folder`, as `version`."""
        body = {"folder": folder, "version": version, "vocab_size": vocab_size}
        self._ask("POST", "/headwater/weights", body)

    def join(self, terms: Json) -> None:
        """Let its workers join a link with these terms; answers when they have."""
        self._ask("POST", "/headwater/join", terms, again=False)

    def receive(self, link: str, plan: Sequence[Any], version: str, vocab_size: int) -> None:
        """Let it answer with the weights that come through the link so named, as `version`."""
        body = {"link": link, "plan": plan, "version": version, "vocab_size": vocab_size}
        self._ask("POST", "/headwater/weights", body, again=False)

    def leave(self, link: str) -> None:
        """Let its workers leave the link so named, if the server is there to be told, and soon."""
        with suppress(httpx2.HTTPError):
            self._http.post("/headwater/leave", json={"link": link}, timeout=_LEAVE_SECONDS)

    def sleep(self) -> None:
        """Let it move its weights to the host's memory and forget its cache; it answers nothing."""
        self._ask("POST", "/headwater/sleep", {})

    def wake(self) -> None:
        """Let it take its weights back, those that were loaded last."""
        self._ask("POST", "/headwater/wake", {})

    def generate(
        self, bodies: Sequence[Json], answers: list[Json | None], places: Sequence[int]
    ) -> None:
        """Ask for `bodies[p]` at each of `places` that has no answer, and keep it in `answers[p]`.

        Answers that came are kept when one fails. Raises ServerDied and StageError.
        """

        def one(place: int) -> None:
            answers[place] = self._ask("POST", "/inference/v1/generate", bodies[place])

        asked = [self._threads.submit(one, p) for p in places if answers[p] is None]
        all_of(asked)

    def _ask(
        self, method: Literal["GET", "POST"], path: str, body: Json | None, *, again: bool = True
    ) -> Any:
        """The answer's content, asked for as often as is worth it; once where not `again`."""
        failed, waits = "", _WAITS if again else ()
        for pause in (*waits, None):
            try:
                answer = self._http.request(method, path, json=body)
            except httpx2.TimeoutException as error:
                raise StageError(
                    f"{self.url}: no answer to {path} in time ({type(error).__name__}); raise "
                    "compute.rollouts.request_seconds (compute.scoring's for a teacher), or ask "
                    "for less at once with a lower requests_in_flight"
                ) from None
            except httpx2.TransportError as error:
                failed = f"{type(error).__name__}: {error}"
            else:
                if answer.status_code == 200:
                    return answer.json()
                if answer.status_code not in _BUSY:
                    self._refuse(path, answer)
                failed = f"it answers {answer.status_code}"
            self._look(failed, 0.0 if again else _DYING_SECONDS)
            if pause is not None:
                time.sleep(pause)
        seconds = sum(waits)
        raise StageError(
            f"{self.url}: {failed}, for {seconds:.0f} seconds; start the server again, correct "
            f"compute.rollouts.urls, or lower requests_in_flight{self._quoted()}"
        )

    def _look(self, failed: str, seconds: float = 0.0) -> None:
        """Raises ServerDied where the server's process is ours and ends within so many seconds."""
        until = time.monotonic() + seconds
        while self._is_alive is not None:
            if not self._is_alive():
                raise ServerDied(f"{self.url} is gone ({failed}){self._quoted()}")
            if time.monotonic() >= until:
                return
            time.sleep(0.1)

    def _refuse(self, path: str, answer: httpx2.Response) -> None:
        """Say what an answer that is none means. Raises ServerDied and StageError."""
        said = answer.text[:500]
        if answer.status_code == 401:
            raise StageError(
                f"{self.url} refuses our key; set the environment variable VLLM_API_KEY (or the "
                "one that key_variable names) to what the server was started with"
            )
        if answer.status_code == 404:
            raise StageError(
                f"{self.url} has no {path}: expected a vLLM server with headwater's extension, "
                "because weights can be pushed to no other and no other says which it answers "
                "with; start it as docs/clusters.md says, or remove urls and let each stage start "
                "its own"
            )
        if answer.status_code == 500:
            self._look(said, _DYING_SECONDS)
        raise StageError(
            f"{self.url} answers {answer.status_code} to {path}: {said}; correct what it says, or "
            f"use compute.rollouts: in_process (compute.scoring for a teacher){self._quoted()}"
        )

    def _quoted(self) -> str:
        return "" if self._last_words is None else f"\nits log ends with:\n{self._last_words()}"


def all_of(asked: Sequence[Future[Any]]) -> None:
    """Wait for all; when one fails, forget those that have not begun and raise its error.

    That a server is gone is said before what else went wrong: it is why.
    """
    done, _ = wait(asked, return_when=FIRST_EXCEPTION)
    if all(one.exception() is None for one in done):
        return
    for one in asked:
        one.cancel()
    wait(asked)
    errors = [e for one in asked if not one.cancelled() and (e := one.exception()) is not None]
    raise min(errors, key=lambda error: not isinstance(error, ServerDied))
