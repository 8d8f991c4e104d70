"""Weights to servers without a folder: the trainer's end of a link, and who is asked to join it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import torch

from headwater.config.addresses import is_here
from headwater.errors import StageError
from headwater.rollout.vllm_client import ServerInfo, VLLMClient, all_of
from headwater.rollout.vllm_extension.headwater_vllm import tensors_in
from headwater.rollout.vllm_extension.headwater_vllm.link import Sender, plan_of
from headwater.rollout.vllm_extension.headwater_vllm.memory import own_address
from headwater.rollout.vllm_weights import LiveWeights, Weights

#: Both sides have a buffer of this size beside the weights.
_CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}


class Link:
    """An open link to all servers of a stage.

    Whatever fails leaves it of no use: close it, and open another.
    """

    def __init__(
        self,
        transfer: str,
        device: torch.device,
        servers: Sequence[tuple[VLLMClient, ServerInfo]],
        *,
        seconds: float,
    ) -> None:
        """Let the workers of all servers join; they wait at most `seconds` for anything.

        Raises StageError where one cannot, and ServerDied.
        """
        self._clients = [client for client, _ in servers]
        if many := [client.url for client, info in servers if info.copies > 1]:
            raise StageError(
                f"{many[0]} has several engines behind one address (--data-parallel-size), whose "
                f"workers transfer={transfer} cannot tell apart: give each an address of its own "
                "in urls, or use transfer=folder"
            )
        self._threads = ThreadPoolExecutor(len(servers), thread_name_prefix="vllm-link")
        urls = [client.url for client in self._clients]
        farthest = next((url for url in urls if not is_here(url)), urls[0])
        try:
            self._sender = Sender(
                transfer,
                device,
                own_address(urlsplit(farthest).hostname or ""),
                sum(info.workers for _, info in servers),
                chunk_bytes=_CHUNK_BYTES[device.type],
                seconds=seconds,
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise StageError(f"transfer={transfer} to {self._named()}: {error}") from error
        try:
            self._join(servers)
        except BaseException:
            self.close()
            raise

    def give(self, weights: Weights, version: str, vocab_size: int) -> None:
        """Let every server answer with these weights, as `version`.

        Raises StaleWeights where live ones have changed, StageError and ServerDied.
        """
        _check(weights)
        plan = plan_of(_tensors(weights))
        told = (self._sender.name, plan, version, vocab_size)
        asked = [self._threads.submit(client.receive, *told) for client in self._clients]
        self._while_asked(asked, lambda: self._sender.send(_tensors(weights), _watching(asked)))
        _check(weights)

    def close(self) -> None:
        """End it; workers that wait for something are told so."""
        self._sender.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def leave(self) -> None:
        """End it, and ask servers that outlive it to forget it."""
        self.close()
        for client in self._clients:
            client.leave(self._sender.name)

    def _join(self, servers: Sequence[tuple[VLLMClient, ServerInfo]]) -> None:
        asked, rank = [], 1
        for client, info in servers:
            asked.append(self._threads.submit(client.join, self._sender.terms(rank)))
            rank += info.workers
        self._while_asked(asked, lambda: self._sender.connect(_watching(asked)))

    def _while_asked(self, asked: Sequence[Future[None]], do: Callable[[], None]) -> None:
        """Do our part while servers do theirs. Raises StageError and ServerDied: where a server is
        gone, that is why our part failed."""
        try:
            do()
        except (RuntimeError, ValueError, OSError) as error:
            self._sender.close()  # servers that wait for us are told, and answer
            failed = f"weights could not be given to {self._named()}: {error}"
            try:
                all_of(asked)
            except StageError as said:
                raise StageError(f"{failed}\n{said}") from error
            raise StageError(failed) from error
        all_of(asked)

    def _named(self) -> str:
        return ", ".join(client.url for client in self._clients)


def _watching(asked: Sequence[Future[None]]) -> Callable[[], None]:
    def watch() -> None:
        for one in asked:
            if one.done():
                one.result()

    return watch


def _tensors(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    return tensors_in(str(weights)) if isinstance(weights, Path) else weights.tensors()


def _check(weights: Weights) -> None:
    if isinstance(weights, LiveWeights):
        weights.check()
