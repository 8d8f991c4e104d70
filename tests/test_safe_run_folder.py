"""Run folders from a stranger: nothing outside of them is read, written or removed."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headwater import api
from headwater.comparison.folder import EvaluationFolder
from headwater.config.loading import validate_recipe
from headwater.errors import InputError, StageError
from headwater.report.samples import collect_samples
from headwater.storage import sealed, unsealed
from headwater.workflow.outcome import load_outcome
from headwater.workflow.record import RUN_FILE, read_record
from headwater.workflow.store import MANIFEST, ArtifactStore
from test_workflow_run import RECIPE, start

SECRET = "what lies outside"


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = tmp_path_factory.mktemp("received")
    start(world)
    return world


@pytest.fixture
def received(straight: Path, tmp_path: Path) -> Path:
    """The folder of a real run, as somebody might hand it on."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.csv").write_text(SECRET, encoding="utf-8")
    return Path(shutil.copytree(straight / "run", tmp_path / "run"))


def outside(received: Path) -> dict[str, str]:
    folder = received.parent / "outside"
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


def an_artifact(run_dir: Path) -> Path:
    return next(path.parent for path in sorted((run_dir / "artifacts").glob(f"*/{MANIFEST}")))


def link(path: Path, target: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


#: Where a link might lie, each read from or written to by some verb.
LINKS = [
    "tables",  # old tables are removed from it
    "figures",
    "results.json.part",  # written through
    "report.html.part",
    "run.json.part",
    "run.lock",  # emptied
    "workers.lock",
    "recipe.yaml",
    "run.json",
    "ledger.sqlite",
    "artifacts/aa",
    "staging",
    "checkpoints/aa",
    "logs/worker-0.log",
]


@pytest.mark.parametrize("name", LINKS)
def test_a_link_anywhere_is_refused_before_anything_is_touched(received: Path, name: str) -> None:
    target = received.parent / "outside"
    link(received / name, target if "." not in Path(name).name else target / "secret.csv")
    before = outside(received)
    verbs: list[Callable[[], object]] = [
        lambda: api.report(received),
        lambda: start(received.parent),
        lambda: collect_samples(received),
    ]
    for verb in verbs:
        with pytest.raises(InputError, match=r"is a link: a run's folder holds its own .*cp -rL"):
            verb()
    assert outside(received) == before


def test_a_pipe_that_would_be_waited_for_is_refused(received: Path) -> None:
    (received / "results.json").unlink(missing_ok=True)
    os.mkfifo(received / "results.json")
    with pytest.raises(InputError, match="is no regular file"):
        api.report(received)


def test_the_folder_itself_may_be_reached_by_a_link(received: Path) -> None:
    (received.parent / "latest").symlink_to(received)
    assert load_outcome(received.parent / "latest").rows


def test_links_that_are_no_part_of_a_run_are_left_alone(received: Path) -> None:
    (received / "notes").symlink_to(received.parent / "outside")
    assert load_outcome(received).rows


def edit_manifest(artifact: Path, **changes: Any) -> None:
    path = artifact / MANIFEST
    manifest = unsealed(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(sealed(manifest | changes)), encoding="utf-8")


@pytest.mark.parametrize(
    "name", ["../../outside.txt", "/etc/hostname", "model/../../x", "..", "", "a\\..\\b", "a\0b"]
)
def test_a_manifest_that_leads_out_is_damage(received: Path, name: str) -> None:
    artifact = an_artifact(received)
    files = {name: {"bytes": 0, "sha256": "0" * 64}}
    edit_manifest(artifact, files=files)
    damage = ArtifactStore(received).find_damage(artifact.name)
    assert damage is not None and "outside its artifact" in damage.reason
    with pytest.raises(StageError, match=r"outside its artifact.*run the recipe again"):
        api.report(received)


@pytest.mark.parametrize("files", [[], {"a": 3}, {"a": {"bytes": 1}}, "x", None])
def test_a_manifest_of_another_form_is_damage(received: Path, files: object) -> None:
    artifact = an_artifact(received)
    edit_manifest(artifact, files=files)
    damage = ArtifactStore(received).find_damage(artifact.name)
    assert damage is not None and "manifest names a file" in damage.reason


def test_a_link_inside_an_artifact_is_damage(received: Path) -> None:
    artifact = an_artifact(received)
    link(artifact / "more", received.parent / "outside")
    damage = ArtifactStore(received).find_damage(artifact.name)
    assert damage is not None and damage.reason == "more is a link and no file of its own"


@pytest.mark.parametrize("name", ["../../outside", "/etc", "..", "", "a/b", "a\n", 7])
def test_a_fingerprint_is_never_a_path(received: Path, name: Any) -> None:
    store = ArtifactStore(received)
    for place in (store.path, store.staging_dir, store.checkpoint_dir, store.discard):
        with pytest.raises(InputError, match="is no fingerprint"):
            place(name)
    record = unsealed(json.loads((received / RUN_FILE).read_text(encoding="utf-8")))
    record["nodes"][0]["fingerprint"] = name
    (received / RUN_FILE).write_text(json.dumps(sealed(record)), encoding="utf-8")
    with pytest.raises(InputError, match=r"run\.json cannot be read"):
        read_record(received)


def test_stages_in_a_circle_are_refused(received: Path) -> None:
    record = unsealed(json.loads((received / RUN_FILE).read_text(encoding="utf-8")))
    node = record["nodes"][0]
    node["model"] = record["nodes"][-1]["fingerprint"]
    (received / RUN_FILE).write_text(json.dumps(sealed(record)), encoding="utf-8")
    with pytest.raises(InputError, match=r"stands before .* a parent of it"):
        api.report(received)


@pytest.mark.parametrize(
    "program",
    [
        "CREATE TRIGGER t AFTER INSERT ON entries BEGIN DELETE FROM labels; END",
        "CREATE VIEW v AS SELECT * FROM entries",
    ],
)
def test_a_ledger_with_programs_in_it_is_refused(received: Path, program: str) -> None:
    with sqlite3.connect(received / "ledger.sqlite") as ledger:
        ledger.execute(program)
    with pytest.raises(InputError, match="triggers or views: a ledger has tables alone"):
        api.report(received)


def test_an_evaluation_folder_with_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "secret").write_text(SECRET, encoding="utf-8")
    (tmp_path / "out" / "settings.json.part").symlink_to(tmp_path / "secret")
    settings = api.evaluation_settings(problems="task:arithmetic")
    with pytest.raises(InputError, match="is a link"):
        EvaluationFolder(tmp_path / "out", settings, {})
    assert (tmp_path / "secret").read_text(encoding="utf-8") == SECRET


@pytest.mark.parametrize("name", ["../evil", "a/b", "/abs", "..", ".", "", "a\nb", "x" * 81, "a b"])
def test_names_of_a_recipe_are_no_paths(name: str) -> None:
    arm = RECIPE["arms"]["cold"]
    eval_source = next(iter(RECIPE["task"]["eval"].values()))
    changes: list[dict[str, Any]] = [
        {"name": name},
        {"arms": {name: arm}},
        {"task": RECIPE["task"] | {"eval": {name: eval_source}}},
        {"models": RECIPE["models"] | {name: {"source": "tiny:student"}}},
        {"pools": {"labels": 8, "split": [name, "2H"]}},
        {"hypotheses": {name: {"statement": "x", "claims": []}}},
    ]
    for change in changes:
        with pytest.raises(InputError, match=r"should match pattern|at most 80 characters"):
            validate_recipe(RECIPE | {"contrasts": []} | change)
