"""Which layers a model misses least: for `layers: [...]` of a student pruned from it.

    python benchmarks/layer_order.py runs/NAME/artifacts/FINGERPRINT/model --worked FILE --drop 6

Greedy: drop the layer without which worked solutions stay likeliest, then the next, and so on; the
first and the last layer stay. Prints, after each, the loss (nats a token of the solutions) and the
layers that are left. Evenly spaced layers, as `layers: N` keeps them, are printed beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwater.engine.forward import head_weight, hidden_at_targets, load_engine_model
from headwater.engine.packing import PackedGroup, TokenBatch, pack
from headwater.models.loading import load_tokenizer
from headwater.models.prune import layer_list
from headwater.models.source_names import kept_layers
from headwater.tasks.problems import load_problems
from headwater.tasks.prompts import encode_prompt, encode_response, render_solution


def main() -> None:
    """Print the order in which layers go."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("model", type=Path, help="a model's folder")
    arguments.add_argument("--worked", required=True, help="problems with worked solutions")
    arguments.add_argument("--problems", type=int, default=40, help="how many of them")
    arguments.add_argument("--drop", type=int, default=6)
    arguments.add_argument("--prompt", default="boxed")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    model = load_engine_model(given.model, torch.bfloat16, torch.device("cpu"))
    tokens = _packed(load_tokenizer(given.model), given.worked, given.problems, given.prompt)
    scorer = _Scorer(model, tokens)
    kept = list(range(scorer.layers))
    print(f"{scorer.layers} layers: loss {scorer.loss(kept):.3f}", flush=True)
    for _ in range(given.drop):
        losses = {layer: scorer.loss([k for k in kept if k != layer]) for layer in kept[1:-1]}
        dropped = min(losses, key=losses.__getitem__)
        kept.remove(dropped)
        even = scorer.loss(kept_layers(scorer.layers, len(kept)))
        print(
            f"{len(kept)} layers: loss {losses[dropped]:.3f} without {dropped} "
            f"(evenly spaced {even:.3f}): {kept}",
            flush=True,
        )


def _packed(tokenizer: PreTrainedTokenizerBase, source: str, count: int, form: str) -> TokenBatch:
    data = load_problems(source)
    groups = []
    for row, (problem, label) in enumerate(zip(data.problems, data.labels, strict=True)):
        if row == count:
            break
        response = render_solution(form, label.solution, label.answer)
        prompt_ids = tuple(encode_prompt(tokenizer, problem, form))
        response_ids = tuple(encode_response(tokenizer, problem, response))
        groups.append(PackedGroup(prompt_ids, (response_ids,), (row,)))
    return pack(groups, dtype=torch.bfloat16, device=torch.device("cpu"))


class _Scorer:
    """The loss of a model with some of its layers only."""

    def __init__(self, model: PreTrainedModel, tokens: TokenBatch) -> None:
        self._model, self._tokens = model, tokens
        name, blocks = layer_list(model)
        self._parent = model.get_submodule(name.rpartition(".")[0])
        self._name, self._blocks = name.rpartition(".")[2], list(blocks)

    @property
    def layers(self) -> int:
        return len(self._blocks)

    @torch.no_grad()
    def loss(self, kept: Sequence[int]) -> float:
        """Mean negative log-likelihood of the solutions' tokens, in nats."""
        setattr(self._parent, self._name, nn.ModuleList([self._blocks[k] for k in kept]))
        self._model.config.num_hidden_layers = len(kept)
        hidden = hidden_at_targets(self._model, self._tokens)
        logits = functional.linear(hidden, head_weight(self._model)).float()
        return float(functional.cross_entropy(logits, self._tokens.target_ids_T))


if __name__ == "__main__":
    main()
