"""Reading cached teacher rollouts and their distributions back, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import pyarrow.parquet as pq
import torch
from safetensors import safe_open

from headwater.errors import StageError
from headwater.types import FullTargets, TeacherTargets, TopKTargets


class CachedRollouts:
    """A published `teacher_rollouts` artifact. Row numbers count its rollouts in file order."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        table = pq.read_table(folder / "rollouts.parquet", columns=["prompt_ids", "response_ids"])
        self.examples: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
            (tuple(p), tuple(r))
            for p, r in zip(
                table["prompt_ids"].to_pylist(), table["response_ids"].to_pylist(), strict=True
            )
        ]
        self._where: list[tuple[Path, int, int]] = []  # file, first token, end
        for path in sorted(folder.glob("targets-*.safetensors")):
            with safe_open(path, framework="pt") as file:
                offsets = file.get_tensor("offsets").tolist()
            self._where += [(path, start, end) for start, end in pairwise(offsets)]
        self._head: torch.Tensor | None = None

    def targets(
        self, rows: Sequence[int], device: torch.device, dtype: torch.dtype
    ) -> TeacherTargets:
        """The teacher's distributions on the tokens of `rows`, in that order."""
        whole = {name: part.to(device) for name, part in self.stored(rows).items()}
        if "hidden_TH" in whole:
            return FullTargets(whole["hidden_TH"].to(dtype), self._head_on(device, dtype))
        return TopKTargets(whole["ids_TK"].long(), whole["logprobs_TK"])

    def stored(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """The tensors of `rows` as they are kept: hidden_TH, or ids_TK and logprobs_TK."""
        if len(self._where) != len(self.examples):
            raise StageError(
                f"{self._folder}: {len(self.examples)} rollouts but distributions of "
                f"{len(self._where)}; delete the folder so that it is sampled again"
            )
        pieces: dict[str, list[torch.Tensor]] = {}
        for row in rows:
            path, start, end = self._where[row]
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    if name != "offsets":
                        pieces.setdefault(name, []).append(file.get_slice(name)[start:end])
        return {name: torch.cat(parts) for name, parts in pieces.items()}

    def _head_on(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        if self._head is None:
            with safe_open(self._folder / "head.safetensors", framework="pt") as file:
                self._head = file.get_tensor("head_VH").to(device=device, dtype=dtype)
        return self._head


class CachedArtifacts:
    """Artifacts of teacher rollouts read as one, each once. Row numbers count on from artifact to
    artifact; `examples` are (prompt ids, response ids, number of the artifact)."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._parts = [CachedRollouts(folder) for folder in dict.fromkeys(folders)]
        self._firsts = [0, *accumulate(len(part.examples) for part in self._parts)]
        self.examples = [
            (prompt, response, number)
            for number, part in enumerate(self._parts)
            for prompt, response in part.examples
        ]

    def targets(
        self, rows: Sequence[int], device: torch.device, dtype: torch.dtype
    ) -> TeacherTargets:
        """The teacher's distributions on the tokens of `rows`, all of one artifact."""
        number = self.examples[rows[0]][2]
        own = [row - self._firsts[number] for row in rows]
        return self._parts[number].targets(own, device, dtype)
