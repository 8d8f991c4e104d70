"""What a vLLM server samples and scores is what our own forward says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch

from headwater import seeding
from headwater.config.compute import VLLM, Compute
from headwater.engine.forward import load_engine_model
from headwater.engine.packing import PackedGroup, pack
from headwater.errors import StageError
from headwater.losses.divergences import top_k_logprobs
from headwater.rollout import vllm_link
from headwater.rollout.engines import Serving, make_sampler
from headwater.rollout.sampler import InProcessSampler, SampleRequest, SamplerSettings
from headwater.rollout.scoring import FrozenModel
from headwater.rollout.vllm_process import ServerProcess
from headwater.rollout.vllm_sampler import VLLMSampler
from headwater.rollout.vllm_scoring import VLLMTeacher
from headwater.rollout.vllm_servers import StaleWeights
from headwater.rollout.vllm_weights import LiveWeights
from headwater.types import FinishReason, Rollout

END, VOCAB = 2, 60  # the model has 63 tokens: three of them stand for padding
NOISE = 1e-4
TRANSFERS = ("folder", "broadcast", "ipc")


def _load(folder: Path) -> Any:
    return load_engine_model(folder, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def model(student: Path) -> Any:
    return _load(student)


class Served:
    """Samplers of one model on the shared server; `version` is the policy's."""

    def __init__(self, model: Any, folder: Path, scratch: Path, server: ServerProcess) -> None:
        self.model, self.folder, self.scratch, self.server = model, folder, scratch, server
        self.version = 0
        self.transfer: Any = "folder"
        self.closing = ExitStack()

    def sampler(self, **settings: Any) -> VLLMSampler:
        values = {"temperature": 1.0, "max_new_tokens": 12, "end_ids": (END,), "vocab_size": VOCAB}
        engine = VLLM(
            urls=(self.server.url,),
            requests_in_flight=settings.pop("in_flight", 32),
            sleeps=settings.pop("sleeps", False),
            transfer=self.transfer,
        )
        compute = Compute(device="cpu", precision="float32", rollouts=engine)
        serving = Serving(self.folder, self.scratch, self.closing, lambda: self.version)
        made = make_sampler(compute, self.model, SamplerSettings(**(values | settings)), serving)
        assert isinstance(made, VLLMSampler)
        return made


@pytest.fixture
def served(
    model: Any,
    student: Path,
    tmp_path: Path,
    student_server: ServerProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Served]:
    monkeypatch.setenv("VLLM_API_KEY", student_server.key)
    found = Served(model, student, tmp_path, student_server)
    with found.closing:
        yield found


def _requests(prompts: int = 6, rows: int = 8) -> list[SampleRequest]:
    rng = np.random.default_rng(3)
    return [
        SampleRequest(
            tuple(int(i) for i in rng.integers(3, VOCAB, 5 + p)),
            tuple(seeding.derive_key("test", p, row) for row in range(rows)),
        )
        for p in range(prompts)
    ]


def _flat(groups: Sequence[Sequence[Rollout]]) -> list[Rollout]:
    return [rollout for group in groups for rollout in group]


def _logits(model: Any, rollout: Rollout) -> torch.Tensor:
    """Plain logits at every token of the response, [T, VOCAB]."""
    group = PackedGroup(rollout.prompt_ids, (rollout.response_ids,), (0,))
    batch = pack([group], dtype=torch.float32, device="cpu")
    full = FrozenModel(model, VOCAB, 0).targets(batch)
    return (full.hidden_TH @ full.head_VH.T).detach()


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, None), (0.7, 1.0, None), (1.3, 0.8, 20)]
)
def test_logprobs_are_those_of_the_distribution_drawn_from(
    served: Served, temperature: float, top_p: float, top_k: int | None
) -> None:
    sampler = served.sampler(temperature=temperature, top_p=top_p, top_k=top_k)
    rollouts = _flat(sampler.sample(_requests()))
    assert len(rollouts) == 48
    for rollout in rollouts:
        logits = _logits(served.model, rollout) / temperature
        if top_k is not None:
            least = logits.topk(top_k, -1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
            falling, order = logits.softmax(-1).sort(-1, descending=True)
            gone = falling.cumsum(-1) - falling >= top_p
            logits = logits.masked_fill(gone.gather(-1, order.argsort(-1)), -torch.inf)
        expected = logits.log_softmax(-1)[range(len(rollout.response_ids)), rollout.response_ids]
        assert np.allclose(rollout.sampler_logprobs, expected.numpy(), atol=NOISE)


def test_responses_end_with_the_end_token_or_at_the_limit(served: Served) -> None:
    rollouts = _flat(served.sampler().sample(_requests()))
    stopped = [r for r in rollouts if r.finish_reason is FinishReason.STOP]
    cut = [r for r in rollouts if r.finish_reason is FinishReason.LENGTH]
    assert stopped and cut
    assert all(r.response_ids[-1] == END and END not in r.response_ids[:-1] for r in stopped)
    assert all(END not in r.response_ids and len(r.response_ids) == 12 for r in cut)
    endless = _flat(served.sampler(forbid_end=True).sample(_requests()))
    assert {len(r.response_ids) for r in endless} == {12}
    other_end = _flat(served.sampler(end_ids=(END, 7, 11)).sample(_requests()))
    assert {r.response_ids[-1] for r in other_end if len(r.response_ids) < 12} <= {END, 7, 11}


def test_padding_tokens_are_never_drawn_and_have_no_mass(served: Served) -> None:
    """A model whose padding rows are the likeliest of all: the bias would show at once."""
    loud = _load(served.folder)
    with torch.no_grad():
        loud.get_output_embeddings().weight[VOCAB:] = 5.0 * torch.sign(
            loud.get_output_embeddings().weight[:1]
        )
    sampler = Served(loud, served.folder, served.scratch, served.server).sampler(temperature=1.5)
    rollouts = _flat(sampler.sample(_requests()))
    assert max(max(r.response_ids) for r in rollouts) < VOCAB
    for rollout in rollouts[:8]:
        expected = (_logits(loud, rollout) / 1.5).log_softmax(-1)
        picked = expected[range(len(rollout.response_ids)), rollout.response_ids]
        assert np.allclose(rollout.sampler_logprobs, picked.numpy(), atol=NOISE)


def test_greedy_takes_the_likeliest_as_our_own_sampler_does(served: Served) -> None:
    requests = [SampleRequest(r.prompt_ids, r.keys[:1]) for r in _requests()]
    theirs = _flat(served.sampler(temperature=0.0).sample(requests))
    settings = SamplerSettings(0.0, 12, (END,), VOCAB)
    ours = _flat(InProcessSampler(served.model, settings).sample(requests))
    assert [r.response_ids for r in theirs] == [r.response_ids for r in ours]
    assert all((r.sampler_logprobs == 0).all() for r in theirs)


def test_a_seed_draws_the_same_whatever_else_is_asked(served: Served) -> None:
    requests = _requests()
    together = served.sampler().sample(requests)
    again = served.sampler(in_flight=3).sample(requests[::-1])[::-1]
    alone = served.sampler().sample([SampleRequest(requests[4].prompt_ids, requests[4].keys[5:6])])
    ids = [r.response_ids for r in _flat(together)]
    assert [r.response_ids for r in _flat(again)] == ids
    assert alone[0][0].response_ids == together[4][5].response_ids
    assert len(set(ids)) > 40  # and other seeds draw others


def test_tokens_are_drawn_as_often_as_they_are_likely(served: Served) -> None:
    """Frequencies of the first token over 1,500 seeds, against our own probabilities."""
    prompt = _requests()[0].prompt_ids
    keys = tuple(seeding.derive_key("often", n) for n in range(1500))
    sampler = served.sampler(max_new_tokens=1)
    rollouts = sampler.sample([SampleRequest(prompt, keys)])[0]
    p = _logits(served.model, rollouts[0]).softmax(-1)[0].double().numpy()
    counts = np.bincount([r.response_ids[0] for r in rollouts], minlength=VOCAB)
    likely = p * len(keys) >= 5
    chi2 = (((counts - p * len(keys)) ** 2) / (p * len(keys)))[likely].sum()
    degrees = int(likely.sum())
    assert chi2 < degrees + 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("transfer", TRANSFERS)
def test_new_weights_are_answered_with_and_named(served: Served, transfer: str) -> None:
    served.transfer = transfer
    served.model = _load(served.folder)
    sampler = served.sampler()
    requests = _requests()
    before = _flat(sampler.sample(requests))
    with torch.no_grad():
        for parameter in served.model.parameters():
            parameter += 0.1 * parameter.std() * torch.randn_like(parameter)
    served.version = 7
    after = _flat(sampler.sample(requests))
    assert {r.policy_version for r in before} == {0} and {r.policy_version for r in after} == {7}
    for rollout in after:  # the head is tied to the embedding: vLLM alone would keep its old one
        expected = _logits(served.model, rollout).log_softmax(-1)
        picked = expected[range(len(rollout.response_ids)), rollout.response_ids]
        assert np.allclose(rollout.sampler_logprobs, picked.numpy(), atol=NOISE)
    with torch.no_grad():
        served.model.get_output_embeddings().weight *= 1.5
    with pytest.raises(StageError, match="nats a token from ours"):  # changed, and not pushed
        sampler._check_scores(8)


@pytest.mark.parametrize("transfer", TRANSFERS)
def test_answers_of_weights_that_somebody_else_pushed_are_refused(
    served: Served, transfer: str
) -> None:
    served.transfer = transfer  # a link of one ends the other's, which is then made again
    mine, theirs = served.sampler(), served.sampler()
    requests = _requests(1)
    expected = [r.response_ids for r in _flat(mine.sample(requests))]
    theirs.sample(requests)
    assert [r.response_ids for r in _flat(mine.sample(requests))] == expected  # pushed again

    def push_theirs() -> None:
        theirs.servers.load(served.folder, 0)

    mine.servers._after_load = push_theirs  # at once after each of ours
    with pytest.raises(StaleWeights, match="nobody else gives weights to"):
        push_theirs()
        mine.sample(requests)


@pytest.mark.parametrize("transfer", ["broadcast", "ipc"])
def test_weights_from_memory_are_those_of_a_folder(
    served: Served, transfer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks that cut tensors in pieces; nothing is written, the draws are the same."""
    requests = _requests()
    expected = [r.response_ids for r in _flat(served.sampler().sample(requests))]
    monkeypatch.setitem(vllm_link._CHUNK_BYTES, "cpu", 1000)
    served.transfer, served.scratch = transfer, served.scratch / "unwritten"
    sampler = served.sampler()
    assert [r.response_ids for r in _flat(sampler.sample(requests))] == expected
    assert not list(served.scratch.rglob("*.safetensors"))


@pytest.mark.parametrize("transfer", ["broadcast", "ipc"])
def test_a_push_that_breaks_leaves_a_server_nobody_believes(served: Served, transfer: str) -> None:
    served.transfer = transfer
    sampler, requests = served.sampler(), _requests(1)
    expected = [r.response_ids for r in _flat(sampler.sample(requests))]
    tensors = list(sampler.policy.tensors())

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        reads.append(1)
        yield from tensors[:2]
        if len(reads) % 2 == 0:  # every other one is for the plan
            raise RuntimeError("out of something")
        yield from tensors[2:]

    reads: list[int] = []
    with pytest.raises(StageError, match="out of something"):
        sampler.servers.load(LiveWeights(broken, lambda: 1, 1), 1)
    key = {"Authorization": f"Bearer {served.server.key}"}
    answer = httpx2.get(f"{served.server.url}/headwater/info", headers=key)
    assert answer.json()["version"] == "loading"
    served.version = 2
    assert [r.response_ids for r in _flat(sampler.sample(requests))] == expected


def test_weights_that_cannot_be_read_leave_a_server_nobody_believes(
    served: Served, tmp_path: Path
) -> None:
    sampler = served.sampler()
    requests = _requests(1)
    sampler.sample(requests)
    with pytest.raises(StageError, match="no \\*\\.safetensors there"):
        sampler.servers.load(tmp_path / "nowhere", 1)
    answer = httpx2.get(
        f"{served.server.url}/headwater/info",
        headers={"Authorization": f"Bearer {served.server.key}"},
    )
    assert answer.json()["version"] == "loading"


def test_a_server_that_sleeps_between_rollouts_gives_the_same(served: Served) -> None:
    requests = _requests(2)
    expected = [r.response_ids for r in _flat(served.sampler().sample(requests))]
    sampler = served.sampler(sleeps=True)
    assert [r.response_ids for r in _flat(sampler.sample(requests))] == expected
    key = {"Authorization": f"Bearer {served.server.key}"}
    body = {"token_ids": [5, 6], "sampling_params": {"max_tokens": 1}}
    with pytest.raises(httpx2.ReadTimeout):  # nobody is heard while it sleeps
        httpx2.post(
            f"{served.server.url}/inference/v1/generate", json=body, headers=key, timeout=1.0
        )
    served.version += 1
    assert [r.response_ids for r in _flat(sampler.sample(requests))] == expected
    sampler.servers._wake()


def test_nobody_without_the_key_is_heard(served: Served) -> None:
    url = served.server.url
    for path in ("/headwater/weights", "/pause", "/collective_rpc", "/inference/v1/generate"):
        assert httpx2.post(url + path, json={}).status_code == 401
        wrong = {"Authorization": "Bearer no"}
        assert httpx2.post(url + path, json={}, headers=wrong).status_code == 401
    right = {"Authorization": f"Bearer {served.server.key}"}
    assert httpx2.post(url + "/collective_rpc", json={}, headers=right).status_code == 404
    assert served.server.key not in (served.server._settings.log).read_text(encoding="utf-8")


def test_a_prompt_that_leaves_no_room_is_refused(served: Served) -> None:
    sampler = served.sampler(max_new_tokens=1000)
    with pytest.raises(StageError, match=r"prompt of 30 tokens.*max_model_len"):
        sampler.sample([SampleRequest((5,) * 30, (1,))])


# --- scoring ----------------------------------------------------------------------------------


def _pairs(served: Served) -> tuple[list[Any], Any]:
    rollouts = _flat(served.sampler().sample(_requests(3, 4)))
    pairs = [(r.prompt_ids, r.response_ids) for r in rollouts]
    groups = [PackedGroup(p, (r,), (n,)) for n, (p, r) in enumerate(pairs)]
    return pairs, pack(groups, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("k", [2, 8, VOCAB])
def test_top_k_is_that_of_a_frozen_model(served: Served, k: int) -> None:
    pairs, batch = _pairs(served)
    teacher = VLLMTeacher(served.sampler().servers, served.folder, VOCAB).load()
    found = teacher.top_k(pairs, k)
    expected = FrozenModel(served.model, VOCAB, 0).top_k(batch, k)
    assert torch.cat([f.ids_TK for f in found]).shape == expected.ids_TK.shape
    logprobs = torch.cat([f.logprobs_TK for f in found])
    assert torch.allclose(logprobs, expected.logprobs_TK, atol=NOISE)
    assert (torch.cat([f.ids_TK for f in found]) == expected.ids_TK).float().mean() > 0.99
    again = top_k_logprobs(torch.randn(3, VOCAB), k)  # the same types and order
    assert found[0].ids_TK.dtype == again[0].dtype
    assert (found[0].logprobs_TK.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("transfer", TRANSFERS)
def test_sampled_scores_are_those_of_a_frozen_model(served: Served, transfer: str) -> None:
    served.transfer = transfer
    pairs, batch = _pairs(served)
    teacher = VLLMTeacher(served.sampler().servers, served.folder, VOCAB).load()
    found = torch.cat([f.logprobs_T for f in teacher.sampled(pairs)])
    assert torch.allclose(found, FrozenModel(served.model, VOCAB, 0).logprobs(batch), atol=NOISE)
    with pytest.raises(StageError, match=r"1100 tokens together.*max_model_len"):
        teacher.sampled([((5,) * 1000, (6,) * 100)])
