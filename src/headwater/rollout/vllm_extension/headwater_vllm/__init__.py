"""What a vLLM server needs to take weights from headwater, and to say which ones it answers with.

Loaded by the server's own interpreter, with this folder on its PYTHONPATH: nothing of headwater
or its dependencies is imported here, and nothing of vLLM either. Start a server with

    --worker-extension-cls headwater_vllm.WeightsExtension --middleware headwater_vllm.Gate

`Gate` asks for the key of VLLM_API_KEY on every path but /health (vLLM itself guards /v1 and
/inference only, not what changes weights) and adds

    GET  /headwater/info     what the server is: dtype, limits, how it counts log-probabilities
    POST /headwater/weights  {"folder", "version", "vocab_size"}: load, then answer as `version`;
                             with "link" and "plan" instead of "folder" what comes through it
    POST /headwater/join     a link's terms (`link.py`): the workers join it
    POST /headwater/leave    {"link"}: they leave it, if they are in that one
    POST /headwater/sleep    weights to the host's memory, keys and values forgotten
    POST /headwater/wake     back again

Every answer of /inference/v1/generate carries the version of the weights of each of its tokens,
which the engine itself attaches between its steps. While weights are being loaded the engine is
paused and its version is LOADING, so that a failed load leaves a server that nobody believes.

Weights travel as a folder of safetensors that the server can read, through a link from memory to
memory, or as tensors where the engine is in the trainer's process. Sleeping frees memory on devices
only: on a CPU, where it is tested, vLLM stops and goes on, and keeps its memory. None of this has
been run on a GPU.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

#: Raised whenever what this module answers or expects changes.
PROTOCOL = 2
#: The version of a server whose weights are half loaded.
LOADING = "loading"
#: Head outputs computed both ways differ by rounding; by this share of the largest, by old weights.
_HEAD_TOLERANCE = 0.05
_ROWS_CHECKED = 4096

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class WeightsExtension:
    """Methods that vLLM adds to its worker, called through `collective_rpc`."""

    model_runner: Any
    rank: int
    device: Any
    headwater_link: Any = None

    def headwater_load(self, folder: str, vocab_size: int) -> dict[str, float]:
        """Load every tensor of the safetensors in `folder`; otherwise as `headwater_take`."""
        return _load_into(self.model_runner, tensors_in(folder), vocab_size)

    def headwater_join(self, terms: dict[str, Any]) -> None:
        """Join the trainer's link, and leave the one before."""
        from .link import Receiver

        self.headwater_leave()
        self.headwater_link = Receiver(terms, self.rank, self.device)

    def headwater_leave(self, name: str | None = None) -> None:
        """Leave the link of that name, or any; harmless without one, and where another's is."""
        link = self.headwater_link
        if link is not None and name in (None, link.name):
            link.close()
            self.headwater_link = None

    def headwater_receive(self, source: dict[str, Any], vocab_size: int) -> dict[str, float]:
        """Load the tensors of a plan from the link of that name; otherwise as `headwater_take`."""
        link = self.headwater_link
        if link is None or link.name != source["link"]:
            raise ValueError("no link to this trainer: it was left, or another trainer has one")
        try:
            return _load_into(self.model_runner, link.tensors(source["plan"]), vocab_size)
        except BaseException as error:
            self.headwater_link = None
            link.fail(f"{type(error).__name__}: {error}")
            raise

    def headwater_told(self, method: str, *given: Any) -> dict[str, Any]:
        """What a method above returns, or {"error": text}: of several workers of one server vLLM
        would take one's error for the answer, and the others' answers for those to its next
        question."""
        try:
            return {"answer": getattr(self, method)(*given)}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}

    def headwater_take(
        self, tensors: Iterable[tuple[str, Any]], vocab_size: int
    ) -> dict[str, float]:
        """Load copies of the named tensors of this process, and cut the vocabulary.

        An executor in one process hands its arguments over as they are. Returns how far the head
        is from the weights just loaded, as a share of its largest output; raises ValueError where
        that is more than rounding, and where vLLM keeps a tensor instead of a copy.
        """
        lent: set[int] = set()

        def noted() -> Iterator[tuple[str, Any]]:
            for name, tensor in tensors:
                lent.add(_memory(tensor))
                yield name, tensor

        report = _load_into(self.model_runner, noted(), vocab_size)
        named = self.model_runner.get_model().named_parameters()
        if kept := [name for name, one in named if one.numel() and _memory(one) in lent]:
            raise ValueError(f"vLLM answers with the trainer's own {kept[0]}, expected a copy")
        return report


def _load_into(
    runner: Any, tensors: Iterable[tuple[str, Any]], vocab_size: int
) -> dict[str, float]:
    """Load tensors and cut the vocabulary; returns and raises as `headwater_take` says.

    On a CPU vLLM multiplies with a packed copy of each weight. Reloading makes it anew for every
    layer but a head that shares the embedding's weight: that is done here.
    """
    runner.reload_weights(weights_iterator=tensors)
    model = runner.get_model()
    head = getattr(model, "lm_head", None)
    gap = 0.0
    if head is not None and hasattr(head, "quant_method"):
        head.quant_method.process_weights_after_loading(head)
        gap = _head_gap(head)
        if not gap <= _HEAD_TOLERANCE:
            raise ValueError(f"the head still multiplies with older weights (off by {gap:.2g})")
    _cut_vocabulary(model, vocab_size)
    return {"head_gap": gap}


def _memory(tensor: Any) -> int:
    """Where the memory begins that a tensor, or what it is a part of, lies in."""
    return int(tensor.untyped_storage().data_ptr())


def tensors_in(folder: str) -> Iterator[tuple[str, Any]]:
    """Every tensor of the safetensors in `folder`. Raises ValueError where there is none."""
    from safetensors import safe_open

    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: no *.safetensors there that this server can read")
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                yield name, file.get_tensor(name)


def _head_gap(head: Any) -> float:
    """Largest difference of the head's output from plain multiplication, over the largest."""
    import torch

    weight = head.weight
    rows = weight[:_ROWS_CHECKED].float()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2, weight.shape[1], generator=generator)
    hidden = drawn.to(dtype=weight.dtype, device=weight.device)
    found = head.quant_method.apply(head, hidden, bias=None)[:, : rows.shape[0]].float()
    wanted = hidden.float() @ rows.T
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-20))


def _cut_vocabulary(model: Any, vocab_size: int) -> None:
    """From now on no token from `vocab_size` on has any probability."""
    processor = getattr(model, "logits_processor", None)
    if processor is None:
        raise ValueError(f"{type(model).__name__} has no logits_processor to cut its vocabulary at")
    processor.headwater_vocab_size = vocab_size
    if not getattr(processor, "headwater_cuts", False):
        processor.register_forward_hook(_without_padding)
        processor.headwater_cuts = True


def _without_padding(processor: Any, _inputs: Any, logits: Any) -> Any:
    if logits is not None:  # None on ranks that do not gather the logits
        logits[..., processor.headwater_vocab_size :] = float("-inf")
    return logits


class Gate:
    """ASGI middleware, the outermost: who may ask, and the paths above."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._key = os.environ.get("VLLM_API_KEY", "")
        self._routes = {
            ("GET", "/headwater/info"): _info,
            ("POST", "/headwater/weights"): _load,
            ("POST", "/headwater/join"): _join,
            ("POST", "/headwater/leave"): _leave,
            ("POST", "/headwater/sleep"): _sleep,
            ("POST", "/headwater/wake"): _wake,
        }

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on to vLLM."""
        if scope["type"] != "http" or scope["path"] == "/health":
            return await self._app(scope, receive, send)
        if not self._allows(scope):
            return await _answer(send, 401, {"error": "a wrong key, or none"})
        route = self._routes.get((scope["method"], scope["path"]))
        if route is None:
            return await self._app(scope, receive, send)
        try:
            body = json.loads(await _body(receive) or b"{}")
            answer = await route(scope["app"].state.engine_client, body)
        except Exception as error:  # the process boundary: the client says it
            return await _answer(send, 500, {"error": f"{type(error).__name__}: {error}"})
        return await _answer(send, 200, answer)

    def _allows(self, scope: Message) -> bool:
        if not self._key:
            return False
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, f"Bearer {self._key}".encode())


async def _info(engine: Any, _body: Any) -> dict[str, Any]:
    config = engine.vllm_config
    model, scheduler, parallel = (
        config.model_config,
        config.scheduler_config,
        config.parallel_config,
    )
    return {
        "protocol": PROTOCOL,
        "version": await engine.get_weight_version(),
        "vocab_size": model.get_vocab_size(),
        "max_model_len": model.max_model_len,
        "max_logprobs": model.max_logprobs,
        "logprobs_mode": str(model.logprobs_mode),
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_num_seqs": scheduler.max_num_seqs,
        "workers": parallel.world_size,
        "copies": parallel.data_parallel_size,
    }


async def _load(engine: Any, body: Any) -> dict[str, Any]:
    """Load weights between two steps of the engine, and forget all keys and values of old ones."""
    version, vocab_size = str(body["version"]), int(body["vocab_size"])
    method, source = "headwater_load", body.get("folder")
    if "plan" in body:
        method, source = "headwater_receive", {"link": body["link"], "plan": body["plan"]}
    await engine.pause_generation(mode="wait", clear_cache=True)
    try:
        await engine.update_weight_version(LOADING)
        reports = await _of_all(engine, method, source, vocab_size)
        if not await engine.reset_prefix_cache():
            raise RuntimeError("the prefix cache still holds keys and values of the old weights")
        await engine.update_weight_version(version)
    finally:
        await engine.resume_generation()
    return {"version": version, "head_gap": max(one["head_gap"] for one in reports)}


async def _of_all(engine: Any, method: str, *given: Any) -> list[Any]:
    """What every worker's method returns. Raises RuntimeError with the first error of one."""
    found = await engine.collective_rpc("headwater_told", args=(method, *given))
    for one in found:
        if "error" in one:
            raise RuntimeError(one["error"])
    return [one["answer"] for one in found]


async def _join(engine: Any, body: Any) -> dict[str, Any]:
    await _of_all(engine, "headwater_join", body)
    return {"joined": True}


async def _leave(engine: Any, body: Any) -> dict[str, Any]:
    await _of_all(engine, "headwater_leave", body["link"])
    return {"joined": False}


async def _sleep(engine: Any, _body: Any) -> dict[str, Any]:
    await engine.sleep(1)
    return {"sleeping": True}


async def _wake(engine: Any, _body: Any) -> dict[str, Any]:
    await engine.wake_up(None)
    return {"sleeping": False}


async def _body(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


async def _answer(send: Send, status: int, content: Any) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
