"""Fingerprints follow the files behind a name, not the name alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from headwater.config.loading import validate_recipe
from headwater.workflow.identities import source_files, verifier_code
from headwater.workflow.prepare import prepare_study


def test_a_verifier_is_its_modules_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "judges"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('found, not imported')")
    module = package / "strict.py"
    module.write_text("def judge(completion, gold): return completion == gold")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = verifier_code("python:judges.strict:judge")
    assert before is not None and len(before) == 64
    module.write_text("def judge(completion, gold): return gold in completion")
    assert verifier_code("python:judges.strict:judge") not in (before, None)
    assert verifier_code("python:judges.absent:judge") is None
    assert verifier_code(f"reward:{module}:judge") == verifier_code("reward:judges.strict:judge")
    assert verifier_code(f"reward:{module}.py:judge") is None and verifier_code("math") is None
    assert verifier_code("math:boxed") is None


def test_a_local_folder_is_its_settings_and_the_times_of_its_weights(tmp_path: Path) -> None:
    source = f"hf:{tmp_path}"
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    config.write_text("{}")
    weights.write_bytes(b"one")
    (tmp_path / "README.md").write_text("a model")
    os.utime(weights, ns=(5, 5))
    seen = [source_files(source)]
    (tmp_path / "README.md").write_text("another text")
    os.utime(config, ns=(9, 9))
    assert source_files(source) == seen[0]
    for change in (
        lambda: config.write_text('{"rope_theta": 2}'),
        lambda: os.utime(weights, ns=(6, 6)),
        lambda: (weights.write_bytes(b"four"), os.utime(weights, ns=(6, 6))),
        lambda: weights.rename(tmp_path / "other.safetensors"),
    ):
        change()
        seen.append(source_files(source))
    assert None not in seen and len(set(seen)) == 5
    assert source_files("hf:some/model") is None
    assert source_files("tiny:student") is None


def test_a_gguf_file_is_its_size_beginning_and_end(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    content = bytearray(3 * 2**20)
    seen = set()
    for place in (None, 7, len(content) - 7):
        if place is not None:
            content[place] = 1
        path.write_bytes(content)
        seen.add(source_files(f"gguf:{path}"))
    path.write_bytes(content + b"\0")
    seen.add(source_files(f"gguf:{path}"))
    assert None not in seen and len(seen) == 4


def test_a_study_names_its_stages_by_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "judging.py").write_text("def judge(completion, gold): return True")
    (tmp_path / "config.json").write_text("{}")
    recipe = {
        "name": "named",
        "task": {
            "train": "task:arithmetic?steps=3-4&count=30",
            "eval": {"held_out": "task:arithmetic?steps=3-4&count=5&seed=9"},
            "verifier": "python:judging:judge",
            "prompt": "bare",
        },
        "models": {"student": {"source": f"hf:{tmp_path}"}},
        "pools": {"labels": 20},
        "arms": {"cold": {"student": ["grpo"]}},
    }

    def names() -> list[str]:
        return list(prepare_study(validate_recipe(recipe)).graph.nodes)

    source, grpo, _ = names()
    (tmp_path / "judging.py").write_text("def judge(completion, gold): return 1.0")
    assert names()[0] == source and names()[1] != grpo
    (tmp_path / "config.json").write_text('{"rope_theta": 2}')
    assert names()[0] != source
