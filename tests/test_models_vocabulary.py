"""Tokens whose ids have gaps are all there: counted, sampled and trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3ForCausalLM

from headwater.config.compute import Compute
from headwater.config.evaluation import Evaluation
from headwater.config.stages import Sampling
from headwater.models.loading import load_model
from headwater.models.saving import save_model
from headwater.models.tiny import tiny_config, tiny_tokenizer
from headwater.models.vocabulary import usable_vocabulary
from headwater.stages.job import StageJob
from headwater.stages.rollouts import RolloutSource
from headwater.types import Problem


@pytest.fixture(scope="module")
def gapped(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """The embedded models' 63 tokens, the last of them under the id 70."""
    folder = tmp_path_factory.mktemp("gapped")
    tiny_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    assert values["model"]["vocab"]["}"] == 62
    values["model"]["vocab"]["}"] = 70
    path.write_text(json.dumps(values))
    return PreTrainedTokenizerFast.from_pretrained(folder)


def test_the_largest_id_counts_not_the_number_of_tokens(gapped: PreTrainedTokenizerBase) -> None:
    assert usable_vocabulary(tiny_tokenizer()) == len(tiny_tokenizer()) == 63
    assert (usable_vocabulary(gapped), len(gapped)) == (71, 63)


def test_the_token_behind_a_gap_is_sampled(gapped: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    config = tiny_config("tiny:student")
    config.vocab_size = 96
    torch.manual_seed(0)
    save_model(Qwen3ForCausalLM(config), gapped, tmp_path / "model")
    problem = Problem("p", "1+1=?", "t")
    job = StageJob(
        kind="evaluate", config=Evaluation(), fingerprint="f", seed=0, stream="evaluate",
        problems=(problem,), prompt_form="bare", sampling=Sampling(max_new_tokens=1),
        compute=Compute(), output_dir=tmp_path, checkpoint_dir=tmp_path,
    )  # fmt: skip
    model = load_model(tmp_path / "model", dtype=torch.float32, attn_implementation="headwater")
    (group,) = RolloutSource(job, model, gapped, None).draw([problem], 512, 0)
    drawn = {token for rollout in group.rollouts for token in rollout.response_ids}
    assert max(drawn) == 70, "no padding row, and the last token too"
