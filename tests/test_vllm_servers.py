"""A stage's servers: started, asked, restarted, ended. With a program that stands in for vLLM."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from headwater.config.compute import VLLM
from headwater.errors import StageError
from headwater.rollout.vllm_client import VLLMClient
from headwater.rollout.vllm_process import ServerProcess, ServerSettings, server_environment
from headwater.rollout.vllm_servers import RESTARTS, Servers, StaleWeights
from processes_seen import all_end, children, descendants, started_since

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")

STAND_IN = Path(__file__).with_name("answering_server.py")


@pytest.fixture
def settings(tmp_path: Path) -> ServerSettings:
    """Of the stand-in, run by an interpreter that takes vLLM's command line."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {STAND_IN} "$@"\n', encoding="utf-8")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return ServerSettings(
        model=tmp_path,
        log=tmp_path / "server.log",
        dtype="float32",
        on_cpu=True,
        python=str(python),
        startup_seconds=20.0,
    )


def _misbehave(monkeypatch: pytest.MonkeyPatch, **how: Any) -> None:
    monkeypatch.setenv("HEADWATER_TEST_SERVER", json.dumps(how))


def _bodies(count: int) -> list[dict[str, Any]]:
    return [
        {"token_ids": [1, 2, 3], "sampling_params": {"seed": seed, "max_tokens": 4}}
        for seed in range(count)
    ]


def _servers(settings: ServerSettings, **engine: Any) -> Servers:
    servers = Servers(VLLM(**engine), settings, 60)
    servers.load(settings.model, 0)
    return servers


def _ids(answers: list[Any]) -> list[list[int]]:
    return [answer["choices"][0]["token_ids"] for answer in answers]


EXPECTED = [[(seed + place) % 60 for place in range(1 + seed % 4)] for seed in range(24)]


def test_answers_come_in_order_and_the_key_is_asked_for(settings: ServerSettings) -> None:
    with _servers(settings) as servers:
        assert _ids(servers.ask(_bodies(24))) == EXPECTED
        process = servers._process
        assert process is not None
        assert httpx2.get(f"{process.url}/headwater/info").status_code == 401
        assert process.key not in process.last_words()  # it prints its key
        assert "key [redacted]" in process.last_words()


def test_no_secret_of_ours_reaches_the_server(settings: ServerSettings) -> None:
    ours = {
        "HF_TOKEN": "hf_secret",
        "PYTHONPATH": "/ours",
        "VLLM_SERVER_DEV_MODE": "1",
        "HOME": "h",
    }
    found = server_environment(settings, "its key", ours)
    assert found["HOME"] == "h" and found["VLLM_API_KEY"] == "its key"
    assert "HF_TOKEN" not in found and "VLLM_SERVER_DEV_MODE" not in found
    assert found["PYTHONPATH"].endswith("vllm_extension")


def test_no_more_requests_are_in_flight_than_allowed(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    _misbehave(monkeypatch, slow=0.05)
    with _servers(settings, requests_in_flight=3) as servers:
        assert _ids(servers.ask(_bodies(24))) == EXPECTED
        assert servers._process is not None
        state = httpx2.get(f"{servers._process.url}/state").json()
    assert state["most"] == 3 and state["asked"] == 24


def test_a_busy_server_is_asked_again(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    _misbehave(monkeypatch, busy=5)
    with _servers(settings, requests_in_flight=2) as servers:
        assert _ids(servers.ask(_bodies(24))) == EXPECTED


def test_a_server_that_dies_is_started_again_with_its_weights(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _misbehave(monkeypatch, dies_after=7, once=str(tmp_path / "died"))
    pushes: list[int] = []
    with Servers(VLLM(requests_in_flight=4), settings, 60) as servers:
        servers.load(tmp_path, 5, lambda: pushes.append(1))
        first = servers.pid
        assert _ids(servers.ask(_bodies(24))) == EXPECTED
        assert servers.restarts == 1 and servers.pid != first and len(pushes) == 2
        assert servers._process is not None
        state = httpx2.get(f"{servers._process.url}/state").json()
        assert state["asked"] < 24  # with its weights at once, and not what was answered before
        assert (tmp_path / "died").exists()


def test_a_server_that_keeps_dying_is_given_up_with_its_last_words(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    _misbehave(monkeypatch, dies_after=1)
    with _servers(settings) as servers, pytest.raises(StageError, match="out of something") as e:
        servers.ask(_bodies(3))
    assert f"died {RESTARTS + 1} times" in str(e.value) and "compute.rollouts" in str(e.value)


def test_answers_of_other_weights_are_asked_for_again(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    _misbehave(monkeypatch, stale=3)
    with _servers(settings) as servers:
        assert _ids(servers.ask(_bodies(24))) == EXPECTED
        assert servers._process is not None
        state = httpx2.get(f"{servers._process.url}/state").json()
    assert state["asked"] == 27 and state["loads"] == 2


def test_answers_that_stay_of_other_weights_are_refused(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    _misbehave(monkeypatch, stale=1000)
    with _servers(settings) as servers, pytest.raises(StaleWeights, match=r"'another'.*given"):
        servers.ask(_bodies(4))


def test_a_server_that_cannot_start_is_quoted(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    _misbehave(monkeypatch, refuses=True)
    with pytest.raises(StageError, match="No module named vllm") as error:
        ServerProcess(settings)
    assert "compute.rollouts" in str(error.value)


def test_an_interpreter_that_is_not_there_is_said(settings: ServerSettings) -> None:
    with pytest.raises(StageError, match=r"/nowhere/python.*") as error:
        ServerProcess(replace(settings, python="/nowhere/python"))
    assert "No such file" in str(error.value) and "python: .venv-vllm" in str(error.value)


def test_a_server_that_never_answers_is_ended(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    _misbehave(monkeypatch, silent=True)
    before = children(os.getpid())
    with pytest.raises(StageError, match=r"not answered after 0\.5 seconds.*startup_seconds"):
        ServerProcess(replace(settings, startup_seconds=0.5))
    assert all_end(started_since(before))


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"logprobs_mode": "raw_logprobs"}, "logprobs_mode raw_logprobs, expected processed"),
        ({"dtype": "bfloat16"}, "dtype bfloat16, expected float32"),
        ({"max_logprobs": 20}, "max_logprobs 20, expected 64 or more"),
        ({"vocab_size": 32}, "32 tokens, expected 60"),
        ({"protocol": 1}, "extension with protocol 1, expected 2: start it again"),
        ("none", "extension"),
    ],
)
def test_a_server_that_is_another_is_refused(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch, info: Any, message: str
) -> None:
    _misbehave(monkeypatch, info=info)
    with pytest.raises(StageError, match=message):
        _servers(settings)


def test_several_urls_share_the_requests(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (
        ServerProcess(settings) as one,
        ServerProcess(replace(settings, log=tmp_path / "other.log")) as other,
    ):
        monkeypatch.setenv("VLLM_API_KEY", one.key)
        with (
            pytest.raises(StageError, match="refuses our key"),
            Servers(VLLM(urls=(one.url, other.url)), settings, 60) as servers,
        ):
            servers.load(tmp_path, 0)
        own = VLLMClient(one.url, one.key, in_flight=1, request_seconds=5)
        other_client = VLLMClient(other.url, other.key, in_flight=1, request_seconds=5)
        servers = Servers(VLLM(urls=(one.url, other.url)), settings, 60)
        servers._clients = [own, other_client]
        with servers:
            servers.load(tmp_path, 0)
            assert _ids(servers.ask(_bodies(24))) == EXPECTED
            asked = [httpx2.get(f"{s.url}/state").json()["asked"] for s in (one, other)]
        assert asked == [12, 12]


def test_a_url_where_nobody_listens_is_named(
    settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headwater.rollout.vllm_client._WAITS", (0.01,))
    with pytest.raises(StageError, match=r"http://127\.0\.0\.1:9: ConnectError.*urls"):
        Servers(VLLM(urls=("http://127.0.0.1:9",)), settings, 60).load(Path(), 0)


def test_ending_a_server_ends_all_it_started(settings: ServerSettings) -> None:
    before = children(os.getpid())
    process = ServerProcess(settings)
    (leader,) = started_since(before)
    everything = [leader, *descendants(leader)]
    assert leader == process.pid and len(everything) == 3
    process.stop()
    assert all_end(everything) and not process.is_alive()


@pytest.mark.parametrize("killed", ["us", "the supervisor", "the server"])
def test_nothing_is_left_when_one_is_killed(settings: ServerSettings, killed: str) -> None:
    script = (
        "import sys, pathlib\n"
        "from headwater.rollout.vllm_process import *\n"
        f"process = ServerProcess(ServerSettings(model=pathlib.Path({str(settings.model)!r}),"
        f" log=pathlib.Path({str(settings.log)!r}), dtype='float32', on_cpu=True,"
        f" python={settings.python!r}))\n"
        "print('started', flush=True); sys.stdin.read()\n"
    )
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    owner = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    assert owner.stdout is not None and owner.stdout.readline() == "started\n"
    supervisor, server, engine = descendants(owner.pid)
    victim = {"us": owner.pid, "the supervisor": supervisor, "the server": server}[killed]
    os.kill(victim, signal.SIGKILL)
    assert all_end([supervisor, server, engine], within_seconds=10)
    owner.kill()
    owner.communicate()


def test_the_owners_pipe_may_live_on_in_another(settings: ServerSettings) -> None:
    """A process that we forked holds our end of the pipe open; the parent's id tells."""
    script = (
        "import os, sys, pathlib, time\n"
        "from headwater.rollout.vllm_process import *\n"
        f"process = ServerProcess(ServerSettings(model=pathlib.Path({str(settings.model)!r}),"
        f" log=pathlib.Path({str(settings.log)!r}), dtype='float32', on_cpu=True,"
        f" python={settings.python!r}))\n"
        "if os.fork() == 0:\n    time.sleep(30); os._exit(0)\n"
        "print('started', process.pid, flush=True); time.sleep(30)\n"
    )
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    owner = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment, text=True
    )
    assert owner.stdout is not None
    supervisor = int(owner.stdout.readline().split()[1])
    everything = descendants(owner.pid)
    forked = [pid for pid in children(owner.pid) if pid != supervisor]
    owner.kill()
    try:
        assert all_end([pid for pid in everything if pid not in forked], within_seconds=10)
    finally:
        for pid in forked:
            os.kill(pid, signal.SIGKILL)
        owner.wait()
