"""Pools and decontamination: disjoint, stable, and apart from the evaluation sets."""

from __future__ import annotations

import os
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.errors import InputError
from headwater.tasks.contamination import normalise, remove_contaminated
from headwater.tasks.pools import make_pools
from headwater.tasks.problems import LabelledProblems, load_problems
from headwater.types import Label, Problem

SHARED = Path(os.environ.get("HEADWATER_SHARED", Path(__file__).parents[2] / "shared")) / "data"


def problems(*texts: str, solved: int = 0) -> LabelledProblems:
    return LabelledProblems.of(
        [Problem(f"id{index}", text, "test") for index, text in enumerate(texts)],
        [Label(f"id{i}", str(i), "worked" if i < solved else None) for i in range(len(texts))],
    )


def numbered(count: int, solved: int = 0) -> LabelledProblems:
    return problems(*(f"What is {n} + 1?" for n in range(count)), solved=solved)


def ids(found: tuple[Problem, ...]) -> list[str]:
    return [problem.id for problem in found]


@given(
    labels=st.integers(2, 12),
    prompts=st.integers(0, 10),
    worked=st.integers(0, 8),
    validation=st.integers(0, 8),
    seed=st.integers(0, 3),
)
def test_pools_have_their_sizes_and_are_disjoint(
    labels: int, prompts: int, worked: int, validation: int, seed: int
) -> None:
    pools = make_pools(
        numbered(40, solved=20), labels=labels, split=("1H", "2H"), prompts=prompts,
        worked=worked, validation=validation, seed=seed,
    )  # fmt: skip
    wanted = {"labels": labels, "1H": (labels + 1) // 2, "2H": labels // 2, "prompts": prompts,
              "worked": worked, "validation": validation}  # fmt: skip
    assert {name: len(pools[name]) for name in pools.names} == {
        name: size for name, size in wanted.items() if size
    }
    whole = [set(ids(pools[n])) for n in pools.names if n not in ("1H", "2H")]
    assert all(not one & other for one, other in combinations(whole, 2))
    halves = ids(pools["1H"]) + ids(pools["2H"])
    assert sorted(halves) == sorted(ids(pools["labels"]))
    for name in pools.names:
        if name != "prompts":
            assert [label.problem_id for label in pools.labels(name)] == ids(pools[name])
    if worked:
        assert all(label.solution == "worked" for label in pools.labels("worked"))


def test_worked_problems_of_another_source_are_apart_by_text_and_have_ids_of_their_own() -> None:
    data = problems(*(f"What is {n} + 1?" for n in range(6)))
    other = problems("what is 3 + 1", "What is 7 * 2?", "What is 8 * 2?", solved=3)
    pools = make_pools(data, labels=6, worked=2, worked_data=other)
    assert {p.id: p.prompt for p in pools["worked"]} == {
        "worked:id1": "What is 7 * 2?",
        "worked:id2": "What is 8 * 2?",
    }
    assert [label.problem_id for label in pools.labels("worked")] == ids(pools["worked"])
    assert len(pools["labels"]) == 6
    with pytest.raises(InputError, match="asks for 3 worked solutions, but 2 problems have one"):
        make_pools(data, labels=6, worked=3, worked_data=other)


def test_the_prompts_pool_has_no_labels() -> None:
    pools = make_pools(numbered(10), labels=2, prompts=3)
    with pytest.raises(InputError, match=r"'prompts' is never graded.*labels"):
        pools.labels("prompts")


def test_the_division_is_that_of_the_seed_whatever_the_order_of_the_file() -> None:
    data = numbered(50)
    shuffled = LabelledProblems.of(data.problems[::-1], data.labels[::-1])
    one, two = (make_pools(d, labels=20, split=("1H", "2H"), seed=4) for d in (data, shuffled))
    assert {n: ids(one[n]) for n in one.names} == {n: ids(two[n]) for n in two.names}
    other = make_pools(data, labels=20, split=("1H", "2H"), seed=5)
    assert set(ids(other["labels"])) != set(ids(one["labels"]))
    hashes = [made.labelled(name).data_hash for made in (one, two) for name in ("1H", "2H")]
    assert hashes[:2] == hashes[2:] and hashes[0] != hashes[1]


def test_more_labels_contain_the_fewer_and_move_nothing_else() -> None:
    few, many = (
        make_pools(numbered(60, solved=60), labels=n, split=("1H", "2H"), prompts=10, worked=5,
                   validation=5) for n in (10, 30)
    )  # fmt: skip
    for name in ("labels", "1H", "2H"):
        assert set(ids(few[name])) < set(ids(many[name]))
    for name in ("prompts", "worked", "validation"):
        assert ids(few[name]) == ids(many[name])


def test_the_first_of_a_pool_is_a_pool() -> None:
    pools = make_pools(numbered(20), labels=10, split=["1H", "2H"], prompts=4)
    assert pools["labels:3"] == pools["labels"][:3]
    assert [label.problem_id for label in pools.labels("1H:2")] == ids(pools["1H"][:2])
    assert pools["labels:10"] == pools["labels"]
    with pytest.raises(InputError, match="'prompts' is never graded"):
        pools.labels("prompts:2")
    with pytest.raises(InputError, match="pool 'worked:2' has no problems"):
        pools["worked:2"]


def test_the_same_text_is_never_in_two_pools() -> None:
    data = problems(*(f"Find ${n}+x$." for n in range(5)), *(f"find {n} + x" for n in range(5)))
    pools = make_pools(data, labels=3, prompts=2)
    texts = [normalise(p.prompt) for name in ("labels", "prompts") for p in pools[name]]
    assert len(set(texts)) == 5
    with pytest.raises(InputError, match=r"ask for 6 problems .* there are 5 distinct"):
        make_pools(data, labels=6)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"labels": 8, "prompts": 5}, r"ask for 13 problems \(labels 8, prompts 5\).*there are 10"),
        ({"labels": 2, "worked": 4}, r"asks for 4 worked solutions, but 3 problems have"),
        ({"labels": -1}, r"pools\.labels=-1; expected 0 or more"),
        ({"labels": 1, "split": ("1H", "2H")}, r"pools\.labels=1 cannot be split into 2 parts"),
        ({"labels": 4, "split": ("1H", "1H")}, r"repeats a name"),
        ({"labels": 4, "split": ("prompts",)}, r"takes one of worked, validation, labels, prompts"),
    ],
)
def test_impossible_requests_are_refused(sizes: dict[str, int], says: str) -> None:
    with pytest.raises(InputError, match=says):
        make_pools(numbered(10, solved=3), **sizes)  # type: ignore[arg-type]


def test_an_empty_pool_is_named() -> None:
    with pytest.raises(InputError, match=r"'validation' has no problems; set its size.*labels"):
        make_pools(numbered(10), labels=4)["validation"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (r"Find $\dfrac{1}{2} + x$.", "find \\frac12+x", True),
        (r"Let \(a\ge 1{,}000\), where $\text{a}$ is", "let a \\geq 1000 where a is", True),
        (r"$\left(\,x,\; y\right)$", "(x, y)", True),
        (r"Evaluate $\log_82$.", r"Evaluate $\log_8 2$.", True),
        ("Ｗhat is ２＋２？", "what is 2+2?", True),
        ("Compute 3 + 4", "Compute 3 - 4", False),
        ("Compute 1.5 + 2", "Compute 15 + 2", False),
        ("88 / (4 / 2)", "88 / 4 / 2", False),
        ("where k < 0", "where k > 0", False),
        ("the pair 1, 2", "the pair 12", False),
        ("f(1,2)", "f(12)", False),
    ],
)
def test_normalisation_removes_styling_and_keeps_meaning(one: str, other: str, same: bool) -> None:
    assert (normalise(one) == normalise(other)) is same


def test_exact_and_restyled_problems_are_removed_and_near_ones_reported() -> None:
    story = "Tom has {} apples and buys 4 more apples at the small market in town. How many now?"
    train = problems(
        "Find $x$ with $2x = 6$.",
        story.format(3),
        "find \\(x\\) with   $2x=6$",
        "Find $x$ with $2x = -6$.",
        "Something else entirely.",
    )
    evals = {
        "a": problems("Find $x$ with $2x = 6$."),
        "b": problems("Unrelated.", story.format(9)),
    }
    kept, report = remove_contaminated(train, evals)
    assert ids(kept.problems) == ["id1", "id3", "id4"]
    assert [label.answer for label in kept.labels] == ["1", "3", "4"]
    assert report.removed_ids == {"id0", "id2"}
    assert [(m.kind, m.train_id, m.eval_set, m.eval_id) for m in report.removed] == [
        ("exact", "id0", "a", "id0"),
        ("normalised", "id2", "a", "id0"),
    ]
    (near,) = report.near
    assert (near.kind, near.train_id, near.eval_set, near.eval_id) == ("near", "id1", "b", "id1")
    assert near.share == pytest.approx(8 / 11)  # 18 words make 11 8-grams, 3 of them with the 3
    assert report.counts("a") == {"exact": 1, "normalised": 1, "near": 0}
    assert report.as_dict()["eval_problems"] == {"a": 1, "b": 2}


def test_nothing_left_to_train_on_is_an_error() -> None:
    data = numbered(3)
    with pytest.raises(InputError, match=r"all 3 training problems are in .*\(test\)"):
        remove_contaminated(data, {"test": data})


EVALS = ("gsm8k_test", "math500", "aime24", "aime25", "amc23")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("gsm8k_train.jsonl.gz", {"gsm8k_test": 2}),
        ("math_train.jsonl.gz", {"math500": 58}),
        ("dapo_math_17k.jsonl.gz", {"math500": 1}),
        ("svamp.jsonl", {}),
        ("mawps.jsonl", {}),
    ],
)
def test_the_real_training_files_are_clean(name: str, near: dict[str, int]) -> None:
    if not (SHARED / name).is_file():
        pytest.skip(f"needs {name} in the shared data folder (HEADWATER_SHARED)")
    train = load_problems(str(SHARED / name))
    kept, report = remove_contaminated(
        train, {key: load_problems(str(SHARED / f"{key}.jsonl")) for key in EVALS}
    )
    assert kept.data_hash == train.data_hash
    for key in EVALS:
        assert report.counts(key) == {"exact": 0, "normalised": 0, "near": near.get(key, 0)}


def test_an_evaluation_set_mixed_into_real_training_data_is_found_whole() -> None:
    if not (SHARED / "math_train.jsonl.gz").is_file():
        pytest.skip("needs math_train and math500 in the shared data folder (HEADWATER_SHARED)")
    train = load_problems(str(SHARED / "math_train.jsonl.gz"))
    held_out = load_problems(str(SHARED / "math500.jsonl"))
    restyled = [
        Problem(f"leak-{p.id}", p.prompt.upper() if "\\" not in p.prompt else f" {p.prompt} .", "x")
        for p in held_out.problems
    ]
    leaky = LabelledProblems.of(
        [*train.problems, *restyled],
        [*train.labels, *(Label(p.id, "0") for p in restyled)],
    )
    kept, report = remove_contaminated(leaky, {"math500": held_out})
    assert kept.problems == train.problems
    assert report.removed_ids == {p.id for p in restyled}
