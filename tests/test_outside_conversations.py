"""Problems with messages before the question, put to teachers from outside the study."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headwater.config.stages import OutsideRolloutsStage
from headwater.config.teachers import CachedTeacher, OpenAITeacher
from headwater.errors import InputError
from headwater.models.loading import load_tokenizer
from headwater.tasks.prompts import encode_prompt
from headwater.types import Problem
from openai_server import OpenAIServer, says
from stage_jobs import SAMPLING, Run, make_job, make_model

ASKED = tuple(
    Problem(name, "3+4=?", "test", before=(("user", name), ("assistant", "7")))
    for name in ("1+1=?", "2+2=?")
)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("tiny:student", tmp_path_factory.mktemp("student"), steps=1)


def _run(folder: Path, student: Path, teacher: OpenAITeacher | CachedTeacher) -> Run:
    config = OutsideRolloutsStage(teacher=teacher, sampling=SAMPLING)
    return Run(make_job("outside_rollouts", config, folder, model_dir=student, problems=ASKED))


def test_a_server_is_given_the_whole_conversation(tmp_path: Path, student: Path) -> None:
    with OpenAIServer(says("3+4=7")) as server:
        _run(tmp_path, student, OpenAITeacher(model="m", base_url=server.url)).start()
    said = {tuple((m["role"], m["content"]) for m in body["messages"]) for body in server.asked}
    assert said == {(*problem.before, ("user", "3+4=?")) for problem in ASKED}


def test_a_cache_tells_conversations_with_one_question_apart(tmp_path: Path, student: Path) -> None:
    tokenizer = load_tokenizer(student)
    rows = [
        {"prompt": p.prompt, "response": said, "prompt_ids": encode_prompt(tokenizer, p, "bare")}
        for p, said in zip(reversed(ASKED), ("3+4=8", "3+4=7"), strict=True)
    ]
    file = tmp_path / "known.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    run = _run(tmp_path / "a", student, CachedTeacher(path=str(file))).start()
    assert [(r["problem_id"], r["response"]) for r in run.rollouts()] == [
        ("1+1=?", "3+4=7"),
        ("2+2=?", "3+4=8"),
    ]
    pq.write_table(pa.Table.from_pylist(rows).drop(["prompt_ids"]), file)
    with pytest.raises(InputError, match=r"0 rollouts of problem '1\+1=\?'"):
        _run(tmp_path / "b", student, CachedTeacher(path=str(file))).start()
