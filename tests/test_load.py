"""Large inputs: what is done and held for a row, a rollout or a stage does not grow with them.

Operations and peak memory are counted where that is possible: seconds depend on who else is on
the machine. The full sizes are measured by benchmarks/load.py.
"""

from __future__ import annotations

import gc
import hashlib
import json
import pickle
import socket
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headwater.config.loading import load_recipe, validate_recipe
from headwater.errors import BudgetExhausted, InputError
from headwater.ledger import Ledger
from headwater.recipes import find_recipe
from headwater.report.samples import collect_samples, read_rollouts
from headwater.stages.kept_rollouts import _join_parts, _write_rows
from headwater.tasks.contamination import remove_contaminated
from headwater.tasks.pools import Pools, make_pools
from headwater.tasks.problems import LabelledProblems, load_problems
from headwater.types import Problem
from headwater.workflow import executor as executor_module
from headwater.workflow.data_identity import DataIdentity, GraphData, identify
from headwater.workflow.executor import Executor
from headwater.workflow.graph import Graph, StageNode
from headwater.workflow.held_worker import HeldWorker
from headwater.workflow.kept_workers import KeptWorkers
from headwater.workflow.launch import Launch
from headwater.workflow.messages import Done, ProblemSet, StageTask, WorkerSetup
from headwater.workflow.planner import build_graph
from headwater.workflow.prepare import prepare_study
from headwater.workflow.progress import ProgressView
from headwater.workflow.run import make_task
from headwater.workflow.store import ArtifactStore

# --- names and orders are what they were ---------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "stages", "expected"),
    [
        ("quickstart", 34, "05b017d0782eb330"),
        ("map-embedded", 360, "275cc7ece1821978"),
        ("paper-grid-embedded", 955, "c34dfd70a29585de"),
    ],
)
def test_shipped_recipes_have_their_fingerprints(recipe: str, stages: int, expected: str) -> None:
    """Finished stages of earlier versions are recognised by these names."""
    nodes = list(prepare_study(load_recipe(find_recipe(recipe)), planning=True).graph.nodes)
    assert len(nodes) == stages
    assert hashlib.sha256(json.dumps(nodes).encode()).hexdigest()[:16] == expected


def mixed_rows() -> list[dict[str, Any]]:
    """Rows whose normalised texts meet, with every optional column somewhere."""
    rows: list[dict[str, Any]] = []
    for n in range(120):
        spelled = rf"What is $\dfrac{{{n % 50}}}{{7}}$ of 1,000?" if n % 2 else None
        text = f"Ann has {n % 40} apples and gives {n % 3} of them to Bob, and then she rests"
        rows.append({"problem": spelled or text, "answer": n / 2, "level": f"Level {n % 5}"})
        rows[-1] |= {"subject": "Algebra"} if n % 3 else {"id": f"row {n}", "solution": f"so {n}"}
    return rows


def test_a_file_of_problems_has_its_hashes_and_its_order(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in mixed_rows()))
    held = tmp_path / "held.jsonl"
    asked = [rows["problem"].upper() for rows in mixed_rows()[:8]]
    asked.append("ann has 3 apples and gives 0 of them to Bob, and then")
    held.write_text("".join(json.dumps({"problem": p, "answer": 1}) + "\n" for p in asked))
    data = load_problems(str(path))
    kept, found = remove_contaminated(data, {"held": load_problems(str(held))})
    pools = make_pools(kept, labels=20, split=("1H", "2H"), prompts=15, validation=5, seed=3)
    order = [[name, [p.id for p in pools[name]]] for name in pools.names]
    pairs = sorted((m.kind, m.train_id, m.eval_id, round(m.share, 6)) for m in found.removed)
    near = sorted((m.kind, m.train_id, m.eval_id, round(m.share, 6)) for m in found.near)
    labels = identify(pools["labels"], pools.labels("labels"))
    parts = {
        "data": data.data_hash,
        "kept": kept.data_hash,
        "pairs": digest([pairs, near]),
        "order": digest(order),
        "identity": digest([labels.problems, labels.labels, labels.size]),
        "first": digest([p.id for p in pools["labels:7"]]),
    }
    assert {name: value[:12] for name, value in parts.items()} == EXPECTED
    assert pairs and near  # both were compared


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


EXPECTED = {
    "data": "bf265e421409",
    "kept": "ed8ea21a70a2",
    "pairs": "a7b587f5f211",
    "order": "d0e427f616a7",
    "identity": "40975621b9e0",
    "first": "fe4b47873c23",
}


# --- rows ----------------------------------------------------------------------------------------


def write_problems(path: Path, count: int) -> str:
    with path.open("w") as file:
        for n in range(count):
            text = f"A train leaves station {n} at noon with {n % 97} people; {n % 89} get off at"
            file.write(json.dumps({"problem": f"{text} the next stop. How many?", "answer": n}))
            file.write("\n")
    return str(path)


def divide(source: str, held_out: str) -> tuple[LabelledProblems, Pools]:
    """What preparing a study does with rows."""
    data = load_problems(source)
    kept, _ = remove_contaminated(data, {"held": load_problems(held_out)})
    half = len(kept) // 2
    pools = make_pools(kept, labels=100, split=("1H", "2H"), prompts=half)
    for name in pools.names:
        identify(pools[name], () if name == "prompts" else pools.labels(name))
    return data, pools


def peak_bytes(work: Callable[[], object]) -> int:
    """Most memory that Python's objects took during `work`, of what it allocated itself."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        work()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def test_a_row_takes_as_much_memory_in_a_larger_file(tmp_path: Path) -> None:
    held_out = write_problems(tmp_path / "held.jsonl", 20)
    peaks = {}
    for count in (1_000, 4_000):
        source = write_problems(tmp_path / f"{count}.jsonl", count)
        # the lesser of two: the first may fill caches, and other tests' threads allocate too
        peak = min(peak_bytes(lambda source=source: divide(source, held_out)) for _ in range(2))
        peaks[count] = peak / count
    assert peaks[4_000] < 1.3 * peaks[1_000]
    assert peaks[4_000] < 1_800  # bytes a row, of which the normalised text is about 500


def test_four_times_the_rows_take_about_four_times_as_long(tmp_path: Path) -> None:
    """The least of five goes each: what else is on the machine only ever adds to one."""
    held_out = write_problems(tmp_path / "held.jsonl", 20)
    seconds = {}
    for count in (4_000, 16_000):
        source = write_problems(tmp_path / f"{count}.jsonl", count)
        seconds[count] = min(_seconds_to_divide(source, held_out) for _ in range(5))
    assert seconds[16_000] < 9.0 * seconds[4_000]  # a quadratic step: 16 times


def _seconds_to_divide(source: str, held_out: str) -> float:
    """Of this process, without the collector: its share grows with all that pytest holds."""
    gc.collect()
    gc.disable()
    try:
        began = time.process_time()
        divide(source, held_out)
        return time.process_time() - began
    finally:
        gc.enable()


def test_a_repeated_id_is_found_without_comparing_every_two() -> None:
    problems = [Problem(f"problem {n}", "How many?", "made") for n in range(20_000)]
    began = time.process_time()
    with pytest.raises(InputError, match="'problem 19999' occurs twice"):
        LabelledProblems.of([*problems, problems[-1]], ())
    assert time.process_time() - began < 1.0


# --- stages --------------------------------------------------------------------------------------


class CountedNodes(dict[str, StageNode]):
    """The nodes of a graph, and how often one of them was looked at."""

    looks = 0

    def __getitem__(self, fingerprint: str) -> StageNode:
        self.looks += 1
        return super().__getitem__(fingerprint)

    def __iter__(self) -> Iterator[str]:
        for fingerprint in super().__iter__():
            self.looks += 1
            yield fingerprint


def graph_of(stages: int) -> tuple[Graph, CountedNodes]:
    """A graph of about so many stages: arms of a training stage and its evaluation, ten seeds."""
    arms = {
        f"arm_{n}": {"student": [{"grpo": {"lr": 1e-6 * (n + 1)}}]} for n in range(stages // 20)
    }
    recipe = validate_recipe(
        {
            "name": "large",
            "task": {"train": "task:arithmetic", "eval": {"one": "a.jsonl"}},
            "models": {"student": {"source": "tiny:student"}},
            "pools": {"labels": 40},
            "arms": arms,
            "seeds": list(range(10)),
        }
    )
    identity = DataIdentity("problems", "labels", 40)
    graph = build_graph(recipe, GraphData({"labels": identity}, {"one": identity}))
    nodes = CountedNodes(graph.nodes)
    return Graph(nodes, graph.arms, graph.bases), nodes


def test_closures_look_at_their_own_stages_only() -> None:
    looks = {}
    for size in (500, 2_000):
        graph, nodes = graph_of(size)
        assert len(nodes) >= size
        nodes.looks = 0
        assert all(graph.users.values())
        for plan in graph.arms:
            first, *_, last = graph.arm_stages(plan)
            assert graph.nodes[first].kind == "source" and last == plan.endpoint
        looks[size] = nodes.looks / len(nodes)
    assert looks[2_000] < 1.2 * looks[500]


class Echo(HeldWorker):
    """A worker that has finished whatever it is given by the time it is listened to."""

    sent: list[object]

    def __init__(self, setup: WorkerSetup, launch: Launch) -> None:
        self.stage = None
        self.setup = setup
        self.sent = []
        self._problem_sets = set()
        ours, theirs = socket.socketpair()
        self.connection, self._theirs = Connection(ours.detach()), Connection(theirs.detach())

    @property
    def gone(self) -> bool:
        return False

    def tell(self, message: Any) -> None:
        self.sent.append(message)
        if isinstance(message, StageTask):
            self._theirs.send(Done(seconds=0.0))

    def rest(self) -> bool:
        return False

    def quit(self) -> None:
        self._theirs.close()

    def end(self, within_seconds: float) -> None:
        self.connection.close()


def test_scheduling_a_stage_takes_as_long_among_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor_module, "HeldWorker", Echo)
    monkeypatch.setattr(executor_module, "KEPT", KeptWorkers())
    looks = {}
    for size in (500, 2_000):
        graph, nodes = graph_of(size)
        given: list[str] = []

        def task_of(fingerprint: str, given: list[str] = given) -> StageTask:
            given.append(fingerprint)
            return StageTask(None, fingerprint, {})  # type: ignore[arg-type]

        with Executor(
            graph, WorkerSetup(tmp_path, ""), 3, task_of, ProgressView(graph)
        ) as executor:
            nodes.looks = 0
            assert executor.run(graph.nodes, ()) is None
        place = {fingerprint: index for index, fingerprint in enumerate(given)}
        assert place.keys() == set(graph.nodes) and len(given) == len(nodes)
        assert all(place[p] < place[f] for f in graph.nodes for p in graph.nodes[f].parents)
        looks[size] = nodes.looks / len(nodes)
    assert looks[2_000] < 1.2 * looks[500]


def test_problems_go_to_a_worker_once_and_labels_with_each_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor_module, "HeldWorker", Echo)
    monkeypatch.setattr(executor_module, "KEPT", KeptWorkers())
    source = write_problems(tmp_path / "train.jsonl", 3_000)
    held_out = write_problems(tmp_path / "held.jsonl", 4)
    arms = {f"arm_{n}": {"student": [{"grpo": {"lr": 1e-6 * (n + 1)}}]} for n in range(6)}
    recipe = validate_recipe(
        {
            "name": "sent",
            "task": {"train": source, "eval": {"one": held_out}, "verifier": "exact"},
            "models": {"student": {"source": "tiny:student"}},
            "pools": {"labels": 2_000},
            "arms": arms,
        }
    )
    study = prepare_study(recipe)
    store = ArtifactStore(tmp_path)
    view = ProgressView(study.graph)
    with Executor(
        study.graph, WorkerSetup(tmp_path, ""), 1, lambda f: make_task(study, store, f), view
    ) as executor:
        executor.run(study.graph.nodes, ())
        (worker,) = executor._workers
        assert isinstance(worker, Echo)
        sets = [one for one in worker.sent if isinstance(one, ProblemSet)]
        tasks = [one for one in worker.sent if isinstance(one, StageTask)]
    assert sorted((one.name, len(one.problems)) for one in sets) == [
        ("eval:one", 4),
        ("labels", 2_000),
    ]
    assert len(tasks) == len(study.graph.nodes) > 12
    assert all(task.job.problems == () for task in tasks)
    assert [len(t.labels or ()) for t in tasks if t.job.kind == "grpo"] == [2_000] * 6
    largest = max(len(pickle.dumps(replace(task, labels=None))) for task in tasks)
    assert largest < 10_000 < len(pickle.dumps(sets[-1 if sets[-1].name == "labels" else 0]))


def test_an_account_is_found_without_reading_the_others(tmp_path: Path) -> None:
    steps = {}
    with Ledger(tmp_path / "ledger.sqlite", {"updates": 10_000}) as ledger:
        for size in (50, 200):
            for number in range(size):
                ledger.account(f"stage {number}")
            count = [0]

            def step(count: list[int] = count) -> int:
                count[0] += 1
                return 0

            ledger._connection().set_progress_handler(step, 1)
            assert ledger.spending(["stage 7"]).updates == 0
            ledger._connection().set_progress_handler(None, 1)
            steps[size] = count[0]
    assert steps[200] == steps[50]


def test_a_budget_counts_accounts_that_other_workers_opened(tmp_path: Path) -> None:
    with (
        Ledger(tmp_path / "ledger.sqlite", {"updates": 5}) as ours,
        Ledger(tmp_path / "ledger.sqlite", {"updates": 5}) as theirs,
    ):
        account = ours.account("one")
        account.charge(updates=1)
        assert account.remaining("updates") == 4
        theirs.account("two").charge(updates=3)
        assert account.remaining("updates") == 1
        with pytest.raises(BudgetExhausted, match=r"budget of 5"):
            account.charge(updates=2)


# --- rollouts ------------------------------------------------------------------------------------


def rollout(number: int) -> dict[str, Any]:
    return {
        "stage": "abc",
        "step": number // 1_000,
        "problem_id": f"p{number % 50}",
        "sample": number % 8,
        "prompt": f"What is {number}?",
        "response": f"It is {number}. " * 40,
        "verdict": "correct" if number % 3 else "incorrect",
        "reward": 1.0 if number % 3 else 0.0,
        "response_tokens": 80,
        "finish_reason": "stop",
        "advantage": 0.5 if number % 3 else -0.5,
    }


def test_publishing_joins_parts_a_batch_at_a_time(tmp_path: Path) -> None:
    """Rows and order are those of all parts, then of what is in memory."""
    rows = [rollout(number) for number in range(12_500)]
    for start in range(0, 12_000, 2_000):
        _write_rows(rows[start : start + 2_000], tmp_path / f"part-{start:09d}.parquet")
    parts = sorted(tmp_path.glob("part-*.parquet"))
    whole = tmp_path / "rollouts.parquet"
    peak = peak_bytes(lambda: _join_parts(parts, rows[12_000:], whole))
    assert pq.read_table(whole).to_pylist() == rows
    assert peak < 3 * 2**20  # all rows as Python's objects take 10 MiB


def test_parts_from_before_a_column_was_kept_are_joined_as_well(tmp_path: Path) -> None:
    rows = [rollout(number) for number in range(2)]
    _write_rows(rows[:1], tmp_path / "part.parquet")
    older = pq.read_table(tmp_path / "part.parquet").drop_columns("advantage")
    pq.write_table(older, tmp_path / "part.parquet")
    _join_parts([tmp_path / "part.parquet"], rows[1:], tmp_path / "whole.parquet")
    found = pq.read_table(tmp_path / "whole.parquet").column("advantage").to_pylist()
    assert found == [None, 0.5]


def test_samples_hold_the_answers_of_one_artifact_at_a_time(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{**rollout(n), "step": 0} for n in range(2_000)])
    peaks = {}
    for artifacts in (1, 5):
        run_dir = tmp_path / str(artifacts)
        for number in range(artifacts):
            folder = run_dir / "artifacts" / f"stage{number}"
            folder.mkdir(parents=True)
            pq.write_table(table, folder / "rollouts.parquet")
        found: list[Any] = []
        peaks[artifacts] = peak_bytes(lambda: found.extend(collect_samples(run_dir)))  # noqa: B023
        assert [len(rollouts) for _, rollouts in found] == [4] * artifacts
    assert peaks[5] < 2.0 * peaks[1]


def test_samples_of_the_last_step_are_read_without_the_others(tmp_path: Path) -> None:
    """What is held is a step's rollouts, however many steps the stage had."""
    folder = tmp_path / "artifacts" / "stage"
    folder.mkdir(parents=True)
    rows = [rollout(number) for number in range(8_000)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rollouts.parquet")
    found: list[Any] = []
    peak = peak_bytes(lambda: found.extend(read_rollouts(tmp_path, "stage")))
    assert {one.step for one in found} == {7} and len(found) == 1_000
    assert [one.response for one in found] == [row["response"] for row in rows[7_000:]]
    assert peak < 3 * 2**20  # all of them take 8 MiB
