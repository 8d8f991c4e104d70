"""Low-rank adapters: which weights of a model are trained through them, and how large they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    PositiveInt,
    Tag,
    model_validator,
)

from headwater.config.base import Settings

if TYPE_CHECKING:
    from headwater.config.recipe import Recipe

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_RESERVED = "adapters are merged into the weights that compute, whose forward pass has no branch "


class LoRA(Settings):
    """Train W0 + alpha / rank * B A instead of W (arXiv:2106.09685); written `16` for a rank.

    alpha: twice the rank by default. target_modules: linear layers by the end of their names;
    all-linear is every one but the output head. base: W0 as it came, or what 4-bit NF4
    quantisation leaves of it (arXiv:2305.14314).
    """

    rank: PositiveInt = 16
    alpha: PositiveInt = 32
    target_modules: Annotated[
        Literal["all-linear"] | tuple[Projection, ...],
        BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
    ] = "all-linear"
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    base: Literal["full", "nf4"] = "full"

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            value = {"rank": value}
        if not isinstance(value, Mapping):
            return value
        rank = value.get("rank", cls.model_fields["rank"].default)
        doubled = 2 * rank if isinstance(rank, int) and rank > 0 else 1
        return {**value, "alpha": doubled if value.get("alpha") is None else value["alpha"]}

    @model_validator(mode="after")
    def _can_be_merged(self) -> Self:
        if self.dropout:
            raise ValueError(
                f"dropout={self.dropout:g}: {_RESERVED}to drop inputs of; expected 0: remove it, "
                "or lower rank or lr where it overfits"
            )
        if not self.target_modules:
            raise ValueError(
                "target_modules=[] adapts nothing; expected all-linear or names such as "
                "[q_proj, v_proj]: name some, or remove lora"
            )
        if self.base == "nf4" and self.target_modules != "all-linear":
            raise ValueError(
                f"base: nf4 with target_modules={list(self.target_modules)}: every linear layer is "
                "quantised, as bitsandbytes does when it loads a model; expected all-linear: set "
                "it, or base: full"
            )
        return self


def _kind(value: Any) -> str:
    return "off[]" if value is False else "lora[]"  # brackets: no part of a key in messages


#: How one stage is trained: with these adapters, in full (false), or as its model says (null).
StageLoRA = (
    Annotated[
        Annotated[LoRA, Tag("lora[]")] | Annotated[Literal[False], Tag("off[]")],
        Discriminator(_kind),
    ]
    | None
)


def lora_problems(recipe: Recipe) -> list[str]:
    """What of a recipe's adapters cannot be trained, a line each."""
    if recipe.compute.ranks == 1:
        return []
    found = []
    asked: dict[str, LoRA | Literal[False] | None] = {
        f"models.{name}": spec.lora for name, spec in recipe.models.items()
    }
    chains = {f"models.{name}.prepare": spec.prepare for name, spec in recipe.models.items()}
    for name, arm in recipe.arms.items():
        chains |= {f"arms.{name}.{role}": chain for role, (_, chain) in arm.models.items()}
    for where, chain in chains.items():
        for index, item in enumerate(chain):
            asked[f"{where}[{index}].{item.kind}"] = recipe.stage(item).lora
    for where, lora in asked.items():
        if lora and lora.base == "nf4":
            found.append(
                f"{where}.lora.base: nf4 with compute.ranks={recipe.compute.ranks}: blocks of 64 "
                "quantised weights would be cut by rank; set base: full, or compute.ranks: 1"
            )
    return found
