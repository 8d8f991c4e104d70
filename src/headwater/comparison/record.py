"""What an evaluation found, and all that decides it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headwater.comparison.settings import EvaluationSettings
from headwater.evals.scores import Score
from headwater.evals.statistics import Difference

FORMAT = 1


@dataclass(frozen=True, slots=True)
class EvaluatedModel:
    """A model and how it was computed.

    sha256: over the hashes of its files; weights: those of its weights' files, by name. rows:
    responses decoded at once.
    """

    name: str
    source: str
    sha256: str
    weights: dict[str, str]
    device: str
    precision: str
    threads: int
    rows: int


@dataclass(frozen=True, slots=True)
class PairedComparison:
    """avg@k of `first` minus that of `second`; the p-value is corrected over all pairs on all
    sets (Holm)."""

    first: str
    second: str
    difference: Difference
    p_value_corrected: float


@dataclass(frozen=True, slots=True)
class SetComparison:
    """Every model on one set: scores in the models' order, and the difference of every pair.

    source: as given. sha256: of problems and labels. available: problems of the source, of which
    `problems` were asked.
    """

    name: str
    source: str
    sha256: str
    problems: int
    available: int
    scores: tuple[Score, ...]
    differences: tuple[PairedComparison, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Models on sets of problems. Nothing in it depends on when or how fast it was made.

    versions: of headwater, torch and transformers. out: where every attempt is kept.
    read_back: evaluations that were finished already and not made anew, of `evaluations`.
    """

    settings: EvaluationSettings
    models: tuple[EvaluatedModel, ...]
    sets: tuple[SetComparison, ...]
    versions: dict[str, str]
    out: Path
    read_back: int = 0

    @property
    def evaluations(self) -> int:
        """Models times sets."""
        return len(self.models) * len(self.sets)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the same whether or not anything was read back."""
        return {
            "format": FORMAT,
            "settings": self.settings.model_dump(mode="json"),
            "versions": dict(self.versions),
            "models": [asdict(model) for model in self.models],
            "sets": [self._set(one) for one in self.sets],
        }

    def _set(self, one: SetComparison) -> dict[str, Any]:
        names = [model.name for model in self.models]
        plain = _json_values(asdict(one))
        plain["scores"] = [
            {"model": name} | score for name, score in zip(names, plain["scores"], strict=True)
        ]
        return plain


def _json_values(plain: dict[Any, Any]) -> dict[str, Any]:
    """None where JSON has no number: the error over one problem, infinite degrees of freedom."""
    return {str(key): _json_value(value) for key, value in plain.items()}


def _json_value(value: Any) -> Any:
    if isinstance(value, dict):
        return _json_values(value)
    if isinstance(value, tuple | list):
        return [_json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
