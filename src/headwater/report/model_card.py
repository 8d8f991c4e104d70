"""The README.md of an exported model: what it is, how it was made, what it cost, how good it is.

Rendered from a run's records alone. Its front matter is what the Hugging Face hub reads.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from headwater import __version__
from headwater.config.recipe import ModelSpec, Recipe
from headwater.models.source_names import SMOLLM2, SourceKind, describe_source
from headwater.report import quantities
from headwater.report.results import Results, Row
from headwater.tasks.benchmarks import BENCHMARKS
from headwater.tasks.hub import hub_parts
from headwater.tasks.prompts import prompt_form
from headwater.visible import one_line
from headwater.workflow.graph import Graph, Role, StageNode
from headwater.workflow.record import RunRecord

CARD_FILE = "README.md"
PAPER = "2605.12483"
UNKNOWN_LICENCE = "unknown"

_KINDS: Mapping[str, str] = {
    "pretrain": "pretrained from nothing on traces of the task",
    "sft": "trained on worked solutions (cross-entropy)",
    "grpo": "reinforcement learning (GRPO) on the labels of checkable problems",
    "teacher_rollouts": "sampled answers, kept with its distribution over tokens",
    "warmup": "forward KL to the teacher on the teacher's own answers",
    "opd": "on-policy distillation: the student's own answers, each token scored by the teacher",
    "outside_rollouts": "answers of a teacher from outside the study, kept",
    "mixed": "GRPO on labels and on-policy distillation at once, mixed by lambda",
    "sample_sft": "trained on the teacher's answers (cross-entropy)",
    "source": "fetched",
}
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~!])")
#: Settings that say nothing of a stage beyond its kind, or belong to the machine.
_UNSAID = frozenset({"kind", "micro_batch_tokens", "checkpoint_seconds"})


@dataclass(frozen=True, slots=True)
class CardSubject:
    """The model a card is about: an arm's at one seed, in one role, and how it is published.

    fingerprint: of the stage that made it. format: hf, gguf or adapter; file: the name of the
    GGUF file. dtype: of the weights as published. repository: where it is pushed to, if it is.
    """

    arm: str
    seed: int
    role: Role
    fingerprint: str
    dtype: str
    format: str = "hf"
    file: str | None = None
    repository: str | None = None


@dataclass(frozen=True, slots=True)
class _Stage:
    """A line of the method: what was done to which model ("base NAME", "teacher", "student")."""

    fingerprint: str
    model: str
    words: str
    pool: str | None
    parents: tuple[str, ...]
    settings: str


def render_card(
    subject: CardSubject, record: RunRecord, recipe: Recipe, results: Results | None
) -> str:
    """The card as text. results: of the run, None where it has none yet."""
    graph = record.graph
    source = _source(recipe.models, graph.nodes[subject.fingerprint].model_name)
    rows = () if results is None else _rows(subject, graph, results)
    licence = base_licence(source)
    arms = {subject.arm: record.titles.get(subject.arm, subject.arm)}
    context = {
        "subject": subject,
        "record": record,
        "recipe": recipe,
        "front_matter": _front_matter(subject, record, recipe, rows, source, licence),
        "title": arms[subject.arm],
        "source": source,
        "licence": licence,
        "stages": _stages(graph, subject),
        "rows": rows,
        "baselines": _baselines(graph, subject, results),
        "differences": [
            one
            for one in (() if results is None else results.differences)
            if rows and subject.arm in (one.better, one.than) and subject.role == rows[0].evaluates
        ],
        "titles": {} if results is None else results.titles(),
        "spent": rows[0].spent if rows else {},
        "removed": sum(row["action"] == "removed" for row in record.contamination),
        "kept": sum(row["action"] == "kept" for row in record.contamination),
        "sampling": recipe.evaluation.sampling or recipe.sampling,
        "instruction": prompt_form(recipe.task.prompt).instruction,
        "counters": quantities.COUNTER_NAMES,
        "paper": PAPER,
        "version": __version__,
        "embedded": describe_source(source).kind is SourceKind.TINY,
    }
    environment = Environment(  # noqa: S701 - Markdown; what comes from elsewhere goes through `md`
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {
        "md": _markdown,
        "code": _code,
        "sh": lambda text: shlex.quote(one_line(str(text))),
        "percent": quantities.percent,
        "points": quantities.points,
        "p_value": quantities.p_value,
        "amount": lambda value, counter: quantities.spent(counter, value),
    }
    text = resources.files("headwater.report").joinpath("model_card.md").read_text("utf-8")
    return environment.from_string(text).render(context)


def base_licence(source: str) -> str:
    """The licence a base model's own files give, as the hub spells it; "unknown" where they do not.

    Read from the front matter of a local folder's README.md. Embedded models are headwater's own.

    >>> base_licence("tiny:student"), base_licence("hf:Qwen/Qwen3-0.6B")
    ('apache-2.0', 'unknown')
    """
    described = describe_source(source)
    if described.kind in (SourceKind.TINY, SourceKind.SMOLLM2):
        return "apache-2.0"
    if described.kind is SourceKind.HF:
        card = Path(described.target).expanduser() / CARD_FILE
        found = _FRONT_MATTER.match(card.read_text("utf-8", "replace")) if card.is_file() else None
        try:
            values = yaml.safe_load(found.group(1)) if found else None
        except yaml.YAMLError:
            values = None
        licence = values.get("license") if isinstance(values, dict) else None
        if isinstance(licence, str) and re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
            return licence
    return UNKNOWN_LICENCE


def _front_matter(
    subject: CardSubject,
    record: RunRecord,
    recipe: Recipe,
    rows: Sequence[Row],
    source: str,
    licence: str,
) -> str:
    base = _hub_id(source)
    values: dict[str, Any] = {
        "license": licence,
        "pipeline_tag": "text-generation",
        "library_name": "transformers" if subject.file is None else "gguf",
        "tags": ["headwater", f"arxiv:{PAPER}", *_tags(record.graph, subject.fingerprint)],
    }
    if base is not None:
        values["base_model"] = base
    hub_data = dict.fromkeys(
        hub_parts(one)[0] for one in (recipe.task.train, recipe.task.worked or "") if _is_hub(one)
    )
    if hub_data:
        values["datasets"] = list(hub_data)
    if rows:
        values["metrics"] = ["accuracy"]
        name = f"{record.name}-{subject.arm}"
        values["model-index"] = [
            {"name": name, "results": [_result(row, recipe) for row in rows]},
        ]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip("\n")


def _result(row: Row, recipe: Recipe) -> dict[str, Any]:
    source = recipe.task.eval.get(row.eval_set, row.eval_set)
    known = BENCHMARKS.get(source)
    hub = known.source if known is not None else source
    return {
        "task": {"type": "text-generation"},
        "dataset": {
            "name": row.eval_set if known is None else known.title,
            "type": hub_parts(hub)[0] if _is_hub(hub) else row.eval_set,
        },
        "metrics": [
            {
                "type": "accuracy",
                "name": f"avg@{row.attempts}",
                "value": round(100 * row.avg_at_k, 2),
                "verified": False,
            }
        ],
    }


def _rows(subject: CardSubject, graph: Graph, results: Results) -> tuple[Row, ...]:
    """The rows about this model: those whose stages are its own, over the seeds evaluated."""
    plans = [plan for plan in graph.arms if plan.arm == subject.arm]
    ends = [plan.teacher if subject.role == "teacher" else plan.student for plan in plans]
    own = set(graph.closure([end for end in ends if end is not None]))
    found: dict[str, Row] = {}
    for row in results.rows:
        if subject.fingerprint in row.stages and set(row.stages) <= own:
            found.setdefault(row.eval_set, row)
    return tuple(found.values())


def _baselines(graph: Graph, subject: CardSubject, results: Results | None) -> dict[str, Row]:
    """Evaluation set -> the row of the same base model before any arm trained it."""
    name = graph.nodes[subject.fingerprint].model_name
    rows = () if results is None else results.rows
    return {
        row.eval_set: row
        for row in rows
        if not row.chain and all(graph.nodes[one].model_name == name for one in row.stages)
    }


def _stages(graph: Graph, subject: CardSubject) -> list[_Stage]:
    """Every stage the model comes from, parents first; those on its own line have its role."""
    own = set()
    ancestor: str | None = subject.fingerprint
    while ancestor is not None:
        own.add(ancestor)
        ancestor = graph.nodes[ancestor].model
    nodes = [graph.nodes[one] for one in graph.closure([subject.fingerprint])]
    return [_stage(node, subject.role if node.fingerprint in own else "teacher") for node in nodes]


def _stage(node: StageNode, role: Role) -> _Stage:
    settings = {
        name: value
        for name, value in node.config.items()
        if value not in (None, [], {}) and name not in _UNSAID
    }
    words = _KINDS.get(node.kind, node.kind)
    if node.kind == "source":
        words = "fetched" if node.model is None else "cut from its parent"
    return _Stage(
        node.fingerprint,
        f"base {node.model_name}" if node.role == "base" else role,
        words,
        node.pool,
        node.parents,
        ", ".join(f"{name}={_plain(value)}" for name, value in settings.items()),
    )


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _tags(graph: Graph, fingerprint: str) -> list[str]:
    kinds = {graph.nodes[one].kind for one in graph.closure([fingerprint])}
    if "mixed" in kinds:
        kinds |= {"grpo", "opd"}
    names = {"grpo": "grpo", "opd": "on-policy-distillation", "sft": "sft"}
    return [tag for kind, tag in names.items() if kind in kinds]


def _source(models: Mapping[str, ModelSpec], name: str) -> str:
    """The source of a model, or of the one it was cut from."""
    source = models[name].source
    parent = describe_source(source).parent
    return source if parent is None else _source(models, parent)


def _hub_id(source: str) -> str | None:
    if source == SMOLLM2:
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    described = describe_source(source)
    local = Path(described.target).expanduser().is_dir() or described.target[:1] in "./~"
    return described.target if described.kind is SourceKind.HF and not local else None


def _is_hub(source: str) -> bool:
    return source.startswith("hf:")


def _markdown(text: object) -> str:
    """Text of others on one line, in which no Markdown and no HTML works."""
    return _MARKDOWN.sub(r"\\\1", one_line(str(text), 500))


def _code(text: object) -> str:
    """The same as code: backticks and bars would end it, or the table's cell."""
    return f"`{one_line(str(text), 2_000).replace('`', chr(39)).replace('|', '/')}`"
