"""Problems of the reasoning-gym library, and scoring by it."""

import json
import sys
from typing import Any

import pytest

from headwater.errors import InputError
from headwater.tasks import procedural
from headwater.tasks.problems import load_problems
from headwater.types import Verdict
from headwater.verify.verifiers import accepts_examples, check_answers, make_verifier

needs_library = pytest.mark.skipif(
    not procedural.library_version(), reason="needs reasoning-gym (extra reasoning-gym)"
)


@pytest.mark.parametrize(
    "value",
    [
        {"a": 1, 2: (3, [4, None]), (5, 6): {"x"}},
        [(), {}, set(), frozenset({1, 2}), "dict", {"dict": [1]}],
        {"tuple": {"set": 1.5}},
    ],
)
def test_entries_survive_json(value: Any) -> None:
    kept = json.loads(json.dumps(procedural._to_json(value)))
    assert procedural._from_json(kept) == value


def test_what_json_cannot_keep_is_refused() -> None:
    with pytest.raises(TypeError, match="a object"):
        procedural._to_json([object()])


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    reply = procedural._make({"name": "gcd", "options": {}})
    assert "headwater[reasoning-gym]" in reply["refused"]


@needs_library
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("reasoning_gym:leg_countin", "'leg_countin' is no task .* use leg_counting"),
        ("reasoning_gym:gcd?sise=4", "unknown option 'sise'; choose from .*size"),
        ("reasoning_gym:gcd?min_numbers=9&max_numbers=2", "refused by reasoning-gym"),
        ("reasoning_gym:gcd?size=0", "size=0"),
        ("reasoning_gym:gcd?size", "option=value"),
    ],
)
def test_sources_that_cannot_be_made_are_refused(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_problems(source)


@needs_library
@pytest.mark.parametrize("name", ["gcd", "word_ladder", "arc_agi", "countdown"])
def test_own_answers_score_full_marks(name: str) -> None:
    data = load_problems(f"reasoning_gym:{name}?size=3&seed=5")
    assert load_problems(f"reasoning_gym:{name}?size=3&seed=5").data_hash == data.data_hash
    with make_verifier("reasoning_gym", workers=2) as verifier:
        right = [(f"\\boxed{{{label.answer}}}", label) for label in data.labels]
        grades = verifier.examine([*right, (r"\boxed{no}", data.labels[0]), ("7", data.labels[0])])
        assert accepts_examples(verifier, "boxed", data.labels) is True
    assert [grade.reward for grade in grades[:3]] == [1.0] * 3
    assert [grade.verdict for grade in grades] == [
        Verdict.CORRECT, Verdict.CORRECT, Verdict.CORRECT, Verdict.INCORRECT, Verdict.UNPARSEABLE,
    ]  # fmt: skip
    assert grades[0].how == "scored 1 by reasoning-gym"


@needs_library
def test_many_right_answers_need_the_library_to_judge() -> None:
    data = load_problems("reasoning_gym:graph_color?size=2&seed=0&num_colors=3")
    assert data.labels[0].answer == ""
    with pytest.raises(InputError, match="use verifier: reasoning_gym"):
        check_answers("math", "reasoning_gym:graph_color", data.labels)
    with make_verifier("reasoning_gym") as verifier:
        assert accepts_examples(verifier, "boxed", data.labels) is None
        entry = data.labels[0].row or {}
        graph = procedural._from_json(entry[procedural.ENTRY]["entry"])["metadata"]["puzzle"]
        colours = _coloured(graph["vertices"], graph["edges"], graph["color_options"])
        grades = verifier.examine([(f"\\boxed{{{json.dumps(colours)}}}", data.labels[0])])
    assert grades[0].verdict is Verdict.CORRECT


@needs_library
def test_other_problems_are_mathematics() -> None:
    with make_verifier("reasoning_gym:boxed") as verifier:
        assert verifier.grade([(r"\boxed{1/2}", "0.5"), (r"\boxed{1/3}", "0.5")]) == [
            Verdict.CORRECT, Verdict.INCORRECT,
        ]  # fmt: skip


def _coloured(vertices: list[int], edges: list[Any], colours: list[int]) -> dict[str, int]:
    """A proper colouring by trying every one, vertex after vertex."""
    found: dict[int, int] = {}

    def place(index: int) -> bool:
        if index == len(vertices):
            return True
        vertex = vertices[index]
        near = {a + b - vertex for a, b in edges if vertex in (a, b)}
        for colour in colours:
            if all(found.get(other) != colour for other in near):
                found[vertex] = colour
                if place(index + 1):
                    return True
                del found[vertex]
        return False

    assert place(0)
    return {str(vertex): colour for vertex, colour in found.items()}
