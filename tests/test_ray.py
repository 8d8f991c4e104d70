"""Runs on Ray clusters of simulated nodes: the results are those of a run on one machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from headwater import api
from headwater.config.loading import validate_recipe
from headwater.errors import InputError, Interrupted, StageError
from headwater.ledger import Ledger
from headwater.workflow.executor import KEPT
from headwater.workflow.messages import WorkerSetup
from headwater.workflow.outcome import RunOutcome, load_outcome
from headwater.workflow.prepare import prepare_study
from headwater.workflow.progress import ProgressView
from headwater.workflow.ray_executor import RayExecutor
from headwater.workflow.run import make_task, run_study
from headwater.workflow.store import ArtifactStore
from processes_seen import all_end, descendants
from small_study import HEADWATER, made, study_file
from test_workflow_run import FUNCTIONS, RECIPE, numbers, ran, start, wait_for
from workflow_stages import CRASH, DEAF, FAIL, KILL, STALL

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
ray = pytest.importorskip("ray", reason="needs the extra ray: pip install 'headwater[ray]'")
from ray.cluster_utils import Cluster  # noqa: E402 - only where there is ray

pytestmark = pytest.mark.slow  # processes of a cluster take seconds to start

COLD: dict[str, Any] = {"arms": {"cold": {"student": ["grpo"]}}, "contrasts": []}


class Seen(ProgressView):
    """A view that keeps what it is told."""

    def __init__(self, graph: Any) -> None:
        super().__init__(graph)
        self.said: list[str] = []
        self.kinds: dict[str, set[str]] = {"started": set(), "progressed": set(), "warned": set()}

    def started(self, fingerprint: str) -> None:
        super().started(fingerprint)
        self.kinds["started"].add(fingerprint)

    def progressed(self, fingerprint: str, values: Any) -> None:
        super().progressed(fingerprint, values)
        self.kinds["progressed"].add(fingerprint)

    def warned(self, fingerprint: str, words: str) -> None:
        super().warned(fingerprint, words)
        self.kinds["warned"].add(words)

    def say(self, message: str) -> None:
        self.said.append(message)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three nodes: the run's, which runs no stages, and two with a core each."""
    before = descendants(os.getpid())
    head = {"num_cpus": 0, "include_dashboard": False}
    found = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        found.add_node(num_cpus=1)
    ray.init(found.address, log_to_driver=False, logging_level="ERROR")  # once, for all runs
    yield found
    ray.shutdown()
    found.shutdown()
    KEPT.close()  # workers of this machine's own runs, which wait for the next
    assert all_end([pid for pid in descendants(os.getpid()) if pid not in before], 20.0)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of this machine's own processes that nothing disturbed."""
    world = tmp_path_factory.mktemp("straight")
    start(world)
    return world


def go(world: Path, address: str, **changes: Any) -> tuple[RunOutcome, Seen]:
    """Run the small study on a cluster, as many stages at once as it has room for."""
    study = prepare_study(validate_recipe(RECIPE | {"compute": {}} | changes))
    view = Seen(study.graph)
    outcome = run_study(study, world / "run", view=view, functions=FUNCTIONS, ray=address)
    return outcome, view


@contextmanager
def meanwhile(action: Any, *arguments: Any) -> Iterator[None]:
    """Do something in a thread while the block runs; its error is the block's."""
    errors: list[BaseException] = []

    def act() -> None:
        try:
            action(*arguments)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=act)
    thread.start()
    yield
    thread.join()
    assert errors == []


def test_a_cluster_gives_what_one_machine_gives(
    straight: Path, tmp_path: Path, cluster: Cluster
) -> None:
    outcome, view = go(tmp_path, cluster.address)
    assert numbers(tmp_path) == numbers(straight)
    alone = load_outcome(straight / "run")
    assert [(row.title, row.spent, row.table.verdicts.tolist()) for row in outcome.rows] == [
        (row.title, row.spent, row.table.verdicts.tolist()) for row in alone.rows
    ]
    assert (outcome.training, outcome.evaluation) == (alone.training, alone.evaluation)
    assert sorted(ran(tmp_path)) == sorted(outcome.record.graph.nodes), "each stage once"
    assert view.kinds["started"] == set(outcome.record.graph.nodes)
    assert view.kinds["progressed"] != set()
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left.isdisjoint({"run.token", "ray"})
    before = ran(tmp_path)
    go(tmp_path, cluster.address)
    start(tmp_path)
    assert ran(tmp_path) == before, "a finished run runs nothing again, on a cluster or without"


def test_a_worker_that_is_killed_is_replaced_and_the_result_is_the_same(
    straight: Path, tmp_path: Path, cluster: Cluster
) -> None:
    (tmp_path / KILL).write_text("opd")
    outcome, view = go(tmp_path, cluster.address)
    assert numbers(tmp_path) == numbers(straight)
    assert outcome.physical["updates"] == outcome.training["updates"] + 1, "from its checkpoint"
    (said,) = view.said
    assert said.startswith("opd on prompts (")
    assert said.endswith("its process was lost; attempt 2 goes on from the last checkpoint")


def test_a_stage_that_is_lost_too_often_fails_by_name_and_the_run_continues(
    straight: Path, tmp_path: Path, cluster: Cluster
) -> None:
    (tmp_path / KILL).write_text("opd")
    with pytest.raises(StageError, match=r"opd on prompts \(.* lost .* most 0 losses: .*run again"):
        go(tmp_path, cluster.address, compute={"retries": 0})
    start(tmp_path)
    assert numbers(tmp_path) == numbers(straight)
    assert load_outcome(tmp_path / "run").physical["updates"] > 30


def test_a_node_that_leaves_is_replaced_by_another(
    straight: Path, tmp_path: Path, cluster: Cluster
) -> None:
    (tmp_path / STALL).write_text("grpo")

    def leave() -> None:
        """End the node that stalls."""
        wait_for(tmp_path / f"{STALL}.done")
        (node,) = (n for n in cluster.worker_nodes if _runs_a_stage(n, tmp_path))
        node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        cluster.worker_nodes.discard(node)

    with meanwhile(leave):
        outcome, view = go(tmp_path, cluster.address, **COLD)
    cluster.add_node(num_cpus=1)
    assert any("attempt 2 goes on from the last checkpoint" in said for said in view.said)
    assert outcome.physical["updates"] == outcome.training["updates"] + 1
    mine = {name: value for name, value in numbers(tmp_path).items() if "/" in name}
    assert mine.items() <= numbers(straight).items()
    assert len(mine) == len(outcome.record.graph.nodes)


def _runs_a_stage(node: Any, world: Path) -> bool:
    """Whether the process that the last stage began in is one of the node's."""
    pid = int((world / "ran.txt").read_text().splitlines()[-1].split()[-1])
    return pid in descendants(node.all_processes["raylet"][0].process.pid)


@pytest.mark.parametrize(
    ("order", "error", "message"),
    [
        (FAIL, InputError, "value=3 found; expected 4; set it to 4"),
        (CRASH, StageError, r"grpo on labels \(.*\) failed: KeyError: 'missing'"),
    ],
)
def test_errors_arrive_as_they_were_raised_and_are_not_tried_again(
    tmp_path: Path, cluster: Cluster, order: str, error: type[Exception], message: str
) -> None:
    (tmp_path / order).write_text("grpo")
    with pytest.raises(error, match=message) as caught:
        go(tmp_path, cluster.address, **COLD)
    assert type(caught.value) is error
    assert len(ran(tmp_path, "grpo")) == 1
    if order == CRASH:
        (log,) = (tmp_path / "run" / "logs").iterdir()
        assert "KeyError: 'missing'" in log.read_text()


def test_a_budget_stops_training_at_the_number_and_evaluates_the_rest(
    tmp_path: Path, cluster: Cluster
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for world in (here, there):
        world.mkdir()
    limits: dict[str, Any] = {"budget": {"verifier_calls": 9}, "compute": {"processes": 1}}
    alone = start(here, **limits)
    outcome, _ = go(there, cluster.address, **limits)
    assert outcome.stopped is not None and alone.stopped is not None
    assert outcome.stopped.exit_code == 3
    assert str(outcome.stopped) == str(alone.stopped)
    assert outcome.training == alone.training
    assert outcome.training["verifier_calls"] == 9
    assert numbers(there) == numbers(here)


def test_alerts_are_shown_and_end_a_strict_run(tmp_path: Path, cluster: Cluster) -> None:
    (tmp_path / "alert").write_text("grpo")
    study = prepare_study(validate_recipe(RECIPE | COLD | {"compute": {}}))
    view = Seen(study.graph)
    arguments = {"view": view, "functions": FUNCTIONS, "ray": cluster.address}
    with pytest.raises(StageError, match=r"KL is 1\.5.*run without --strict"):
        run_study(study, tmp_path / "run", strict=True, **arguments)
    assert [words[:23] for words in view.kinds["warned"]] == ["step 2 of 4: KL is 1.5."]


def test_a_node_without_the_run_folder_is_named_before_anything_runs(
    tmp_path: Path, cluster: Cluster
) -> None:
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs mounts of its own (unshare -m)")
    join = (
        f"mount -t tmpfs none {tmp_path} && exec {sys.executable} -m ray.scripts.scripts start "
        f"--address={cluster.address} --num-cpus=1 --block"
    )
    island = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", join],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while len(cluster.global_state._live_node_ids()) < 4:
            assert time.monotonic() < deadline, "the node never joined"
            time.sleep(0.2)
        with pytest.raises(InputError, match=r"node \w+ \(.*\) has no such folder; .*--out") as met:
            go(tmp_path, cluster.address)
        assert str(tmp_path / "run") in str(met.value)
        assert not (tmp_path / "ran.txt").exists()
    finally:
        processes = descendants(island.pid)
        os.killpg(island.pid, signal.SIGKILL)
        for pid in processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        island.wait()
    deadline = time.monotonic() + 60
    while len(cluster.global_state._live_node_ids()) > 3:
        assert time.monotonic() < deadline, "the node never left"
        time.sleep(0.2)


def test_a_stage_larger_than_any_node_is_refused(tmp_path: Path, cluster: Cluster) -> None:
    message = r"largest node of the cluster has 1 CPUs .* takes 2; .*compute\.threads"
    with pytest.raises(InputError, match=message):
        go(tmp_path, cluster.address, compute={"threads": 2})
    with pytest.raises(InputError, match=r"has 0 GPUs .* takes 1; .*compute\.device"):
        go(tmp_path, cluster.address, compute={"device": "cuda"})
    with pytest.raises(InputError, match=r"compute\.ranks=5 takes 1 CPUs for each .* room for 2"):
        go(tmp_path, cluster.address, compute={"ranks": 5})
    assert not (tmp_path / "ran.txt").exists()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://head:10001", "expected auto, local or HOST:PORT.*on one of its nodes"),
        ("127.0.0.1:1", "nobody listens there .*; expected the address that"),
    ],
)
def test_an_address_without_a_cluster_is_refused(
    tmp_path: Path, address: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        go(tmp_path, address)


def test_ranks_share_a_stage_and_one_that_is_killed_changes_nothing(
    straight: Path, tmp_path: Path, cluster: Cluster
) -> None:
    pytest.importorskip("ray.train", reason="needs ray[train], as the extra ray installs it")
    (tmp_path / KILL).write_text("grpo")
    models = {"student": {"source": "tiny:student"}}
    study = prepare_study(
        validate_recipe(RECIPE | COLD | {"models": models, "compute": {"ranks": 2}})
    )
    source, trained = (
        next(f for f, node in study.graph.nodes.items() if node.kind == kind)
        for kind in ("source", "grpo")
    )
    store = ArtifactStore(tmp_path / "run")
    setup = WorkerSetup(store.run_dir, FUNCTIONS.run_stage, stages=tuple(study.graph.nodes))
    view = Seen(study.graph)
    task_of = partial(make_task, study, store)
    compute = study.recipe.compute
    with RayExecutor(study.graph, setup, None, task_of, view, cluster.address, compute) as found:
        assert found.run([source, trained], ()) is None
    assert view.said == [
        f"{study.graph.describe(trained)}: its process was lost; attempt 2 goes on from the last "
        "checkpoint"
    ]
    with Ledger(store.run_dir / "ledger.sqlite") as ledger:
        assert (ledger.spending().updates, ledger.physical().updates) == (4, 5)
    value = "model/value.json"
    alone = tmp_path / "alone"
    alone.mkdir()
    start(alone, **COLD, models=models)
    there = ArtifactStore(alone / "run").path(trained) / value
    assert (store.path(trained) / value).read_bytes() == there.read_bytes()


def test_ctrl_c_saves_what_runs_and_any_run_continues(
    straight: Path, tmp_path: Path, cluster: Cluster
) -> None:
    (tmp_path / STALL).write_text("grpo")
    message = r"^stopped: \d+ of 18 stages .* to continue$"
    interrupting = meanwhile(_interrupt_once, tmp_path / f"{STALL}.done")
    with interrupting, pytest.raises(Interrupted, match=message):
        go(tmp_path, cluster.address)
    assert any((tmp_path / "run" / "checkpoints").glob("*/state.json")), "saved, not finished"
    start(tmp_path)
    assert numbers(tmp_path) == numbers(straight)
    physical, training = _updates(tmp_path)
    assert physical == training, "nothing was done twice"


def test_a_second_ctrl_c_does_not_wait(straight: Path, tmp_path: Path, cluster: Cluster) -> None:
    (tmp_path / DEAF).write_text("grpo")

    def twice() -> None:
        _interrupt_once(tmp_path / f"{DEAF}.done")
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGINT)

    message = r"stopped at once: .* from the last checkpoints"
    with meanwhile(twice), pytest.raises(Interrupted, match=message):
        go(tmp_path, cluster.address)
    start(tmp_path)
    assert numbers(tmp_path) == numbers(straight)


def _interrupt_once(sign: Path) -> None:
    wait_for(sign)
    os.kill(os.getpid(), signal.SIGINT)


def _updates(world: Path) -> tuple[float, float]:
    outcome = load_outcome(world / "run")
    return outcome.physical["updates"], outcome.training["updates"]


# --- the command ----------------------------------------------------------------------------


def test_ctrl_c_ends_a_cluster_of_its_own_with_everything_saved(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with subprocess.Popen(
        [*HEADWATER, study_file(tmp_path, steps=300), "--out", out, "--ray", "local"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as run:
        try:
            deadline = time.monotonic() + 120
            while not _has_trained(out):
                assert time.monotonic() < deadline and run.poll() is None
                time.sleep(0.1)
            processes = descendants(run.pid)
            os.killpg(run.pid, signal.SIGINT)
            _, said = run.communicate(timeout=60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 130, said
    assert said.splitlines()[-1].endswith("run the same command again to continue")
    assert processes and all_end(processes, 20.0)
    (saved,) = (out / "checkpoints").glob("*/steps")
    assert "." not in saved.parent.name, "where any run looks"
    with Ledger(out / "ledger.sqlite") as ledger:
        assert ledger.spending().updates == ledger.physical().updates > 3


def test_a_real_recipe_has_the_same_tables_on_a_cluster(tmp_path: Path, cluster: Cluster) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    recipe = study_file(tmp_path, steps=2)
    api.run(recipe, here, quiet=True, arms=["half"])
    command = [*HEADWATER, recipe, "--out", there, "--ray", cluster.address, "--json"]
    command += ["--arms", "half"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert made(there) == made(here)
    assert {Path(name).suffix for name in made(here)} == {".csv", ".safetensors", ".parquet"}


def _has_trained(out: Path) -> bool:
    """Whether a stage of GRPO has made some steps."""
    logs = out.glob("checkpoints/*.1/metrics.jsonl")
    return any("pass_rate" in log.read_text() for log in logs)
