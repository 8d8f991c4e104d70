"""Artifacts are whole or absent, damage is found, and a run folder has one owner."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from headwater.errors import InputError, StageError
from headwater.workflow.store import ArtifactStore, run_lock

HOLD = """
import sys, time
from pathlib import Path
from headwater.workflow.store import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def publish(store: ArtifactStore, name: str = "aa11") -> Path:
    store.begin(name)
    (store.staging_dir(name) / "model").mkdir()
    (store.staging_dir(name) / "model" / "weights.bin").write_bytes(b"weights")
    (store.staging_dir(name) / "metrics.jsonl").write_text("{}\n")
    return store.publish(name, {"kind": "grpo", "parents": ["bb22"], "seconds": 1.5})


def test_publishing_moves_the_staged_files_and_says_what_they_are(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    path = publish(store)
    artifact = store.get("aa11")
    assert artifact is not None
    assert (artifact.kind, artifact.parents, artifact.path) == ("grpo", ("bb22",), path)
    assert (path / "model" / "weights.bin").read_bytes() == b"weights"
    manifest = store.manifest("aa11")
    assert manifest["files"]["model/weights.bin"] == {
        "bytes": 7,
        "sha256": hashlib.sha256(b"weights").hexdigest(),
    }
    assert not store.staging_dir("aa11").exists()
    assert not store.checkpoint_dir("aa11").exists()


@pytest.mark.parametrize("name", ["manifest.json.part", "account.json.part", "model/a.json.part"])
def test_what_a_killed_attempt_was_writing_is_no_part_of_the_next_ones_result(
    tmp_path: Path, name: str
) -> None:
    store = ArtifactStore(tmp_path)
    store.begin("aa11")
    (store.checkpoint_dir("aa11") / "state.json").write_text("{}")
    left = store.staging_dir("aa11") / name
    left.parent.mkdir(exist_ok=True)
    left.write_text("{half")
    assert store.begin("aa11") is True
    (store.staging_dir("aa11") / "metrics.jsonl").write_text("{}\n")
    store.publish("aa11", {"kind": "grpo", "parents": [], "seconds": 1.5})
    assert ArtifactStore(tmp_path).find_damage("aa11") is None
    assert list(store.manifest("aa11")["files"]) == ["metrics.jsonl"]


def test_what_is_only_staged_is_not_there(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    store.begin("aa11")
    (store.staging_dir("aa11") / "half.bin").write_bytes(b"ha")
    assert store.get("aa11") is None


def test_staging_is_emptied_unless_a_checkpoint_continues_it(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    assert store.begin("aa11") is False
    (store.staging_dir("aa11") / "half.bin").write_bytes(b"ha")
    assert store.begin("aa11") is False
    assert list(store.staging_dir("aa11").iterdir()) == []
    (store.staging_dir("aa11") / "half.bin").write_bytes(b"ha")
    (store.checkpoint_dir("aa11") / "state.json").write_text("{}")
    assert store.begin("aa11") is True
    assert (store.staging_dir("aa11") / "half.bin").exists()


def weights(path: Path, content: bytes | None) -> None:
    file = path / "model" / "weights.bin"
    file.unlink() if content is None else file.write_bytes(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "model/weights.bin is missing"),
        (b"weight", "model/weights.bin has 6 bytes, not 7"),
        (b"weightz", "model/weights.bin differs from its recorded hash"),
    ],
)
def test_damage_is_named(tmp_path: Path, content: bytes | None, reason: str) -> None:
    weights(publish(ArtifactStore(tmp_path)), content)
    store = ArtifactStore(tmp_path)
    damage = store.find_damage("aa11")
    assert damage is not None
    assert damage.reason == reason
    with pytest.raises(StageError, match=reason):
        store.get("aa11")
    store.discard("aa11")
    assert store.get("aa11") is None


def test_an_unreadable_manifest_is_damage(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    (publish(store) / "manifest.json").write_text("{")
    damage = store.find_damage("aa11")
    assert damage is not None
    assert damage.reason.startswith("manifest.json cannot be read")


def test_hashes_are_read_once_and_sizes_always(tmp_path: Path) -> None:
    path = publish(ArtifactStore(tmp_path))
    store = ArtifactStore(tmp_path)
    assert store.find_damage("aa11") is None
    weights(path, b"weightz")
    assert store.find_damage("aa11") is None
    weights(path, b"weight")
    assert store.find_damage("aa11") is not None


def test_a_second_run_is_refused_and_names_the_first(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        refused = pytest.raises(InputError, match=f"in use by process {process.pid}")
        with refused, run_lock(tmp_path):
            pass
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    with run_lock(tmp_path):
        assert (tmp_path / "run.lock").read_text() == str(os.getpid())


def test_the_lock_is_free_after_use(tmp_path: Path) -> None:
    for _ in range(2):
        with run_lock(tmp_path):
            pass
