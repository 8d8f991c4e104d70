"""Stages called on their own: pretrain, sft, grpo, warmup, sample_sft, opd.

Each is what a recipe's stage of that name is: the same settings, code, workers, checks, ledger and
resumption, in a run folder of its own. The same call in the same folder continues, or returns what
is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.api.records import StageRecord
from headwater.errors import InputError

if TYPE_CHECKING:
    from headwater.tasks.given import Problems
    from headwater.tasks.problems import LabelledProblems
    from headwater.workflow.callbacks import Callback

#: A folder, a source as in a recipe (hf:ID, tiny:NAME, ...), what a stage returned, or a
#: transformers model with its tokenizer.
Model = str | Path | StageRecord | tuple[Any, Any]
#: A verifier's name as in a recipe, or functions `f(prompts, completions, **columns) -> list`.
Reward = str | Callable[..., Any] | Sequence[Callable[..., Any]]

_SOURCE_KINDS = ("hf:", "gguf:", "tiny:", "prune:", "smollm2-135m")
_RECIPE_KEYS = ("compute", "budget", "guards")
_FUNCTION_SECONDS = 60.0


def grpo(
    model: Model,
    problems: Problems,
    reward: Reward = "math",
    *,
    reward_weights: Sequence[float] | None = None,
    reward_timeout_seconds: float | None = None,
    prompt: str | None = None,
    columns: Mapping[str, str] | None = None,
    out: str | Path = "runs/grpo",
    seed: int = 0,
    callbacks: Sequence[Callback] = (),
    quiet: bool = False,
    **settings: Any,
) -> StageRecord:
    """Train a model on rewards, by group-relative policy optimisation.

    problems: rows with a prompt (text or chat messages) and whatever columns the reward reads; a
    file, a hub dataset or another source; a `datasets.Dataset`; or a list of prompts. reward: a
    verifier's name ("math", "reward:file.py:function", ...), a function, or several, of which
    `reward_weights` (1 each) makes a sum. A function object runs in a thread of this process; a
    named one in killable workers. reward_timeout_seconds: of one call (60 for a function object, 5
    otherwise). prompt: the form answers are asked for ("bare" with functions, else "boxed").
    columns: our field -> theirs. out: the run folder. callbacks: told every `Event`.
    settings: those of `stages.grpo` in a recipe (steps, lr, group_size, sampling, kl, ...), and
    a recipe's compute, budget and guards.

    Returns the trained model's record. Raises InputError before anything is trained, StageError
    where the stage fails, BudgetExhausted, and Interrupted after Ctrl-C or a callback that
    returned True; the same call then continues.
    """
    from headwater.verify.verifiers import reads_rows

    verifier = _verifier(reward, reward_weights)
    data = _problems(problems, columns, keep_rows=reads_rows(verifier))
    if not isinstance(reward, str):
        _require_columns(reward, data)
        reward_timeout_seconds = reward_timeout_seconds or _FUNCTION_SECONDS
    limit = {"verifier_timeout_seconds": reward_timeout_seconds}
    return _run(
        "grpo",
        model,
        settings,
        out,
        problems=data,
        verifier=verifier,
        prompt=prompt or ("bare" if reads_rows(verifier) else "boxed"),
        task={key: float(value) for key, value in limit.items() if value is not None},
        seed=seed,
        callbacks=callbacks,
        quiet=quiet,
    )


def sft(
    model: Model,
    problems: Problems,
    *,
    prompt: str = "bare",
    columns: Mapping[str, str] | None = None,
    out: str | Path = "runs/sft",
    seed: int = 0,
    callbacks: Sequence[Callback] = (),
    quiet: bool = False,
    **settings: Any,
) -> StageRecord:
    """Train a model on worked solutions, by cross-entropy on their tokens.

    problems: rows of {messages}, {prompt, completion} or {problem, solution}, as text or chat; of a
    conversation the last answer is learnt. settings: those of `stages.sft` (epochs, batch_size, lr,
    ...), and a recipe's compute, budget and guards. Everything else, and what is raised: as of
    `grpo`.
    """
    data = _problems(problems, columns)
    return _run(
        "sft",
        model,
        settings,
        out,
        problems=data,
        prompt=prompt,
        seed=seed,
        callbacks=callbacks,
        quiet=quiet,
    )


def opd(
    student: Model,
    teacher: Model,
    problems: Problems,
    *,
    prompt: str = "bare",
    columns: Mapping[str, str] | None = None,
    out: str | Path = "runs/opd",
    seed: int = 0,
    callbacks: Sequence[Callback] = (),
    quiet: bool = False,
    **settings: Any,
) -> StageRecord:
    """Distil a teacher into a student on the student's own rollouts (arXiv:2605.12483, Eq. 4).

    problems: prompts; answers are not read. Both models must have one vocabulary. settings: those
    of `stages.opd` (steps, kl, targets, sampling, ...), and a recipe's compute, budget and guards.
    Everything else, and what is raised: as of `grpo`.
    """
    given = (prompt, columns, out, seed, callbacks, quiet)
    return _distil("opd", student, teacher, problems, settings, *given)


def warmup(
    student: Model,
    teacher: Model,
    problems: Problems,
    *,
    prompt: str = "bare",
    columns: Mapping[str, str] | None = None,
    out: str | Path = "runs/warmup",
    seed: int = 0,
    callbacks: Sequence[Callback] = (),
    quiet: bool = False,
    **settings: Any,
) -> StageRecord:
    """Distil a teacher into a student on the teacher's rollouts, with its distributions (Eq. 5).

    The rollouts are drawn first, as a stage of their own, and kept in `out`: another warmup there,
    of another student or with other settings of training, reads them again. settings: those of
    `stages.warmup` (epochs, teacher_rollouts_per_prompt, targets, sampling, ...). Everything else:
    as of `opd`.
    """
    given = (prompt, columns, out, seed, callbacks, quiet)
    return _distil("warmup", student, teacher, problems, settings, *given)


def sample_sft(
    student: Model,
    teacher: Model,
    problems: Problems,
    *,
    prompt: str = "bare",
    columns: Mapping[str, str] | None = None,
    out: str | Path = "runs/sample_sft",
    seed: int = 0,
    callbacks: Sequence[Callback] = (),
    quiet: bool = False,
    **settings: Any,
) -> StageRecord:
    """Train a student on a teacher's samples as hard labels: the baseline of `warmup`.

    settings: those of `stages.sample_sft`. Everything else: as of `warmup`.
    """
    given = (prompt, columns, out, seed, callbacks, quiet)
    return _distil("sample_sft", student, teacher, problems, settings, *given)


def pretrain(
    model: str,
    task: str = "task:arithmetic",
    *,
    out: str | Path = "runs/pretrain",
    seed: int = 0,
    callbacks: Sequence[Callback] = (),
    quiet: bool = False,
    **settings: Any,
) -> StageRecord:
    """Make an embedded model ("tiny:student") from scratch on traces of an embedded task.

    task: `task:arithmetic?option=value&...`. settings: those of `stages.pretrain`. Everything else,
    and what is raised: as of `grpo`.
    """
    return _run(
        "pretrain", model, settings, out, source=task, seed=seed, callbacks=callbacks, quiet=quiet
    )


def _distil(
    kind: str,
    student: Model,
    teacher: Model,
    problems: Problems,
    settings: Mapping[str, Any],
    prompt: str,
    columns: Mapping[str, str] | None,
    out: str | Path,
    seed: int,
    callbacks: Sequence[Callback],
    quiet: bool,
) -> StageRecord:
    data = _problems(problems, columns, keep_rows=True)
    return _run(
        kind,
        student,
        settings,
        out,
        teacher=_source(teacher, Path(out)),
        problems=data,
        prompt=prompt,
        seed=seed,
        callbacks=callbacks,
        quiet=quiet,
    )


def _run(
    kind: str,
    model: Model,
    settings: Mapping[str, Any],
    out: str | Path,
    *,
    callbacks: Sequence[Callback],
    quiet: bool,
    **fields: Any,
) -> StageRecord:
    """Run a stage of `fields` as a study of its own."""
    from headwater.workflow.callbacks import with_callbacks
    from headwater.workflow.lone_stage import LoneStage, study_of
    from headwater.workflow.progress import make_view
    from headwater.workflow.run import run_study

    own = {key: value for key, value in settings.items() if key not in _RECIPE_KEYS}
    rest = {key: value for key, value in settings.items() if key in _RECIPE_KEYS}
    stage = LoneStage(kind, _source(model, Path(out)), own, recipe=rest, **fields)
    study, end = study_of(stage)
    view = with_callbacks(make_view(study.graph, quiet=quiet), callbacks)
    outcome = run_study(study, Path(out), view=view)
    if outcome.stopped is not None:
        raise outcome.stopped
    return StageRecord.of(outcome, end)


def _problems(
    problems: Problems, columns: Mapping[str, str] | None, *, keep_rows: bool = False
) -> LabelledProblems:
    from headwater.tasks.given import given_problems

    return given_problems(problems, columns, keep_rows=keep_rows)


def _source(model: Model, out: Path) -> str:
    """A model as a recipe names it. Raises InputError for what is none."""
    if isinstance(model, StageRecord):
        return f"hf:{model.model.resolve()}"
    if isinstance(model, tuple) and len(model) == 2:
        from headwater.models.given import save_given

        return f"hf:{save_given(*model, out / 'given').resolve()}"
    if isinstance(model, str | Path):
        path = Path(model).expanduser()
        if path.is_dir():
            return f"hf:{path.resolve()}"
        named = str(model)
        return named if named.startswith(_SOURCE_KINDS) else f"hf:{named}"
    raise InputError(
        f"model is a {type(model).__name__}; expected a folder, a source such as hf:ID, what "
        "another stage returned, or (model, tokenizer): a tokenizer is not to be had of a model"
    )


def _verifier(reward: Reward, weights: Sequence[float] | None) -> str:
    """The verifier of a recipe; function objects are offered to workers."""
    from headwater.verify.called_back import offer
    from headwater.verify.weighted import WeightedRewards

    functions = None if isinstance(reward, str) or callable(reward) else list(reward)
    if weights is not None and len(weights) != len(functions or ()):
        raise InputError(
            f"{len(weights)} reward_weights for {len(functions or ())} listed reward functions; "
            "give reward as a list of functions, with a weight for each"
        )
    if isinstance(reward, str):
        return reward
    if functions is not None and not (functions and all(map(callable, functions))):
        raise InputError(
            f"reward is a list of {', '.join(type(f).__name__ for f in functions) or 'nothing'}; "
            "give functions, or one verifier's name"
        )
    try:
        if functions is None:
            assert callable(reward)
            return offer(reward, _name(reward))
        several = functions[0] if len(functions) == 1 else None
        if several is not None and weights in (None, [1.0], (1.0,)):
            return offer(several, _name(several))
        return offer(WeightedRewards(functions, weights), "-".join(map(_name, functions)))
    except TypeError as error:
        raise InputError(f"reward: {error}") from None


def _name(function: Callable[..., Any]) -> str:
    """A function's name as a verifier may have it."""
    name = getattr(function, "__name__", type(function).__name__)
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def _require_columns(
    reward: Callable[..., Any] | Sequence[Callable[..., Any]], data: LabelledProblems
) -> None:
    """Refuse a function that asks for a column which the problems do not have."""
    from headwater.verify.reward_calls import needed_columns

    row = data.labels[0].row or {}
    for function in [reward] if callable(reward) else reward:
        missing = needed_columns(function) - row.keys()
        if missing:
            raise InputError(
                f"reward {_name(function)} needs {', '.join(sorted(missing))}, but the problems "
                f"have {', '.join(row)}; add the columns, or give the parameters a default"
            )
