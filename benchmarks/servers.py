"""vLLM servers as a stage uses them: start, tokens per second, pushes, and the gap.

  VLLM_PYTHON=.venv-vllm/bin/python python benchmarks/servers.py --model tiny:student
  VLLM_PYTHON=... python benchmarks/servers.py --model smollm2-135m --precision bfloat16

Prompts of random tokens, one server on this machine, this process's thread count. README.md has
the method.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import numpy as np
import torch

from headwater import seeding
from headwater.config.compute import VLLM, Compute
from headwater.engine.forward import load_engine_model
from headwater.engine.packing import PackedGroup, pack
from headwater.models.end_tokens import end_token_ids
from headwater.models.loading import load_tokenizer
from headwater.models.sources import materialise
from headwater.models.vocabulary import usable_vocabulary
from headwater.rollout.engines import Serving, make_sampler
from headwater.rollout.sampler import InProcessSampler, SampleRequest, SamplerSettings
from headwater.rollout.scoring import FrozenModel
from headwater.rollout.vllm_sampler import VLLMSampler
from headwater.rollout.vllm_scoring import VLLMTeacher
from headwater.types import Rollout

_PUSHES = 5
_TRANSFERS = ("folder", "broadcast", "ipc")


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny:student")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as closing:
        model_dir = Path(folder) / "model"
        materialise(asked.model, model_dir, seed=0)
        print(json.dumps(_measure(asked, model_dir, Path(folder), closing), indent=1))


def _measure(
    asked: argparse.Namespace, model_dir: Path, scratch: Path, closing: ExitStack
) -> dict[str, object]:
    dtype = getattr(torch, asked.precision)
    tokenizer = load_tokenizer(model_dir)
    model = load_engine_model(model_dir, dtype, torch.device("cpu"))
    vocab = usable_vocabulary(tokenizer)
    settings = SamplerSettings(
        temperature=1.0,
        max_new_tokens=asked.tokens,
        end_ids=end_token_ids(model, tokenizer),
        vocab_size=vocab,
        forbid_end=True,
    )
    engine = VLLM(python=os.environ["VLLM_PYTHON"])
    compute = Compute(device="cpu", precision=asked.precision, rollouts=engine)
    version = 0
    serving = Serving(model_dir, scratch, closing, lambda: version)
    sampler = make_sampler(compute, model, settings, serving)
    assert isinstance(sampler, VLLMSampler)
    requests = _requests(asked.prompts, asked.group, vocab)
    rollouts = _flat(sampler.sample(requests))
    served, seconds = _timed(lambda: sampler.sample(requests))
    tokens = sum(len(r.response_ids) for r in rollouts)
    same = sum(
        a.response_ids == b.response_ids for a, b in zip(rollouts, _flat(served), strict=True)
    )
    own = InProcessSampler(model, settings)
    own.sample(requests)
    _, own_seconds = _timed(lambda: own.sample(requests))
    pushes: dict[str, list[float]] = {transfer: [] for transfer in _TRANSFERS}
    for transfer in _TRANSFERS:  # one server for all: what it is told differs
        sampler.servers._engine = engine.model_copy(update={"transfer": transfer})
        for _ in range(_PUSHES + 1):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 1e-3 * parameter.std() * torch.randn_like(parameter)
            version += 1
            pushes[transfer].append(_timed(lambda: sampler.push(requests))[1])
        sampler.sample(requests)
    fresh = _flat(sampler.sample(requests))
    gaps = np.concatenate([_gap(model, vocab, rollout) for rollout in fresh])
    pairs = [(r.prompt_ids, r.response_ids) for r in fresh]
    teacher = VLLMTeacher(sampler.servers, model_dir, vocab)
    _, scoring = _timed(lambda: teacher.sampled(pairs))
    return {
        "model": asked.model,
        "precision": asked.precision,
        "threads": asked.threads,
        "load_average": os.getloadavg()[0],
        "start_seconds": round(sampler.servers.startup_seconds, 1),
        "sampled_tokens_per_second": round(tokens / seconds),
        "in_process_tokens_per_second": round(tokens / own_seconds),
        "scored_tokens_per_second": round(sum(len(p) + len(r) for p, r in pairs) / scoring),
        # the first push of a link opens it
        "push_seconds": {name: round(median(every[1:]), 3) for name, every in pushes.items()},
        "first_push_seconds": {name: round(every[0], 3) for name, every in pushes.items()},
        "gap_mean": float(f"{gaps.mean():.2g}"),
        "gap_largest": float(f"{gaps.max():.2g}"),
        "drawn_again_the_same": f"{same} of {len(rollouts)}",
    }


def _requests(prompts: int, group: int, vocab: int) -> list[SampleRequest]:
    rng = np.random.default_rng(0)
    return [
        SampleRequest(
            tuple(int(i) for i in rng.integers(3, vocab, 32)),
            tuple(seeding.derive_key("benchmark", p, row) for row in range(group)),
        )
        for p in range(prompts)
    ]


def _flat(groups: list[tuple[Rollout, ...]]) -> list[Rollout]:
    return [rollout for group in groups for rollout in group]


def _timed(do):  # type: ignore[no-untyped-def]
    began = time.perf_counter()
    found = do()
    return found, time.perf_counter() - began


def _gap(model: object, vocab: int, rollout: Rollout) -> np.ndarray:
    group = PackedGroup(rollout.prompt_ids, (rollout.response_ids,), (0,))
    frozen = FrozenModel(model, vocab, 0)  # type: ignore[arg-type]
    batch = pack([group], dtype=frozen.head_VH.dtype, device="cpu")
    return np.abs(frozen.logprobs(batch).numpy() - rollout.sampler_logprobs)


if __name__ == "__main__":
    main()
