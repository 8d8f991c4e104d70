"""What a distillation reads of the teacher, and which divergence it takes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from headwater.config.base import Settings

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def _kind_shorthand(value: Any) -> Any:
    """`full` means `{kind: full}`; lists are Python's or YAML's way to write tuples."""
    return {"kind": value} if isinstance(value, str) else value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class FullVocabulary(Settings):
    """The teacher's whole distribution (hidden states and head; logits chunk by chunk)."""

    kind: Literal["full"] = "full"


class TopK(Settings):
    """The teacher's k most likely tokens and one bucket for all the rest."""

    kind: Literal["top_k"] = "top_k"
    k: Annotated[int, Field(ge=2)] = 64


class SampledToken(Settings):
    """Only the log-probability of the sampled token: a policy gradient with
    log pi_T - log pi as a detached advantage. Unbiased, noisy."""

    kind: Literal["sampled"] = "sampled"


CacheableTargets = Annotated[
    FullVocabulary | TopK, Field(discriminator="kind"), BeforeValidator(_kind_shorthand)
]
Targets = Annotated[
    FullVocabulary | TopK | SampledToken,
    Field(discriminator="kind"),
    BeforeValidator(_kind_shorthand),
]


class ReverseKL(Settings):
    """KL(student || teacher), mode-seeking (arXiv:2605.12483, Eq. 4)."""

    kind: Literal["reverse"] = "reverse"


class ForwardKL(Settings):
    """KL(teacher || student), mode-covering (arXiv:2605.12483, Eq. 5)."""

    kind: Literal["forward"] = "forward"


class MixedKL(Settings):
    """forward_weight * KL(teacher || student) + (1 - forward_weight) * KL(student || teacher)."""

    kind: Literal["mixed"] = "mixed"
    forward_weight: Fraction = 0.5


Divergence = Annotated[
    ReverseKL | ForwardKL | MixedKL,
    Field(discriminator="kind"),
    BeforeValidator(_kind_shorthand),
]
