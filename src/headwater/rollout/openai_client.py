"""Asking a server that speaks OpenAI's API: a few requests at a time, again where it is busy."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2

from headwater.config.teachers import OpenAITeacher
from headwater.errors import StageError
from headwater.rollout.vllm_client import Json, all_of

#: Waits between tries in seconds, where the server does not say how long.
_WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_LONGEST_WAIT = 120.0
_CONNECT_SECONDS = 10.0
_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})


class OpenAIClient:
    """One server, asked by at most `teacher.requests_in_flight` requests at once.

    key: sent with every request; "" for none.
    """

    def __init__(self, teacher: OpenAITeacher, key: str) -> None:
        self._teacher = teacher
        self._http = httpx2.Client(
            base_url=teacher.base_url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(teacher.request_seconds, connect=_CONNECT_SECONDS, pool=None),
            limits=httpx2.Limits(max_connections=teacher.requests_in_flight + 1),
        )
        self._threads = ThreadPoolExecutor(teacher.requests_in_flight, thread_name_prefix="openai")

    def close(self) -> None:
        """Close all connections; requests under way are not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._http.close()

    def check_model(self) -> None:
        """Raise StageError where the server lists its models and ours is not among them."""
        answer = self._send("GET", "/models", None)
        if answer.status_code != 200:
            if answer.status_code == 401:
                self._refuse("/models", answer)
            return  # not every server lists them; the first request will say
        try:
            names = [str(one["id"]) for one in answer.json()["data"]]
        except (ValueError, KeyError, TypeError):
            return
        if names and self._teacher.model not in names:
            shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise StageError(
                f"{self._teacher.base_url} has no model {self._teacher.model!r}; it has {shown}; "
                "name one of them in rollouts.model"
            )

    def ask(self, path: str, bodies: Sequence[Json]) -> list[Mapping[str, Any]]:
        """The answers to `bodies`, in order. Raises StageError."""
        asked = [self._threads.submit(self._ask, path, body) for body in bodies]
        all_of(asked)
        return [one.result() for one in asked]

    def _ask(self, path: str, body: Json) -> Mapping[str, Any]:
        answer = self._send("POST", path, body)
        if answer.status_code != 200:
            self._refuse(path, answer)
        try:
            content = answer.json()
        except ValueError:
            content = None
        if not isinstance(content, Mapping):
            raise StageError(
                f"{self._teacher.base_url} answers {path} with {answer.text[:200]!r}; expected a "
                "JSON object as OpenAI's API gives; correct rollouts.base_url"
            )
        return content

    def _send(self, method: str, path: str, body: Json | None) -> httpx2.Response:
        """The answer, asked for again while the server is busy or not there."""
        failed = ""
        for pause in (*_WAITS, None):
            wait = pause
            try:
                answer = self._http.request(method, path, json=body)
            except httpx2.TransportError as error:  # time limits too
                failed = f"{type(error).__name__}: {error}"
            else:
                if answer.status_code not in _AGAIN:
                    return answer
                failed = f"it answers {answer.status_code}: {answer.text[:200]}"
                wait = _asked_for(answer, pause)
            if wait is not None:
                time.sleep(wait)
        raise StageError(
            f"{self._teacher.base_url}: {failed}, {len(_WAITS) + 1} times in a row; see that the "
            "server runs, correct rollouts.base_url, lower rollouts.requests_in_flight, or raise "
            "rollouts.request_seconds; what was answered is kept"
        )

    def _refuse(self, path: str, answer: httpx2.Response) -> None:
        """Say what an answer that is none means. Raises StageError."""
        teacher, said = self._teacher, answer.text[:500]
        if answer.status_code in (401, 403):
            raise StageError(
                f"{teacher.base_url} refuses our key ({answer.status_code}); expected one in the "
                f"environment variable {teacher.key_variable}; set it, or name another in "
                "rollouts.key_variable"
            )
        if answer.status_code == 404:
            raise StageError(
                f"{teacher.base_url}{path} with model {teacher.model!r} answers 404: {said}; "
                "expected a server that speaks OpenAI's API and has the model; correct "
                "rollouts.base_url (it often ends in /v1) or rollouts.model"
            )
        raise StageError(
            f"{teacher.base_url} answers {answer.status_code} to {path}: {said}; correct what it "
            "says in the stage's settings"
        )


def _asked_for(answer: httpx2.Response, pause: float | None) -> float | None:
    """How long the server wants us to wait, or our own pause; None for the last try."""
    try:
        seconds = float(answer.headers.get("Retry-After", ""))
    except ValueError:  # none, or a date
        return pause
    return None if pause is None else min(max(seconds, 0.0), _LONGEST_WAIT)
