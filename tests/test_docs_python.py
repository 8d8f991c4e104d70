"""The examples of docs/python.md, run in order as one program; docstrings of the public API."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from headwater import api

GUIDE = Path(__file__).parents[1] / "docs" / "python.md"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_examples_of_the_guide_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    program = tmp_path / "guide.py"
    program.write_text("\n".join(blocks))
    names: dict[str, object] = {"__name__": "guide"}
    exec(compile(program.read_text(), program, "exec"), names)  # noqa: S102 - our own examples
    trained, several, finished = (names[n] for n in ("trained", "several", "finished"))
    assert isinstance(trained, api.StageRecord) and len(trained.column("reward")) == 3
    assert isinstance(several, api.StageRecord) and several.spent["verifier_calls"] == 2 * 4 * 2
    assert isinstance(finished, api.StageRecord)
    curve = names["curve"]
    assert isinstance(curve, list) and 2 <= len(curve) < 8
    assert finished.column("reward")[: len(curve)] == curve


PUBLIC = [getattr(api, name) for name in api.__all__]


@pytest.mark.parametrize("thing", PUBLIC, ids=api.__all__)
def test_what_is_public_is_documented_and_typed(thing: object) -> None:
    assert len(inspect.getdoc(thing) or "") > 20
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        assert signature.return_annotation is not signature.empty
        assert all(p.annotation is not p.empty for p in signature.parameters.values())


def test_the_guide_names_every_verb() -> None:
    text = GUIDE.read_text()
    functions = [name for name in api.__all__ if inspect.isfunction(getattr(api, name))]
    ours = {"follow", "named_sources"}  # of the command line alone
    assert [n for n in functions if n not in ours and not re.search(rf"\b{n}\(", text)] == []
