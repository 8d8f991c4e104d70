"""Recipes: what is read, what is refused and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from headwater.config.distillation import FullVocabulary, MixedKL, TopK
from headwater.config.loading import (
    apply_override,
    load_recipe,
    parse_yaml,
    recipe_schema,
    validate_recipe,
    write_resolved,
)
from headwater.config.recipe import Recipe
from headwater.errors import InputError

RECIPE = """
name: study
task:
  train: task:arithmetic
  eval: {held_out: "task:arithmetic?split=test"}
models:
  teacher: {source: "tiny:teacher", prepare: [pretrain]}
  student: {source: "tiny:student", prepare: [{pretrain: {steps: 50}}]}
pools: {labels: 100, split: [1H, 2H], prompts: 400}
stages:
  grpo: {steps: 10, lr: 1e-3}
  opd: {kl: reverse, targets: {kind: top_k, k: 8}}
arms:
  cold_grpo: {student: [grpo]}
  bridge: {teacher: [{grpo: 1H}], student: [warmup, opd]}
  half: {teacher: [{grpo: 1H}], student: [warmup, opd, {grpo: {pool: 2H, steps: 5}}]}
contrasts:
  - {better: bridge, than: cold_grpo, differs_in: [teacher, transfer]}
budget: {labels: 100}
seeds: [0, 1]
"""


def plain(**changes: Any) -> dict[str, Any]:
    return {**parse_yaml(RECIPE, "RECIPE"), **changes}


def refusal(data: dict[str, Any]) -> list[str]:
    """The lines of the error that `data` meets."""
    with pytest.raises(InputError) as caught:
        validate_recipe(data, where="r.yaml")
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


def with_stage(kind: str, **settings: Any) -> dict[str, Any]:
    return plain(stages={kind: settings})


# --- what is read --------------------------------------------------------------------------------


def test_a_recipe_reads() -> None:
    recipe = validate_recipe(plain())
    assert list(recipe.arms) == ["cold_grpo", "bridge", "half"]
    assert recipe.stages.grpo.lr == 1e-3
    assert recipe.stages.grpo.group_size == 8
    assert recipe.stages.opd.targets == TopK(k=8)
    assert recipe.budget.limits() == {"labels": 100.0}
    assert recipe.seeds == (0, 1)


def test_numbers_with_exponents_are_numbers() -> None:
    assert parse_yaml("[1e-6, 1.0e-6, 2E3, -.5e1, 1_000]", "x") == [1e-6, 1e-6, 2e3, -5.0, 1000]


def test_a_recipe_is_frozen() -> None:
    recipe = validate_recipe(plain())
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("written", "kind", "pool", "overrides"),
    [
        ("grpo", "grpo", None, {}),
        ({"grpo": None}, "grpo", None, {}),
        ({"grpo": "1H"}, "grpo", "1H", {}),
        ({"grpo": {"pool": "1H", "steps": 5}}, "grpo", "1H", {"steps": 5}),
        ({"opd": {"steps": 5}}, "opd", None, {"steps": 5}),
    ],
)
def test_chain_grammar(
    written: Any, kind: str, pool: str | None, overrides: dict[str, Any]
) -> None:
    arms = {"a": {"teacher": [], "student": [written]}}
    (item,) = validate_recipe(plain(arms=arms, contrasts=[])).arms["a"].student or ()
    assert (item.kind, item.pool, item.overrides) == (kind, pool, overrides)


def test_an_item_overrides_single_keys_of_its_kind() -> None:
    recipe = validate_recipe(plain())
    last = (recipe.arms["half"].student or ())[-1]
    settings = recipe.stage(last)
    assert (settings.steps, settings.lr) == (5, 1e-3)  # type: ignore[union-attr]


def test_an_override_of_another_variant_drops_the_first_ones_keys() -> None:
    data = plain(arms={"a": {"teacher": [], "student": [{"opd": {"targets": {"kind": "full"}}}]}})
    recipe = validate_recipe({**data, "contrasts": []})
    (item,) = recipe.arms["a"].student or ()
    assert recipe.stage(item).targets == FullVocabulary()  # type: ignore[union-attr]


def test_a_stage_reads_its_own_pool_or_the_usual_one_of_its_kind() -> None:
    data = plain(pools={"labels": 10, "prompts": 20, "worked": 5}, contrasts=[])
    data["arms"] = {"a": {"teacher": ["sft", "grpo"], "student": ["warmup", {"opd": "1H"}]}}
    recipe = validate_recipe(data)
    arm = recipe.arms["a"]
    pools = [recipe.pool(item) for item in (*(arm.teacher or ()), *(arm.student or ()))]
    assert pools == ["worked", "labels", "prompts", "1H"]
    without = validate_recipe({**data, "pools": {"labels": 10}})
    assert [without.pool(item) for item in arm.teacher or ()] == ["labels", "labels"]
    assert [without.pool(item) for item in arm.student or ()] == ["labels", "1H"]


def test_variants_have_a_short_form() -> None:
    recipe = validate_recipe(with_stage("opd", kl={"kind": "mixed", "forward_weight": 0.2}))
    assert recipe.stages.opd.kl == MixedKL(forward_weight=0.2)
    assert recipe.stages.opd.targets == FullVocabulary()


def test_an_arm_without_student_is_about_its_teacher() -> None:
    recipe = validate_recipe(plain(arms={"t": {"teacher": ["grpo"]}}, contrasts=[]))
    assert recipe.arms["t"].evaluates == "teacher"
    assert recipe.arms["t"].student is None


def test_resolved_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = validate_recipe(plain())
    write_resolved(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    written = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert written["stages"]["grpo"]["group_size"] == 8
    assert written["arms"]["half"]["student"][-1] == {"grpo": {"pool": "2H", "steps": 5}}


def test_schema_knows_every_key_and_refuses_others() -> None:
    schema = recipe_schema()
    assert set(schema["properties"]) == {*Recipe.model_fields, "profiles"}
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"name", "task", "models", "pools", "arms"}


# --- profiles ------------------------------------------------------------------------------------

PROFILES = """
profiles:
  fast:
    name: study-fast
    stages: {grpo: {steps: 2}, opd: {targets: full}}
    seeds: [0]
  misspelt: {stages: {grpo: {stesp: 2}}, seedz: [1], models: {student: {surce: x}}}
  bad_value: {stages: {opd: {kl: sideways}, grpo: {lr: -1}}}
  empty: {}
"""


@pytest.fixture
def profiled(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE + PROFILES)
    return path


def test_a_profile_merges_mappings_and_replaces_the_rest(profiled: Path) -> None:
    recipe = load_recipe(profiled, profile="fast")
    assert (recipe.name, recipe.seeds) == ("study-fast", (0,))
    assert (recipe.stages.grpo.steps, recipe.stages.grpo.lr) == (2, 1e-3)
    assert recipe.stages.opd.targets == FullVocabulary()
    assert recipe.pools.labels == 100
    plain_recipe = load_recipe(profiled)
    assert plain_recipe == validate_recipe(plain())
    assert load_recipe(profiled, profile="empty") == plain_recipe


def test_overrides_win_over_a_profile(profiled: Path) -> None:
    assert load_recipe(profiled, ["stages.grpo.steps=9"], "fast").stages.grpo.steps == 9


def test_the_resolved_recipe_has_no_profiles(profiled: Path, tmp_path: Path) -> None:
    recipe = load_recipe(profiled, profile="fast")
    write_resolved(recipe, tmp_path / "recipe.yaml")
    assert "profiles" not in yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_an_unknown_profile_lists_the_names(profiled: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--profile fats: .*did you mean 'fast'\?"):
        load_recipe(profiled, profile="fats")
    with pytest.raises(InputError, match=r"--profile x: .*fast, misspelt, bad_value, empty"):
        load_recipe(profiled, profile="x")
    (tmp_path / "bare.yaml").write_text(RECIPE)
    with pytest.raises(InputError, match="it has none; add it under `profiles`"):
        load_recipe(tmp_path / "bare.yaml", profile="fast")


def test_errors_of_a_chosen_profile_point_into_it(profiled: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(profiled, profile="misspelt")
    text = str(caught.value)
    assert "profiles.misspelt.stages.grpo.stesp: unknown key; did you mean 'steps'?" in text
    assert "profiles.misspelt.seedz: unknown key; did you mean 'seeds'?" in text
    assert "profiles.misspelt.models.student.surce: unknown key" in text
    with pytest.raises(InputError) as caught:
        load_recipe(profiled, profile="bad_value")
    text = str(caught.value)
    assert "profiles.bad_value.stages.opd.kl" in text
    assert "profiles.bad_value.stages.grpo.lr" in text
    with pytest.raises(InputError, match=r"r\.yaml: stages\.grpo\.lr"):
        load_recipe(profiled, ["stages.grpo.lr=-2", "stages.opd.kl=reverse"], "bad_value")


@pytest.mark.parametrize(
    ("profiles", "chosen", "says"),
    [("[fast]", None, "profiles is a list"), ("{fast: 3}", "fast", "profiles.fast is no mapping")],
)
def test_profiles_that_are_no_mappings_are_refused(
    tmp_path: Path, profiles: str, chosen: str | None, says: str
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"{RECIPE}\nprofiles: {profiles}\n")
    with pytest.raises(InputError, match=says):
        load_recipe(path, profile=chosen)


# --- overrides -----------------------------------------------------------------------------------


def test_overrides_reach_into_mappings_lists_and_missing_keys(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    recipe = load_recipe(
        path,
        ["stages.grpo.steps=3", "seeds=[7]", "contrasts.0.than=half", "compute.processes=1"],
    )
    assert recipe.stages.grpo.steps == 3
    assert recipe.stages.grpo.lr == 1e-3
    assert recipe.seeds == (7,)
    assert recipe.contrasts[0].than == "half"
    assert recipe.compute.processes == 1


def test_an_override_leaves_its_argument_alone() -> None:
    data = {"a": {"b": 1}}
    apply_override(data, "a.b=2")
    assert data == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.grpo.steps", "expected KEY.SUBKEY=VALUE"),
        ("=3", "expected KEY.SUBKEY=VALUE"),
        ("a..b=3", "expected KEY.SUBKEY=VALUE"),
        ("name.x=3", "'x' lies below a plain value"),
        ("contrasts.9.than=a", "'9' is no index of a list of 1"),
        ("contrasts.².than=a", "'²' is no index of a list of 1"),
        ("seeds=[1", "not valid YAML"),
    ],
)
def test_bad_overrides_say_what_is_wrong(tmp_path: Path, override: str, words: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    with pytest.raises(InputError) as caught:
        load_recipe(path, [override])
    assert words in str(caught.value)
    assert override in str(caught.value)


def test_a_misspelt_override_is_an_unknown_key(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    with pytest.raises(InputError, match=r"stages\.grpo\.step: unknown key; did you mean 'steps'"):
        load_recipe(path, ["stages.grpo.step=3"])


# --- what is refused -----------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml: no such recipe"):
        load_recipe(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\ntask: [", ":2: not valid YAML"),
        ("name: a\nname: b\n", "line 2: key 'name' occurs twice"),
        ("- 1\n", "expected a mapping of keys, found list"),
        ("", "expected a mapping of keys, found NoneType"),
        ("name: {{study}}\n", "line 1: key {'study': None} is no plain value"),
        ("name: 2026-13-01\n", "not valid YAML (month must be in 1..12)"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_a_file_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"name: caf\xe9\n")
    with pytest.raises(InputError, match="not UTF-8 at byte 9; save it as UTF-8"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (plain(sead=[1]), "r.yaml: sead: unknown key; did you mean 'seeds'?"),
        (
            with_stage("grpo", step=5),
            "r.yaml: stages.grpo.step: unknown key; did you mean 'steps'?",
        ),
        (
            plain(models={"teacher": {"source": "tiny:teacher", "sourse": "x"}}),
            "r.yaml: models.teacher.sourse: unknown key; did you mean 'source'?",
        ),
        (
            plain(arms={"a": {"studnet": ["grpo"]}}),
            "r.yaml: arms.a.studnet: unknown key; did you mean 'student'?",
        ),
        (
            with_stage("warmup", targets={"kind": "top_k", "kk": 3}),
            "r.yaml: stages.warmup.targets.kk: unknown key; did you mean 'k'?",
        ),
        (
            plain(compute={"rollouts": {"kind": "vllm", "sleeps": "no way"}}),
            "r.yaml: compute.rollouts.sleeps = 'no way': input should be a valid boolean",
        ),
        (
            plain(sampling={"zzz": 1}),
            "r.yaml: sampling.zzz: unknown key; known keys: max_new_tokens, temperature",
        ),
    ],
)
def test_unknown_keys_come_with_a_near_name(data: dict[str, Any], line: str) -> None:
    assert line in refusal(data)


@pytest.mark.parametrize(
    ("data", "beginning"),
    [
        (with_stage("grpo", steps="ten"), "r.yaml: stages.grpo.steps = 'ten': "),
        (with_stage("grpo", steps=2.5), "r.yaml: stages.grpo.steps = 2.5: "),
        (with_stage("grpo", steps=True), "r.yaml: stages.grpo.steps = True: "),
        (with_stage("grpo", steps=0), "r.yaml: stages.grpo.steps = 0: "),
        (with_stage("grpo", lr=-1.0), "r.yaml: stages.grpo.lr = -1.0: "),
        (with_stage("grpo", lr=float("inf")), "r.yaml: stages.grpo.lr = inf: "),
        (plain(seeds=[]), "r.yaml: seeds: "),
        (plain(seeds=["0"]), "r.yaml: seeds.0 = '0': "),
        (plain(seeds=[0, -1]), "r.yaml: seeds.1 = -1: "),
        (plain(seeds=[0, 1, 0]), "r.yaml: seeds: [0, 1, 0] repeats a seed; give each once"),
        (plain(name="a b"), "r.yaml: name = 'a b': "),
        (plain(pools={"labels": "many"}), "r.yaml: pools.labels = 'many': "),
        (plain(task={"train": "x", "eval": {}}), "r.yaml: task.eval: "),
    ],
)
def test_wrong_types_and_values_are_shown(data: dict[str, Any], beginning: str) -> None:
    assert any(line.startswith(beginning) for line in refusal(data)), refusal(data)


def test_missing_keys_are_named() -> None:
    data = plain()
    del data["pools"], data["task"]["train"]
    assert refusal(data) == [
        "r.yaml: task.train: missing; add it",
        "r.yaml: pools: missing; add it",
    ]


def test_every_problem_is_listed_at_once() -> None:
    data = {**with_stage("grpo", steps=0, lr="x"), "sead": 1}
    assert len(refusal(data)) == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arms": {"a": {"student": [{"grpo": "3H"}]}}}, "pool '3H' is not one of labels, 1H, 2H"),
        ({"arms": {"a": {"student": [{"grpo": "prompts"}]}}}, "grpo cannot read pool 'prompts'"),
        ({"arms": {"a": {"student": ["opd"]}}}, "opd needs a teacher"),
        ({"arms": {"a": {"teacher": ["opd"]}}}, "opd needs a teacher"),
        ({"arms": {"a": {"student": ["pretrain"]}}}, "pretrain belongs under models.NAME.prepare"),
        ({"arms": {"a": {"student": [{"grpo": {"group_size": 1}}]}}}, "set group_size >= 2"),
        (
            {"arms": {"a": {"student": [{"grpo": {"stebs": 1}}]}}},
            "arms.a.student[0].grpo: stebs: unknown key; did you mean 'steps'?",
        ),
        (
            {"arms": {"a": {"student": [{"grpo": {"kl": {"coeficient": 1.0}}}]}}},
            "arms.a.student[0].grpo: kl.coeficient: unknown key; did you mean 'coefficient'?",
        ),
        (
            {"arms": {"a": {"student": [{"grpo": {"steps": 0}}]}}},
            "arms.a.student[0].grpo: steps = 0: input should be greater than 0",
        ),
        (
            {"task": {"train": "task:arithmetic", "eval": "test.jsonl", "verifier": "math"}},
            "task.eval = 'test.jsonl': expected names with values, such as {NAME: VALUE}",
        ),
        (
            {"models": {"student": {"source": "tiny:student", "prepare": [{"pretrain": "1H"}]}}},
            "models.student.prepare[0]: pretrain makes its own traces and reads no pool, but is",
        ),
        (
            {"contrasts": [{"better": "bridge", "than": "bridge"}]},
            "contrasts[0]: 'bridge' is compared with itself; name two arms",
        ),
        ({"arms": {"a": {"student": [], "student_model": "tutor"}}}, "model 'tutor' is not one of"),
        ({"arms": {"a": {}}}, "an arm needs a `teacher` or a `student` chain"),
        (
            {"contrasts": [{"better": "bridge", "than": "b"}]},
            "contrasts[0].than: 'b' is not an arm",
        ),
        (
            {
                "models": {
                    "teacher": {"source": "tiny:teacher"},
                    "student": {"source": "prune:tutor"},
                }
            },
            "expected prune:MODEL with MODEL one of ['teacher']",
        ),
        (
            {
                "models": {
                    "teacher": {"source": "tiny:teacher", "layers": 2},
                    "student": {"source": "tiny:student", "prepare": ["grpo"]},
                }
            },
            "only prune: sources take `layers`; remove it",
        ),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], words: str) -> None:
    assert words in "\n".join(refusal(plain(**{"contrasts": [], **changes})))


def test_models_pruned_in_a_circle_are_refused_and_the_way_is_shown() -> None:
    models = {
        "student": {"source": "prune:middle", "layers": 2},
        "teacher": {"source": "prune:student", "layers": 2},
        "middle": {"source": "prune:teacher", "layers": 2},
        "outside": {"source": "prune:teacher", "layers": 2},
    }
    (line,) = refusal(plain(models=models))
    assert line.count("pruned from itself") == 3
    assert (
        "models.student.source: pruned from itself (student -> middle -> teacher -> student); "
        "start the circle from a model with weights of its own" in line
    )


def test_the_sampled_token_estimates_the_reverse_kl_only() -> None:
    lines = refusal(with_stage("opd", targets="sampled", kl="forward"))
    assert lines == [
        "r.yaml: stages.opd: targets: sampled estimates the reverse KL only, but kl is forward; "
        "set kl: reverse, or targets: full or top_k"
    ]


def test_shares_of_a_mixture_sum_to_one() -> None:
    lines = refusal(with_stage("pretrain", worked=0.5, careless=0.5, guessed=0.5))
    assert "worked + careless + guessed = 1.5, expected 1" in lines[0]
