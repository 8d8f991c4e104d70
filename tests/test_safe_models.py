"""Model folders from a stranger: nothing in them runs, fetches, or is read from elsewhere."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from headwater.errors import InputError
from headwater.models.loading import load_model, load_tokenizer
from headwater.models.source_names import require_available
from headwater.models.sources import materialise
from headwater.tasks import chat_template
from headwater.tasks.prompts import encode_prompt, encode_prompts
from headwater.types import Problem

PROBLEM = Problem("p1", "1+1=", "test")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "model"
    materialise("tiny:student", path, seed=1)
    return path


@pytest.fixture
def model(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


class _Touches:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


def edit(path: Path, **values: object) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(found | values), encoding="utf-8")


def refused(folder: Path, tmp_path: Path, match: str) -> None:
    """As a source and as an artifact of a run."""
    with pytest.raises(InputError, match=match):
        materialise(f"hf:{folder}", tmp_path / "out")
    with pytest.raises(InputError, match=match):
        load_model(folder, dtype=torch.float32)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "m.pkl"])
def test_pickled_weights_are_refused_unread(model: Path, tmp_path: Path, name: str) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(_Touches(tmp_path / "owned")))
    refused(model, tmp_path, r"none in safetensors: a pickle can run any code .*; download the")
    with pytest.raises(InputError, match="none in safetensors"):
        require_available(f"hf:{model}")  # before anything is fetched or trained
    assert not (tmp_path / "owned").exists()


def test_a_pickle_beside_safetensors_is_not_read(model: Path, tmp_path: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(_Touches(tmp_path / "owned")))
    load_model(model, dtype=torch.float32)
    materialise(f"hf:{model}", tmp_path / "out")
    assert not (tmp_path / "owned").exists()


def write_own_code(model: Path, owned: Path) -> None:
    (model / "stranger.py").write_text(
        f"import os\nos.mkdir({str(owned)!r})\n"
        "from transformers import PretrainedConfig, Qwen3ForCausalLM\n"
        "class Config(PretrainedConfig):\n    model_type = 'stranger'\n"
        "class Model(Qwen3ForCausalLM):\n    config_class = Config\n",
        encoding="utf-8",
    )


def test_code_of_a_model_that_transformers_has_is_ignored(model: Path, tmp_path: Path) -> None:
    write_own_code(model, tmp_path / "owned")
    own = {"AutoConfig": "stranger.Config", "AutoModelForCausalLM": "stranger.Model"}
    edit(model / "config.json", auto_map=own)
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["stranger.Config", None]})
    load_model(model, dtype=torch.float32)
    load_tokenizer(model)
    assert not (tmp_path / "owned").exists()


def test_a_model_that_is_its_own_code_is_refused_with_the_reason(
    model: Path, tmp_path: Path
) -> None:
    write_own_code(model, tmp_path / "owned")
    own = {"AutoConfig": "stranger.Config", "AutoModelForCausalLM": "stranger.Model"}
    edit(model / "config.json", model_type="stranger", architectures=["Model"], auto_map=own)
    refused(model, tmp_path, r"code of its own \(auto_map\), which headwater never runs")
    assert not (tmp_path / "owned").exists()


def test_an_adapter_is_refused(model: Path, tmp_path: Path) -> None:
    base = {"base_model_name_or_path": "/somewhere/else", "peft_type": "LORA"}
    (model / "adapter_config.json").write_text(json.dumps(base), encoding="utf-8")
    refused(model, tmp_path, "holds an adapter .*; merge the adapter")


@pytest.mark.parametrize("name", ["../../weights.safetensors", "/tmp/weights.safetensors", 7])
def test_an_index_that_leads_out_of_the_folder_is_refused(
    model: Path, tmp_path: Path, name: object
) -> None:
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    path = model / "model.safetensors.index.json"
    path.write_text(json.dumps(index), encoding="utf-8")
    refused(model, tmp_path, "for weights: expected files of its own folder")


def test_kernels_and_endless_layers_of_a_config_are_refused(model: Path, tmp_path: Path) -> None:
    edit(model / "config.json", attn_implementation="stranger/kernel")
    refused(model, tmp_path, "kernels named by a model are code")
    edit(model / "config.json", attn_implementation="sdpa", num_hidden_layers=10**9)
    refused(model, tmp_path, "expected at most 10,000")


# --- chat templates ------------------------------------------------------------------------------

HOSTILE_TEMPLATES = {
    "modules of a global": "{{ cycler.__init__.__globals__.os.mkdir(PATH) }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a message's class": "{{ messages.__class__.__base__.__subclasses__() }}",
    "attributes by filter": "{{ (messages | attr('__class__')).__mro__ }}",
    "format of attributes": "{{ '{0.__class__.__mro__}'.format(messages).x.y }}",
    "raise_exception's globals": "{{ raise_exception.__globals__['os'].mkdir(PATH) }}",
    "changes a list": "{{ messages.append(1) }}",
    "imports": "{% import 'os' as os %}{{ os.mkdir(PATH) }}",
    "a range without end": "{% for i in range(10 ** 12) %}x{% endfor %}",
    "no template": "{% for",
}


@pytest.mark.parametrize("template", HOSTILE_TEMPLATES.values(), ids=HOSTILE_TEMPLATES)
def test_a_hostile_chat_template_reaches_nothing(
    model: Path, tmp_path: Path, template: str
) -> None:
    owned = tmp_path / "owned"
    template = template.replace("PATH", repr(str(owned)))
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    tokenizer = load_tokenizer(model)
    with pytest.raises(InputError, match=r"the chat template of .* failed: .*; mend"):
        encode_prompt(tokenizer, PROBLEM, "bare")
    assert not owned.exists()


def test_a_chat_template_that_does_not_end_is_stopped(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (model / "chat_template.jinja").write_text(loop, encoding="utf-8")
    tokenizer = load_tokenizer(model)
    monkeypatch.setattr(chat_template, "LIMIT_SECONDS", 0.3)
    for encode in (
        lambda: encode_prompt(tokenizer, PROBLEM, "bare"),
        lambda: encode_prompts(tokenizer, [PROBLEM, PROBLEM], "bare"),
    ):
        with pytest.raises(InputError, match=r"did not end within 0\.3 s: expected one that"):
            encode()


def test_an_ordinary_template_is_rendered_and_leaves_no_alarm(sound: Path) -> None:
    import signal

    before = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert encode_prompt(load_tokenizer(sound), PROBLEM, "bare")
    after = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert after == before
