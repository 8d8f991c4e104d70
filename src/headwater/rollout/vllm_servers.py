"""The servers that one stage asks: its own, started again when they die, or those at given urls.
Or vLLM in this process, which is asked in the same way.

Whoever asks says which weights the answers must come from. Every answer says which it came from,
token by token, and an answer from others is never used.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from headwater.config.compute import VLLM
from headwater.errors import StageError
from headwater.rollout.vllm_client import Json, ServerDied, ServerInfo, VLLMClient
from headwater.rollout.vllm_link import Link
from headwater.rollout.vllm_local import VLLMLocal
from headwater.rollout.vllm_process import ServerProcess, ServerSettings
from headwater.rollout.vllm_weights import LiveWeights, StaleWeights, Weights

#: How often a stage's own server is started again before that is given up.
RESTARTS = 3
_MODE = "processed_logprobs"

#: A server, or vLLM in this process.
Client = VLLMClient | VLLMLocal


class Servers:
    """One or more servers with the same weights, or vLLM in this process.

    Use as a context manager, or call `close`.

    settings: what our own server is started with; its dtype is expected of others too.
    vocab_size: the tokenizer's own tokens; no other has any probability from the first `load` on.
    """

    def __init__(self, engine: VLLM, settings: ServerSettings, vocab_size: int) -> None:
        self._engine, self._settings, self._vocab_size = engine, settings, vocab_size
        self._process: ServerProcess | None = None
        self._clients: list[Client] = []
        self._info: ServerInfo | None = None
        self._link: Link | None = None
        self._device = torch.device("cpu")  # where weights are that go through a link
        if engine.transfer != "folder" and not settings.on_cpu:
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._loaded: tuple[Weights, int] | None = None
        self._stream = secrets.token_hex(8)  # two stages' versions of one number are not one
        self._after_load: Callable[[], None] | None = None
        self._asleep = False
        self.restarts = 0
        self.startup_seconds = 0.0

    @property
    def pid(self) -> int | None:
        """The process group of our own server, while there is one."""
        return None if self._process is None else self._process.pid

    @property
    def info(self) -> ServerInfo:
        """What the server is that takes least: the shortest prompts and responses."""
        self._running()
        assert self._info is not None
        return self._info

    @property
    def take_tensors(self) -> bool:
        """Whether live weights are taken from this process, so that no folder is needed."""
        return self._engine.in_process or self._engine.transfer != "folder"

    def load(
        self, weights: Weights, version: int, after_load: Callable[[], None] | None = None
    ) -> None:
        """Let every server answer with these weights; live ones only where they `take_tensors`.

        after_load: called when they are there, now and after every later restart. A folder has to
        stay as it is until the next call; live weights may change, and are then not given again.
        """
        self._wake()
        self._loaded, self._after_load = (weights, version), after_load
        self._with_restarts(self._push)

    def ask(self, bodies: Sequence[Json]) -> list[Json]:
        """The answers of /inference/v1/generate, in order, from the weights loaded last.

        Raises StaleWeights where they come from others, also once they were loaded again, or where
        live weights have changed since. StageError where a server is gone for good.
        """
        self._wake()
        answers: list[Json | None] = [None] * len(bodies)
        self._with_restarts(lambda: self._fill(bodies, answers))
        if _drop_others(answers, self._label):
            self._with_restarts(self._push)
            self._with_restarts(lambda: self._fill(bodies, answers))
            if others := _drop_others(answers, self._label):
                raise StaleWeights(
                    f"{self._running()[0].url} answers with weights {sorted(others)} and was given "
                    f"{self._label!r} twice; expected a server that nobody else gives weights to: "
                    "let each run have servers of its own, or remove compute.rollouts.urls"
                )
        return [answer for answer in answers if answer is not None]

    def rest(self) -> None:
        """Until it is asked again, leave the device's memory to others, where servers `sleep`."""
        if self._engine.sleeps and not self._asleep:
            self._with_restarts(lambda: self._everywhere(lambda client, _: client.sleep()))
            self._asleep = True

    def _wake(self) -> None:
        if self._asleep:
            self._asleep = False  # a server that is started again is awake
            self._with_restarts(lambda: self._everywhere(lambda client, _: client.wake()))

    def close(self) -> None:
        """End our own server and all connections."""
        self._end_link()
        for client in self._clients:
            client.close()
        self._clients = []
        if self._process is not None:
            self._process.stop()
            self._process = None

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _label(self) -> str:
        assert self._loaded is not None, "load weights first"
        return f"{self._stream}-{self._loaded[1]}"

    def _fill(self, bodies: Sequence[Json], answers: list[Json | None]) -> None:
        """Ask for what has no answer yet; neighbours, which share prompts, of the same server."""
        clients = self._running()
        size = -(-len(bodies) // len(clients))
        parts = [range(n * size, min((n + 1) * size, len(bodies))) for n in range(len(clients))]
        self._everywhere(lambda client, n: client.generate(bodies, answers, parts[n]))

    def _push(self) -> None:
        assert self._loaded is not None
        weights, label, vocab_size = self._loaded[0], self._label, self._vocab_size

        def give(client: Client, _: int) -> None:
            if isinstance(client, VLLMLocal):
                return client.load(weights, label, vocab_size)
            assert not isinstance(weights, LiveWeights), "needs transfer=broadcast or ipc"
            return client.load(str(weights.resolve()), label, vocab_size)

        if self._engine.transfer == "folder":
            self._everywhere(give)
        else:
            self._give_through_link(weights, label, vocab_size)
        if self._after_load is not None:
            self._after_load()

    def _give_through_link(self, weights: Weights, label: str, vocab_size: int) -> None:
        """Through the link, and a new one where that fails: a server may have been started again,
        or joined another's. Weights that have changed are given to nobody."""
        had = self._link is not None
        try:
            return self._give_once(weights, label, vocab_size)
        except StaleWeights:
            raise
        except StageError:
            if not had:
                raise
        return self._give_once(weights, label, vocab_size)

    def _give_once(self, weights: Weights, label: str, vocab_size: int) -> None:
        try:
            self._link = self._link or self._joined()
            self._link.give(weights, label, vocab_size)
        except BaseException:
            self._end_link()
            raise

    def _end_link(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            (link.leave if self._engine.urls else link.close)()

    def _joined(self) -> Link:
        clients = [one for one in self._running() if isinstance(one, VLLMClient)]
        return Link(
            self._engine.transfer,
            self._device,
            [(client, client.info()) for client in clients],
            seconds=self._engine.request_seconds,
        )

    def _everywhere(self, do: Callable[[Client, int], Any]) -> None:
        clients = self._running()
        if len(clients) == 1:
            do(clients[0], 0)
            return
        with ThreadPoolExecutor(len(clients)) as threads:
            list(threads.map(do, clients, range(len(clients))))

    def _with_restarts(self, do: Callable[[], None]) -> None:
        while True:
            try:
                return do()
            except ServerDied as error:
                self._restart(error)

    def _restart(self, error: ServerDied) -> None:
        self.close()
        if self.restarts == RESTARTS:
            raise StageError(
                f"the stage's vLLM server died {RESTARTS + 1} times, last: {error}\nfree memory "
                "(compute.rollouts.gpu_memory_utilization, cpu_cache_gib), or use "
                "compute.rollouts: in_process"
            ) from error
        self.restarts += 1
        self._running()
        if self._loaded is not None:
            self._push()

    def _running(self) -> list[Client]:
        """The servers' clients; our own server is started by the first who asks."""
        if self._clients:
            return self._clients
        engine = self._engine
        limits = {
            "in_flight": engine.requests_in_flight,
            "request_seconds": engine.request_seconds,
        }
        found: list[Client]
        if engine.in_process:
            local = VLLMLocal(self._settings, in_flight=engine.requests_in_flight)
            self.startup_seconds = local.startup_seconds
            found = [local]
        elif engine.urls:
            key = os.environ.get(engine.key_variable, "")
            found = [VLLMClient(url, key, **limits) for url in engine.urls]  # type: ignore[arg-type]
        else:
            self._process = process = ServerProcess(self._settings)
            self.startup_seconds = process.startup_seconds
            own = VLLMClient(
                process.url,
                process.key,
                is_alive=process.is_alive,
                last_words=process.last_words,
                **limits,  # type: ignore[arg-type]
            )
            found = [own]
        self._clients = found
        infos = [client.info() for client in found]
        for client, info in zip(found, infos, strict=True):
            self._check(client.url, info)
        self._info = min(infos, key=lambda info: info.max_model_len)
        return found

    def _check(self, url: str, info: ServerInfo) -> None:
        """Raises StageError for a server whose answers would not be what we take them for."""
        wanted = self._settings
        wrong = [
            f"{name} {found}, expected {expected}: start it with {flag} {expected}"
            for name, found, expected, flag in (
                ("logprobs_mode", info.logprobs_mode, _MODE, "--logprobs-mode"),
                ("dtype", info.dtype, wanted.dtype, "--dtype"),
            )
            if found != expected
        ]
        if info.max_logprobs < wanted.max_logprobs:
            wrong.append(
                f"max_logprobs {info.max_logprobs}, expected {wanted.max_logprobs} or more: start "
                f"it with --max-logprobs {wanted.max_logprobs}"
            )
        if info.vocab_size < self._vocab_size:
            wrong.append(
                f"{info.vocab_size} tokens, expected {self._vocab_size} or more: serve the model "
                f"of {wanted.model}"
            )
        if wrong:
            raise StageError(f"the vLLM server at {url} has {'; it has '.join(wrong)}")


def _drop_others(answers: list[Json | None], label: str) -> set[str]:
    """Take out answers that come from other weights than `label`; which weights those were."""
    others: set[str] = set()
    for place, answer in enumerate(answers):
        if answer is None:
            continue
        spans = [span for choice in answer["choices"] for span in choice["weight_versions"] or ()]
        found = {str(span["version"]) for span in spans} or {"(none said)"}
        if found != {label}:
            others |= found - {label}
            answers[place] = None
    return others
