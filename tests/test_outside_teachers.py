"""Teacher rollouts from a server or from a disk: the same files, checked, without the teacher."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from headwater.config.distillation import CacheableTargets, FullVocabulary, TopK
from headwater.config.loading import validate_recipe
from headwater.config.stages import (
    OutsideRolloutsStage,
    SampleSFTStage,
    Sampling,
    TeacherRolloutsStage,
    WarmupStage,
)
from headwater.config.teachers import CachedTeacher, OpenAITeacher
from headwater.errors import HeadwaterError, InputError, StageError
from headwater.workflow.prepare import prepare_study
from headwater.workflow.routes import route_of
from headwater.workflow.stage_work import work_of
from headwater.workflow.store import seal_artifact
from openai_server import OpenAIServer, says
from stage_jobs import SAMPLING, Run, make_job, make_model, problems
from test_estimate import recipe

KEY = "a-key-that-nobody-may-see"


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("tiny:student", tmp_path_factory.mktemp("student"), steps=5)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, student: Path) -> dict[str, Path]:
    """Artifacts of teacher rollouts, sealed as a run leaves them: two a prompt, by targets."""
    teacher = make_model("tiny:small", tmp_path_factory.mktemp("teacher"), steps=10)
    found = {}
    for targets in (FullVocabulary(), TopK(k=8)):
        config = TeacherRolloutsStage(sampling=SAMPLING, targets=targets, rollouts_per_prompt=2)
        job = make_job(
            "teacher_rollouts", config, tmp_path_factory.mktemp(targets.kind), teacher_dir=teacher
        )
        folder = Run(job).start().job.output_dir
        facts = {"kind": "teacher_rollouts", "parents": [], "config": config.model_dump()}
        seal_artifact(folder, "0123", facts)
        found[targets.kind] = folder
    return found


def _run(
    folder: Path,
    student: Path,
    teacher: OpenAITeacher | CachedTeacher,
    targets: CacheableTargets | None = None,
    **changes: Any,
) -> Run:
    config = OutsideRolloutsStage(
        **{
            "teacher": teacher,
            "targets": targets,
            "sampling": SAMPLING,
            "rollouts_per_prompt": 2,
            "prompts_per_batch": 4,
        }
        | changes
    )
    return Run(make_job("outside_rollouts", config, folder, model_dir=student))


def _warmup(folder: Path, student: Path, rollouts: Path, targets: CacheableTargets) -> Run:
    config = WarmupStage(steps=2, batch_size=6, lr=1e-3, targets=targets)
    job = make_job("warmup", config, folder, model_dir=student, rollouts_dir=rollouts)
    return Run(job).start()


def _targets(folder: Path) -> dict[str, torch.Tensor]:
    parts = [load_file(path) for path in sorted(folder.glob("targets-*.safetensors"))]
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0] if name != "offsets"}


# --- servers ------------------------------------------------------------------------------------


def test_a_chat_is_asked_once_and_learned_from(
    tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_API_KEY", KEY)
    with OpenAIServer(says("3+4=7"), key=KEY) as server:
        server.refusals, server.seconds = [429, 503], 0.02
        teacher = OpenAITeacher(
            model="m", base_url=server.url, key_variable="TEACHER_API_KEY", requests_in_flight=2
        )
        run = _run(tmp_path, student, teacher).start()
    rows = run.rollouts()
    tokenizer = AutoTokenizer.from_pretrained(student)
    ids = [*tokenizer("3+4=7", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert [row["response_ids"] for row in rows] == [ids] * 20
    assert [row["problem_id"] for row in rows[::2]] == [p.id for p in problems().problems]
    assert len(server.asked) == 10 and server.most == 2
    first = server.asked[0]
    assert first["path"] == "/v1/chat/completions" and first["model"] == "m"
    assert (first["n"], first["temperature"], first["max_tokens"]) == (2, 1.0, 10)
    assert "logprobs" not in first and len({body["seed"] for body in server.asked}) == 10
    spent = run.spent()
    assert (spent["prompts"], spent["generated_tokens"], spent["labels"]) == (10, 60, 0)
    assert all(KEY.encode() not in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    config = SampleSFTStage(steps=8, batch_size=10, lr=3e-3)
    rollouts = run.job.output_dir
    job = make_job("sample_sft", config, tmp_path / "s", model_dir=student, rollouts_dir=rollouts)
    losses = [row["loss"] for row in Run(job).start().metrics()]
    assert losses[-1] < 0.8 * losses[0]


def test_a_response_that_is_cut_learns_no_end(tmp_path: Path, student: Path) -> None:
    with OpenAIServer(says("3+4=7", "length")) as server:
        run = _run(tmp_path, student, OpenAITeacher(model="m", base_url=server.url)).start()
    row = run.rollouts()[0]
    tokenizer = AutoTokenizer.from_pretrained(student)
    assert row["response_ids"] == tokenizer("3+4=7", add_special_tokens=False).input_ids
    assert row["finish_reason"] == "length"


def test_a_stopped_stage_asks_for_no_answer_twice(tmp_path: Path, student: Path) -> None:
    with OpenAIServer(says("3+4=7")) as server:
        teacher = OpenAITeacher(model="m", base_url=server.url)
        straight = _run(tmp_path / "straight", student, teacher).start()
        asked = len(server.asked)
        run = _run(tmp_path / "stopped", student, teacher).interrupted_at(1)
        assert len(server.asked) == asked + 4
        run.start()
        assert len(server.asked) == asked + 10
    assert run.rollouts() == straight.rollouts()
    assert run.spent() == straight.spent()


def _replays(folder: Path, tokenizer: Any, changes: Mapping[str, Any] = {}) -> Any:
    """Answers of a completions server whose model is the one that wrote the artifact."""
    rows = pq.read_table(folder / "rollouts.parquet").to_pylist()
    tensors, start = _targets(folder), 0
    found: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for row in rows:
        part = slice(start, start := start + row["response_tokens"])
        places = zip(tensors["ids_TK"][part], tensors["logprobs_TK"][part], strict=True)
        logprobs = {
            "tokens": [f"token_id:{token}" for token in row["response_ids"]],
            "top_logprobs": [
                {f"token_id:{int(i)}": float(v) for i, v in zip(*place, strict=True)}
                for place in places
            ],
        }
        choice = {
            "text": row["response"],
            "finish_reason": row["finish_reason"],
            "logprobs": logprobs,
        }
        found.setdefault(tuple(row["prompt_ids"]), []).append({**choice, **changes})
    return lambda body: {"choices": found[tuple(body["prompt"])]}


def test_a_servers_top_k_is_the_teachers_own(
    tmp_path: Path, student: Path, published: dict[str, Path]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(student)
    with OpenAIServer(_replays(published["top_k"], tokenizer)) as server:
        teacher = OpenAITeacher(model="m", base_url=server.url, api="completions")
        run = _run(tmp_path, student, teacher, TopK(k=8)).start()
    assert {body["path"] for body in server.asked} == {"/v1/completions"}
    assert {body["logprobs"] for body in server.asked} == {8}
    ours, theirs = _targets(run.job.output_dir), _targets(published["top_k"])
    assert torch.equal(ours["ids_TK"], theirs["ids_TK"])
    assert torch.equal(ours["logprobs_TK"], theirs["logprobs_TK"])
    assert run.spent()["teacher_scored_tokens"] == len(ours["ids_TK"])
    one = _warmup(tmp_path / "one", student, run.job.output_dir, TopK(k=8))
    other = _warmup(tmp_path / "other", student, published["top_k"], TopK(k=8))
    one.assert_equals(other)


@pytest.mark.parametrize(
    ("changes", "k", "message"),
    [
        ({"text": "something else"}, 8, "expected one tokenizer"),
        ({"logprobs": {"tokens": ["token_id:999"], "top_logprobs": [{}]}}, 8, "'token_id:999'"),
        ({"logprobs": None}, 8, "cannot be read"),
        ({}, 9, "gives 8 tokens at a place"),
    ],
)
def test_other_tokens_are_refused(
    changes: Mapping[str, Any],
    k: int,
    message: str,
    tmp_path: Path,
    student: Path,
    published: dict[str, Path],
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(student)
    with OpenAIServer(_replays(published["top_k"], tokenizer, changes)) as server:
        teacher = OpenAITeacher(model="m", base_url=server.url, api="completions")
        with pytest.raises(StageError, match=message):
            _run(tmp_path, student, teacher, TopK(k=k)).start()


def test_a_chats_tokens_are_read_by_their_text(tmp_path: Path, student: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(student)
    end = tokenizer.eos_token

    def answer(body: Mapping[str, Any]) -> Mapping[str, Any]:
        tops = [{"token": "7", "logprob": -0.25}, {"token": end, "logprob": -2.0}]
        content = [{"token": token, "top_logprobs": tops} for token in ("7", end)]
        choice = {"message": {"content": "7"}, "finish_reason": "stop"}
        return {"choices": [choice | {"logprobs": {"content": content}}] * body["n"]}

    with OpenAIServer(answer) as server:
        teacher = OpenAITeacher(model="m", base_url=server.url)
        run = _run(tmp_path, student, teacher, TopK(k=2)).start()
    seven, stop = tokenizer.convert_tokens_to_ids("7"), tokenizer.eos_token_id
    assert run.rollouts()[0]["response_ids"] == [seven, stop]
    tensors = _targets(run.job.output_dir)
    assert tensors["ids_TK"].tolist() == [[seven, stop]] * 40
    assert tensors["logprobs_TK"][0].tolist() == [-0.25, -2.0]


@pytest.mark.parametrize(
    ("settings", "answer", "message"),
    [
        ({"model": "n"}, says("7"), "has no model 'n'; it has m; name one of them"),
        ({"key_variable": "WRONG_API_KEY"}, says("7"), "environment variable WRONG_API_KEY"),
        ({}, lambda body: {"choices": []}, "gives 0 choices"),
        ({}, lambda body: {"choices": [{}, {}]}, "cannot be read"),
    ],
)
def test_what_a_server_may_not_do(
    settings: dict[str, Any],
    answer: Any,
    message: str,
    tmp_path: Path,
    student: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("WRONG_API_KEY", "another")
    with OpenAIServer(answer, key=KEY) as server:
        teacher = OpenAITeacher(**{"model": "m", "base_url": server.url} | settings)
        with pytest.raises(StageError) as refused:
            _run(tmp_path, student, teacher).start()
    assert message in str(refused.value) and KEY not in str(refused.value)


# --- caches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [FullVocabulary(), TopK(k=8)])
def test_a_cache_teaches_what_its_teacher_did(
    targets: CacheableTargets, tmp_path: Path, student: Path, published: dict[str, Path]
) -> None:
    path = published[targets.kind]
    run = _run(tmp_path, student, CachedTeacher(path=str(path)), targets).start()
    assert set(run.spent().values()) == {0}
    one = _warmup(tmp_path / "one", student, run.job.output_dir, targets)
    other = _warmup(tmp_path / "other", student, path, targets)
    one.assert_equals(other)


def test_a_cache_gives_fewer_rollouts_and_tokens_than_it_has(
    tmp_path: Path, student: Path, published: dict[str, Path]
) -> None:
    cache = CachedTeacher(path=str(published["top_k"]))
    run = _run(tmp_path, student, cache, TopK(k=3), rollouts_per_prompt=1).start()
    rows, whole = run.rollouts(), pq.read_table(published["top_k"] / "rollouts.parquet").to_pylist()
    assert [row["response_ids"] for row in rows] == [row["response_ids"] for row in whole[::2]]
    lengths = torch.tensor([row["response_tokens"] for row in whole])
    kept = torch.arange(len(whole)).repeat_interleave(lengths) % 2 == 0
    for name, part in _targets(run.job.output_dir).items():
        assert torch.equal(part, _targets(published["top_k"])[name][kept, :3])


def _refusal(folder: Path, student: Path, path: Path, *args: Any, **changes: Any) -> str:
    with pytest.raises(InputError) as refused:
        _run(folder, student, CachedTeacher(path=str(path)), *args, **changes).start()
    return str(refused.value)


def test_a_cache_that_does_not_fit_is_refused(
    tmp_path: Path, student: Path, published: dict[str, Path]
) -> None:
    good = published["top_k"]
    assert "of each of the pool's 10" in _refusal(tmp_path, student, good, rollouts_per_prompt=3)
    assert "set targets: {k: 8, kind: top_k}" in _refusal(tmp_path, student, good, TopK(k=9))
    assert "has targets" in _refusal(tmp_path, student, good, FullVocabulary())
    warm = Sampling(temperature=0.7, max_new_tokens=10)
    assert "drawn with sampling" in _refusal(tmp_path, student, good, sampling=warm)
    bad = tmp_path / "bad"
    shutil.copytree(good, bad)
    rows = pq.read_table(bad / "rollouts.parquet")
    pq.write_table(rows.slice(0, 4), bad / "rollouts.parquet")
    assert "differs from its recorded hash" in _refusal(tmp_path, student, bad)
    manifest = json.loads((bad / "manifest.json").read_text())
    (bad / "manifest.json").write_text(json.dumps(manifest | {"kind": "warmup"}))
    assert "cannot be believed" in _refusal(tmp_path, student, bad)


def _file(path: Path, **columns: Any) -> Path:
    asked = [p.prompt for p in problems().problems for _ in range(2)]
    plain = {"prompt": asked, "response": ["3+4=7"] * len(asked)}
    pq.write_table(pa.table({k: v for k, v in (plain | columns).items() if v is not None}), path)
    return path


def test_samples_of_ones_own(tmp_path: Path, student: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(student)
    ids = [*tokenizer("3+4=7", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    text_only = _file(tmp_path / "text.parquet")
    run = _run(tmp_path / "a", student, CachedTeacher(path=str(text_only))).start()
    assert {tuple(row["response_ids"]) for row in run.rollouts()} == {tuple(ids)}
    places = [[5, token] for token in ids]
    logprobs = [[-3.0, -0.5] for _ in ids]
    listed = {
        "response_ids": [ids] * 20,
        "top_k_ids": [places] * 20,
        "top_k_logprobs": [logprobs] * 20,
    }
    soft = _file(tmp_path / "soft.parquet", **listed)
    run = _run(tmp_path / "b", student, CachedTeacher(path=str(soft)), TopK(k=2)).start()
    found = _targets(run.job.output_dir)
    assert found["ids_TK"].tolist() == [[token, 5] for token in ids] * 20
    assert found["logprobs_TK"].tolist() == [[-0.5, -3.0] for _ in ids] * 20
    for changes, message in (
        ({"response": None}, "lacks the columns ['response']"),
        ({"response_ids": [[3, 4]] * 20}, "do not spell its response"),
        ({"top_k_ids": [places[:-1]] * 20}, "expected one for each of its"),
        ({"top_k_logprobs": [[[-0.1, -0.1]] * len(ids)] * 20}, "with a mass of 1.8097"),
        ({"top_k_ids": [[[3, 999]] * len(ids)] * 20}, "different ids of the student's"),
    ):
        file = _file(tmp_path / "bad.parquet", **(listed | changes))
        assert message in _refusal(tmp_path / "c", student, file, TopK(k=2))
    assert "targets: full of a file" in _refusal(tmp_path, student, soft, FullVocabulary())


# --- recipes ------------------------------------------------------------------------------------

SERVED = {"source": "openai:big", "base_url": "http://localhost:1/v1"}


def _study(settings: Mapping[str, Any], kind: str = "sample_sft") -> Any:
    arms = {"outside": {"student": [{kind: {"rollouts": settings}}]}}
    return prepare_study(validate_recipe(recipe(arms=arms)))


def _rollouts_node(study: Any) -> Any:
    (node,) = (n for n in study.graph.nodes.values() if n.kind == "outside_rollouts")
    return node


def test_an_arm_learns_from_outside_without_a_teacher_of_its_own() -> None:
    study = _study(SERVED)
    node, (plan,) = _rollouts_node(study), study.graph.arms
    assert (node.pool, node.teacher) == ("prompts", None)
    assert study.graph.nodes[node.model].kind == "source"
    assert plan.teacher is None and plan.probes == {}
    route = route_of(study.graph, plan)
    assert (route.teacher_base, route.teacher) == ("openai:big", ())
    assert [n.kind for n in route.transfers] == ["sample_sft"]
    assert work_of(study, node).rollouts == 100
    assert "rollouts" not in study.graph.nodes[plan.student].config


def test_what_names_the_rollouts_of_a_server() -> None:
    first = _rollouts_node(_study(SERVED)).fingerprint
    how = {"requests_in_flight": 2, "request_seconds": 5.0, "key_variable": "MY_API_KEY"}
    assert _rollouts_node(_study(SERVED | how)).fingerprint == first
    for other in ({"source": "openai:small"}, {"api": "completions"}):
        assert _rollouts_node(_study(SERVED | other)).fingerprint != first


def test_what_names_the_rollouts_of_a_file_is_its_content(tmp_path: Path) -> None:
    file = tmp_path / "mine.parquet"
    found = []
    for text in ("a", "b", "a"):
        pq.write_table(pa.table({"prompt": ["1"], "response": [text]}), file)
        found.append(_rollouts_node(_study({"kind": "cache", "path": str(file)})).fingerprint)
    assert found[0] == found[2] != found[1]


def test_who_teaches_from_outside_is_a_difference_of_teachers() -> None:
    arms = {
        name: {"student": [{"sample_sft": {"rollouts": SERVED | changes}}]}
        for name, changes in (
            ("big", {}),
            ("slow", {"requests_in_flight": 1}),
            ("other", {"base_url": "http://localhost:2/v1"}),
        )
    }
    alike = {"better": "big", "than": "slow", "differs_in": []}
    prepare_study(validate_recipe(recipe(arms=arms, contrasts=[alike])))
    apart = {"better": "big", "than": "other", "differs_in": ["teacher"]}
    prepare_study(validate_recipe(recipe(arms=arms, contrasts=[apart])))
    with pytest.raises(InputError, match=r"outside_rollouts\.teacher is"):
        prepare_study(validate_recipe(recipe(arms=arms, contrasts=[apart | {"differs_in": []}])))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("sample_sft", "openai:big", "base_url: missing"),
        ("sample_sft", "mine.parquet", "rollouts: found 'mine.parquet'; expected rollouts from"),
        ("sample_sft", 5, "rollouts: found 5; expected rollouts from a place; write cache:PATH"),
        ("sample_sft", SERVED | {"key_variable": "MINE"}, "does not sound secret"),
        ("sample_sft", SERVED | {"base_url": "http://h?key=x"}, "that key_variable names"),
        ("sample_sft", "cache:/nowhere", "found no teacher rollouts there"),
        ("warmup", SERVED, "set targets: {kind: top_k, k: 20}"),
        ("opd", SERVED, "rollouts: unknown key"),
    ],
)
def test_what_outside_teachers_refuse(kind: str, settings: Any, message: str) -> None:
    with pytest.raises(HeadwaterError) as refused:
        _study(settings, kind)
    assert message in str(refused.value)
