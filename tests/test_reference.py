"""Every key of a recipe is explained, in the reference and to editors."""

from __future__ import annotations

from headwater.config.descriptions import DESCRIPTIONS, description
from headwater.config.loading import recipe_schema
from headwater.config.reference import recipe_reference, settings_models


def test_every_key_is_described_and_nothing_else_is() -> None:
    models = settings_models()
    missing = [
        f"{name}.{key}"
        for name, model in models.items()
        for key in model.model_fields
        if description(model, key) is None
    ]
    assert missing == []
    parents = {one.__name__: one for model in models.values() for one in model.__mro__}
    assert DESCRIPTIONS.keys() <= parents.keys()
    used = {
        (parent.__name__, key)
        for model in models.values()
        for key in model.model_fields
        for parent in model.__mro__
        if key in DESCRIPTIONS.get(parent.__name__, {})
    }
    assert {(name, key) for name, keys in DESCRIPTIONS.items() for key in keys} == used


def test_the_reference_has_types_defaults_and_meanings() -> None:
    page = recipe_reference()
    assert "| `lr` | number above 0 | `1e-05` | Peak learning rate of AdamW. |" in page
    assert "| `models` | names, each [ModelSpec](#modelspec) | needed |" in page
    assert all(f"\n## {name}\n" in page for name in settings_models())
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert all(line.count(" | ") == 3 for line in rows), "a bar inside a cell"


def test_editors_are_told_what_a_key_means() -> None:
    schema = recipe_schema()
    assert schema["properties"]["seeds"]["description"] == "One training run of every arm for each."
    grpo = schema["$defs"]["GRPOStage"]["properties"]
    assert grpo["group_size"]["description"].startswith("Responses to each problem")
    mixed = schema["$defs"]["MixedStage"]["properties"]
    assert mixed["lambda"]["description"].startswith("Weight of the verifier's reward")
