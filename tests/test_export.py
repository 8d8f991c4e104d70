"""headwater export and headwater chat, on one small real run."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwater import api
from headwater.chat import Answer
from headwater.console import GrowingText, show_answer
from headwater.errors import InputError, StageError
from headwater.models.loading import load_model
from headwater.models.sources import materialise
from headwater.report import model_card
from headwater.report.model_card import base_licence
from headwater.tasks.prompts import encode_conversation
from headwater.terminal import stdout_console
from headwater.workflow.graph import EVALUATES, STAGE_VERSIONS
from headwater.workflow.record import read_record
from test_cli import call, error_lines

STUDY = """
name: small
question: "Is it <b>safe</b> | to *show*?"
task:
  train: task:arithmetic?count=60
  eval: {held_out: "task:arithmetic?seed=1&count=20"}
  verifier: exact
  prompt: bare
models:
  teacher: {source: "tiny:student", prepare: [{pretrain: {steps: 1}}]}
  student: {source: "prune:teacher", layers: [0]}
pools: {labels: 8, prompts: 4}
sampling: {max_new_tokens: 6}
evaluation: {attempts: 2, problems: 3}
diagnostics: {prompts: 1}
stages:
  pretrain: {batch_size: 4}
  opd: {steps: 1, prompts_per_step: 2, group_size: 1, lr: 1e-2}
  grpo: {steps: 1, prompts_per_step: 2, group_size: 2, lr: 1e-2}
arms:
  nothing: {student: []}
  bridge: {title: the bridge, teacher: [grpo], student: [opd]}
contrasts:
  - {better: bridge, than: nothing}
seeds: [3, 4]
compute: {processes: 1, threads: 1, precision: float32}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    (folder / "study.yaml").write_text(STUDY)
    api.run(folder / "study.yaml", folder / "run", quiet=True)
    return folder / "run"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    materialise("tiny:student", tmp_path / "tiny", seed=1)
    return tmp_path / "tiny"


def artifact(run: Path, arm: str, seed: int, role: str = "student") -> Path:
    plans = read_record(run).graph.arms
    plan = next(one for one in plans if (one.arm, one.seed) == (arm, seed))
    found = plan.teacher if role == "teacher" else plan.student
    assert found is not None
    return run / "artifacts" / found / "model"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder, dtype=torch.float32).state_dict()


def front_matter(folder: Path) -> dict[str, Any]:
    head = (folder / "README.md").read_text().split("---\n")[1]
    found = yaml.safe_load(head)
    assert isinstance(found, dict)
    return found


# --- a run's model ---------------------------------------------------------------------------


def test_an_arm_is_exported_as_transformers_loads_it(run: Path, tmp_path: Path) -> None:
    found = api.export(run, tmp_path / "out", arm="bridge", seed=4)
    assert (found.arm, found.seed, found.role, found.dtype) == ("bridge", 4, "student", "float32")
    made = artifact(run, "bridge", 4)
    assert found.stage == made.parent.name
    assert set(found.files) == {
        *(path.name for path in made.iterdir()),
        "README.md",
        "recipe.yaml",
    }
    wanted, read = weights(made), weights(tmp_path / "out")
    assert all(torch.equal(read[name], wanted[name]) for name in wanted)
    other = weights(artifact(run, "bridge", 3))
    assert not all(torch.equal(read[name], other[name]) for name in wanted)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    ids = encode_conversation(tokenizer, [{"role": "user", "content": "1+1=?"}])
    assert model.generate(torch.tensor([ids]), max_new_tokens=2, do_sample=False).shape[1] > len(
        ids
    )
    assert not (tmp_path / "out.part").exists()


def test_an_adapter_on_its_base_is_the_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    (tmp_path / "study.yaml").write_text(STUDY)
    settings = ["seeds=[3]", "arms.nothing={student: [{sft: {steps: 1, lora: 2}}]}"]
    settings += ["stages.sft.lr=0.01", "stages.sft.batch_size=4"]
    api.run(
        tmp_path / "study.yaml", tmp_path / "run", overrides=settings, arms=["nothing"], quiet=True
    )
    found = api.export(tmp_path / "run", tmp_path / "out", format="adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= {*found.files}
    assert "--format adapter" in (tmp_path / "out" / "README.md").read_text()
    named = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    base = load_model(tmp_path / "run" / named["base_model_name_or_path"], dtype=torch.float32)
    plain = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload()
    api.export(tmp_path / "run", tmp_path / "merged")
    merged = weights(tmp_path / "merged")
    assert not all(torch.equal(plain[name], merged[name]) for name in merged)
    for name, tensor in adapted.state_dict().items():
        torch.testing.assert_close(tensor, merged[name])


def test_teacher_first_seed_and_dtype(run: Path, tmp_path: Path) -> None:
    found = api.export(run, tmp_path / "out", arm="bridge", role="teacher", dtype="bfloat16")
    assert found.seed == 3
    wanted, read = weights(artifact(run, "bridge", 3, "teacher")), weights(tmp_path / "out")
    assert all(torch.equal(read[n], wanted[n].bfloat16().float()) for n in wanted)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_gguf_holds_the_arms_model(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs `pip install gguf accelerate`")
    found = api.export(run, tmp_path / "out", arm="bridge", format="gguf")
    (file,) = (tmp_path / "out").glob("*.gguf")
    assert found.files == ("README.md", "recipe.yaml", file.name)
    materialise(f"gguf:{file}", tmp_path / "back")
    wanted, read = weights(artifact(run, "bridge", 3)), weights(tmp_path / "back")
    assert all(torch.equal(read[name], wanted[name]) for name in wanted)
    assert front_matter(tmp_path / "out")["library_name"] == "gguf"
    assert f"llama-cli -m {file.name}" in (tmp_path / "out" / "README.md").read_text()


def test_damaged_and_unfinished_models_are_not_exported(run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    made = artifact(copied, "bridge", 3)
    file = made / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(StageError, match=r"differs from its recorded hash"):
        api.export(copied, tmp_path / "out", arm="bridge")
    shutil.rmtree(made.parent)
    with pytest.raises(InputError, match=r"is not finished: .* run the recipe again"):
        api.export(copied, tmp_path / "out", arm="bridge")
    assert not (tmp_path / "out").exists()


# --- its card --------------------------------------------------------------------------------


def test_card_says_what_the_records_say(run: Path, tmp_path: Path) -> None:
    api.export(run, tmp_path / "out", arm="bridge")
    results = json.loads((run / "results.json").read_text())
    (row,) = (r for r in results["rows"] if (r["arm"], r["evaluates"]) == ("bridge", "student"))
    head = front_matter(tmp_path / "out")
    assert head["license"] == "apache-2.0"
    assert head["pipeline_tag"] == "text-generation"
    assert {"headwater", "arxiv:2605.12483", "grpo", "on-policy-distillation"} <= set(head["tags"])
    (result,) = head["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == pytest.approx(100 * row["avg_at_k"], abs=0.01)
    assert result["metrics"][0]["name"] == "avg@2"
    card = (tmp_path / "out" / "README.md").read_text()
    low, high = (f"{100 * bound + 1e-9:.1f}%" for bound in row["interval"])
    assert f"{low} to {high}" in card
    assert f"| labels | {row['spent']['labels']} |" in card
    assert f"| updates | {row['spent']['updates']} |" in card
    graph = read_record(run).graph
    lineage = graph.closure([artifact(run, "bridge", 3).parent.name])
    assert len(lineage) == 5
    assert all(f"| `{fingerprint}` |" in card for fingerprint in lineage)
    assert "teacher: reinforcement learning (GRPO)" in card
    assert "student: on-policy distillation" in card
    assert "headwater export run --arm bridge --seed 3 --as student" in card
    assert "Means over 2 seeds" in card
    assert r"\<b\>safe\</b\> \| to \*show\*?" in card and "<b>" not in card
    assert str(run) not in card
    assert (tmp_path / "out" / "recipe.yaml").read_bytes() == (run / "recipe.yaml").read_bytes()


def test_card_of_a_run_without_results_says_so(run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    (copied / "results.json").unlink()
    api.export(copied, tmp_path / "out", arm="bridge")
    assert "was not evaluated in its run" in (tmp_path / "out" / "README.md").read_text()
    assert "model-index" not in front_matter(tmp_path / "out")


def test_cards_have_words_for_every_stage() -> None:
    assert {*STAGE_VERSIONS} - EVALUATES <= {*model_card._KINDS}


def test_licence_is_read_from_the_base_models_card(tiny: Path) -> None:
    assert base_licence(f"hf:{tiny}") == "unknown"
    (tiny / "README.md").write_text("---\nlicense: mit\ntags: [x]\n---\n# x\n")
    assert base_licence(f"hf:{tiny}") == "mit"
    (tiny / "README.md").write_text("---\nlicense: '[evil](http://x)'\n---\n")
    assert base_licence(f"hf:{tiny}") == "unknown"


# --- folders, sources, and what is refused ---------------------------------------------------


def test_a_folder_is_exported_with_the_card_it_has(tiny: Path, tmp_path: Path) -> None:
    (tiny / "README.md").write_text("# mine\n")
    found = api.export(tiny, tmp_path / "out", dtype="float16")
    assert (found.arm, found.dtype) == (None, "float16")
    assert (tmp_path / "out" / "README.md").read_text() == "# mine\n"
    assert api.export("tiny:student", tmp_path / "fetched").card is None


def test_a_folder_that_holds_something_is_kept(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    (line,) = error_lines(capsys, "export", tiny, "--to", out)
    assert "has something in it" in line and "--force" in line
    assert (out / "precious").read_text() == "x"
    assert call("export", tiny, "--to", out, "--force", "--json") == 0
    assert "model.safetensors" in json.loads(capsys.readouterr().out)["files"]
    assert not (out / "precious").exists()
    for holds in (tiny, tiny.parent):
        (line,) = error_lines(capsys, "export", tiny, "--to", holds, "--force")
        assert "is the model itself, or holds it" in line
    monkeypatch.chdir(out)
    (line,) = error_lines(capsys, "export", tiny, "--to", ".", "--force")
    assert "holds the folder this runs in" in line
    assert (tiny / "config.json").is_file() and (out / "config.json").is_file()
    assert (tiny / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], r"2 arms \(nothing, bridge\): expected one; add --arm"),
        (["--arm", "bride"], "no arm 'bride': expected one of nothing, bridge"),
        (["--arm", "bridge", "--seed", "9"], "no seed 9: expected one of 3, 4"),
        (["--arm", "nothing", "--as", "teacher"], "arm nothing has no teacher"),
        (["--arm", "bridge", "--format", "adapter"], "was not trained through adapters; expected"),
        (["--arm", "bridge", "--dtype", "q8_0"], "--dtype q8_0 with --format hf: expected one of"),
        (["--arm", "bridge", "--push", "nobody"], "--push nobody: expected ORG/NAME"),
    ],
)
def test_what_cannot_be_exported_is_said(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
) -> None:
    (line,) = error_lines(capsys, "export", run, "--to", tmp_path / "out", *options)
    assert re.search(said, line)
    assert not (tmp_path / "out").exists()


def test_options_of_a_run_need_a_run(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--arm x with .*, which is no run's folder"):
        api.export(tiny, tmp_path / "out", arm="x")


# --- the hub ---------------------------------------------------------------------------------


class FakeHub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files asks for; `files` holds what came."""

    files: ClassVar[dict[str, bytes]] = {}
    checked = ""
    refuse = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if FakeHub.refuse:
            self._answer(403, {"error": "no write access"})
        elif self.path == "/api/repos/create":
            assert self.headers["Authorization"] == "Bearer hf_test"
            self._answer(200, {"url": f"http://{self.headers['Host']}/me/small"})
        elif self.path == "/api/validate-yaml":
            FakeHub.checked = json.loads(body)["content"]
            self._answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            answers = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked
            ]
            self._answer(200, {"files": answers})
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    FakeHub.files[value["path"]] = base64.b64decode(value["content"])
            commit = f"http://{self.headers['Host']}/me/small/commit/{'0' * 40}"
            self._answer(200, {"commitUrl": commit, "commitOid": "0" * 40, "hookOutput": ""})

    def do_GET(self) -> None:
        self._answer(200, {"id": "me/small", "sha": "0", "siblings": []})

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, code: int, values: dict[str, Any]) -> None:
        content = json.dumps(values).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


PUSH = (
    "import sys; from pathlib import Path; from headwater.publishing import hub\n"
    "hub.require_pushable('me/small'); print(hub.push(Path(sys.argv[1]), 'me/small'))"
)


def pushed(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`hub.push` in a process of its own: where the hub is, is read when its library is loaded."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    home = {"HF_HOME": str(folder.parent / "hf"), "HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        [sys.executable, "-c", PUSH, str(folder)],
        env=kept | home | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def endpoint() -> Iterator[str]:
    FakeHub.files, FakeHub.refuse = {}, False
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "README.md").write_text("# small\n")
    (tmp_path / "small" / "config.json").write_text("{}")
    return tmp_path / "small"


def test_push_uploads_the_folders_files(endpoint: str, small: Path) -> None:
    done = pushed(small, HF_ENDPOINT=endpoint, HF_TOKEN="hf_test")
    assert done.returncode == 0, done.stderr
    assert "small" in done.stdout
    assert FakeHub.files == {"README.md": b"# small\n", "config.json": b"{}"}
    assert FakeHub.checked == "# small\n"


def test_push_that_is_refused_keeps_the_folder_and_says_how_to_go_on(
    endpoint: str, small: Path
) -> None:
    FakeHub.refuse = True
    done = pushed(small, HF_ENDPOINT=endpoint, HF_TOKEN="hf_test")
    assert "StageError" in done.stderr
    assert "is written, but not uploaded to me/small" in done.stderr
    assert f"hf upload me/small {small}" in done.stderr
    assert FakeHub.files == {}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_test"}, "while HF_HUB_OFFLINE is set"),
        ({}, "without a token: expected one that may write to me; run `hf auth login`"),
    ],
)
def test_push_that_cannot_work_is_refused_first(
    small: Path, environment: dict[str, str], said: str
) -> None:
    done = pushed(small, **environment)
    assert "InputError" in done.stderr and said in done.stderr


# --- chat ------------------------------------------------------------------------------------


def test_one_answer_is_the_samplers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["chat", run, "--arm", "bridge", "--once", "7+5=?", "--max-new-tokens", "5"]
    assert call(*options, "--temperature", "0", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    folder = artifact(run, "bridge", 3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = encode_conversation(tokenizer, [{"role": "user", "content": "7+5=?"}])
    model = AutoModelForCausalLM.from_pretrained(folder)
    greedy = model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)[0, len(ids) :]
    assert answer["text"] == tokenizer.decode(greedy, skip_special_tokens=True)
    assert answer["tokens"] == len(greedy)
    assert answer["prompt"] == "7+5=?"


def test_seeds_repeat_and_differ(tiny: Path) -> None:
    def said(seed: int) -> list[str]:
        sampling = {"max_new_tokens": 12}
        with api.chat(tiny, seed=seed, sampling=sampling) as talk:
            return [talk.say("1+1=?").text, talk.say("1+1=?").text]

    first = said(0)
    assert first == said(0)
    assert first != said(1)
    assert first[0] != first[1]  # the second answer has read the first


def test_an_answer_is_told_while_it_grows(tiny: Path) -> None:
    told: list[str] = []
    with api.chat(tiny, sampling={"max_new_tokens": 9}) as talk:
        answer = talk.say("1+1=?", told.append)
        count = len(told)
        talk.reset()
        assert talk.say("1+1=?").text == answer.text
    assert told[-1] == answer.text and len(told) == count == answer.tokens > 1
    assert all(later.startswith(earlier) for earlier, later in pairwise(told))


def test_a_growing_text_is_printed_once() -> None:
    out = Console(file=io.StringIO(), force_terminal=True, width=20, color_system=None)
    growing = GrowingText(out)
    parts = ["on", "one \x1b", "one \x1b word after another, longer than a line"]
    for part in parts:
        growing.show(part)
    show_answer(out, Answer("x", f"{parts[-1]}.", 9, "stop", 0.1), growing)
    whole = "one <U+001B> word after another, longer than a line.\n"
    assert out.file.getvalue() == whole  # type: ignore[attr-defined]


def test_a_text_that_changes_is_printed_whole_at_the_end() -> None:
    out = Console(file=io.StringIO(), force_terminal=True, color_system=None)
    growing = GrowingText(out)
    growing.show("don 't")
    growing.show("don't s")
    growing.end("don't stop")
    assert out.file.getvalue() == "don 't\ndon't stop\n"  # type: ignore[attr-defined]


def test_what_was_said_is_read_again_until_reset(tiny: Path) -> None:
    with api.chat(tiny, system="be brief", sampling={"max_new_tokens": 4}) as talk:
        first = talk.say("2+2=?")
        with pytest.raises(InputError, match=r"the conversation: the tokenizer has no token"):
            talk.say("HELLO")
        with pytest.raises(InputError, match=r"more than the model's 1024 positions; .*/reset"):
            talk.say("1" * 1100)
        second = talk.say("2+2=?")
        talk.reset()
        again = talk.say("2+2=?")
    assert again.text == first.text
    assert second.text != first.text


def test_lines_of_a_pipe_stand_for_themselves(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("1+1=?\n\n2+2=?\n1+1=?\n"))
    assert call("chat", tiny, "--max-new-tokens", "6", "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["1+1=?", "2+2=?", "1+1=?"]
    assert rows[0]["text"] == rows[2]["text"]
    assert all(row["finish_reason"] in ("stop", "length") for row in rows)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_conversation_goes_on_after_what_cannot_be_answered(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "1+1=?\nNOT KNOWN\n/what\n/reset\n1+1=?\n/exit\n3+3=?\n"
    monkeypatch.setattr("sys.stdin", Terminal(lines))
    assert call("chat", tiny, "--max-new-tokens", "6", "--json") == 0
    shown = capsys.readouterr()
    answers = re.findall(r'"text": ("[^\n]*?"), "tokens"', shown.out)
    assert len(answers) == 2 and answers[0] == answers[1]
    assert "has no token for part of 'NOT KNOWN'" in shown.err
    assert "/what: expected /reset, /exit" in shown.err


def test_what_a_model_writes_is_made_visible(capsys: pytest.CaptureFixture[str]) -> None:
    show_answer(stdout_console(), Answer("x", "\x1b[31m[bold]red[/bold]", 3, "length", 0.1))
    shown = capsys.readouterr().out
    assert "<U+001B>[31m[bold]red[/bold]" in shown and "cut off after 3 tokens" in shown


def test_chat_settings_that_cannot_work(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = error_lines(capsys, "chat", tiny, "--prompt", "haiku", "--once", "x")
    assert "prompt form 'haiku' is unknown" in line
    (line,) = error_lines(capsys, "chat", tiny, "--temperature", "-1", "--once", "x")
    assert "temperature = -1.0" in line
    (line,) = error_lines(capsys, "chat", "no/such/folder", "--once", "x")
    assert "no such folder" in line
