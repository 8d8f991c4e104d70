"""Recipes that name vLLM: what is read, what is refused, and what it does to fingerprints."""

from __future__ import annotations

from typing import Any

import pytest

from headwater.config.compute import VLLM, Compute
from headwater.config.loading import validate_recipe
from test_config import plain, refusal

TOP_K = {"targets": {"kind": "top_k", "k": 8}}


def _asking(**compute: Any) -> dict[str, Any]:
    return plain(compute=compute, stages={"opd": TOP_K, "warmup": TOP_K})


def test_servers_of_a_stages_own_and_given_ones_read() -> None:
    recipe = validate_recipe(_asking(rollouts="vllm", scoring={"kind": "vllm", "python": "p"}))
    assert recipe.compute.rollouts == VLLM() and recipe.compute.scoring == VLLM(python="p")
    given = {"kind": "vllm", "urls": ["http://a:8000/", "https://b/x"], "requests_in_flight": 7}
    engine = validate_recipe(_asking(rollouts=given, processes=1)).compute.rollouts
    assert isinstance(engine, VLLM)
    assert engine.urls == ("http://a:8000", "https://b/x") and engine.requests_in_flight == 7


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"urls": ["ftp://host"]}, ["'ftp://host'", "expected http://HOST:PORT"]),
        ({"urls": ["host:8000"]}, ["'host:8000'", "https://HOST:PORT"]),
        ({"urls": ["http://h:x"]}, ["'http://h:x'", "http://HOST:PORT"]),
        ({"urls": ["http://h"], "extra_args": ["--x"]}, ["['--x'] with urls", "remove urls"]),
        ({"extra_args": ["--dtype=half"]}, ["['--dtype']", "remove them"]),
        ({"key_variable": "HOME"}, ["'HOME'", "TEACHER_API_KEY"]),
        ({"requests_in_flight": 0}, ["requests_in_flight = 0"]),
        ({"transfer": "nccl"}, ["transfer", "nccl", "broadcast"]),
        (
            {"transfer": "ipc", "urls": ["http://127.0.0.1", "http://far"]},
            ["http://far", "broadcast"],
        ),
        ({"transfer": "ipc", "in_process": True}, ["transfer with in_process=true"]),
    ],
)
def test_a_server_that_cannot_be_is_refused(engine: dict[str, Any], words: list[str]) -> None:
    text = "\n".join(refusal(_asking(rollouts={"kind": "vllm"} | engine)))
    assert "compute.rollouts" in text and all(word in text for word in words), text


@pytest.mark.parametrize("url", ["http://me:pass-word@h", "http://h?token=pass-word"])
def test_a_secret_in_an_address_is_refused_and_not_repeated(url: str) -> None:
    text = "\n".join(refusal(_asking(rollouts={"kind": "vllm", "urls": [url]})))
    assert "compute.rollouts.urls" in text and "pass-word" not in text


def test_an_address_is_an_address_alone() -> None:
    """What does not look like a secret may be one: the key has a place of its own."""
    text = "\n".join(refusal(_asking(rollouts={"kind": "vllm", "urls": ["http://h?who=me"]})))
    assert "VLLM_API_KEY" in text and "who=me" not in text


def test_a_whole_distribution_is_not_asked_of_a_server() -> None:
    """Of both stages that read it, by their places; in this process it is the default."""
    text = "\n".join(refusal(plain(compute={"scoring": "vllm"}, stages={})))
    assert "arms.bridge.student[0].warmup.targets: full with compute.scoring: vllm" in text
    assert "arms.bridge.student[1].opd.targets: full" in text
    assert "targets: {kind: top_k, k: 64}" in text
    validate_recipe(plain(compute={"rollouts": "vllm"}, stages={}))


def test_a_teachers_temperature_is_not_asked_of_a_server() -> None:
    opd = TOP_K | {"teacher_temperature": 0.5}
    stages = {"opd": opd, "warmup": TOP_K}
    text = "\n".join(refusal(plain(compute={"scoring": "vllm"}, stages=stages)))
    assert "student[1].opd.teacher_temperature=0.5" in text and "teacher_temperature: 1.0" in text
    validate_recipe(plain(stages=stages))


@pytest.mark.parametrize(
    ("where", "temperature"), [("sampling", 2.5), ("sampling", 0.005), ("evaluation", 3.0)]
)
def test_temperatures_that_a_server_would_change_are_refused(
    where: str, temperature: float
) -> None:
    drawn = {"temperature": temperature}
    changes = {"sampling": drawn} if where == "sampling" else {"evaluation": {"sampling": drawn}}
    text = "\n".join(refusal(plain(compute={"rollouts": "vllm"}, **changes)))
    assert f"sampling.temperature={temperature:g}" in text and "from 0.01 to 2" in text
    validate_recipe(plain(**changes))


def test_greedy_evaluations_are_servers_work_too() -> None:
    greedy = {"attempts": 1, "sampling": {"temperature": 0.0}}
    validate_recipe(plain(compute={"rollouts": "vllm"}, evaluation=greedy))


def test_a_server_is_not_shared_by_stages_or_models() -> None:
    one = {"kind": "vllm", "urls": ["http://h"]}
    for processes in ({}, {"processes": 2}):
        text = "\n".join(refusal(_asking(rollouts=one, **processes)))
        assert f"compute.processes={processes.get('processes', 'auto')} with urls" in text
        assert "compute.processes: 1" in text
    both = "\n".join(refusal(_asking(rollouts=one, scoring=one, processes=1)))
    assert "http://h is in the urls of compute.rollouts and compute.scoring" in both
    other = {"kind": "vllm", "urls": ["http://other"]}
    validate_recipe(_asking(rollouts=one, scoring=other, processes=1))
    validate_recipe(_asking(rollouts="vllm", scoring="vllm", processes=2))


def test_who_samples_shows_in_the_fingerprints_of_stages_that_sample() -> None:
    """And where servers are does not: only whose random numbers and rounding they are."""
    here, there = Compute(), Compute(rollouts=VLLM(), scoring=VLLM(urls=("http://h",)))
    elsewhere = Compute(rollouts=VLLM(urls=("http://b",), transfer="broadcast"), scoring=VLLM())
    assert here.identity("grpo") == ["auto", "auto"] == there.identity("sft")
    assert there.identity("grpo") == ["auto", "auto", "rollouts=vllm"]
    assert there.identity("opd") == ["auto", "auto", "rollouts=vllm", "scoring=vllm"]
    assert elsewhere.identity("opd") == there.identity("opd")
