"""Arms made equal on an account: what `match` in a contrast asks for, by construction.

Two arms with the same labels may have graded different numbers of rollouts. For a contrast with
`match: ACCOUNT` the arm `than` is given a sibling whose last stage that spends on the account is
longer or shorter, until both sides spend alike; where they do already, there is nothing to do.
Amounts are the plan's: exact, except for tokens, where every response counts at its limit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from headwater.config.arms import Arm, ChainItem
from headwater.config.claims import Account, Contrast
from headwater.config.recipe import Recipe
from headwater.config.stages import READS_LABELS, GRPOStage, MixedStage
from headwater.errors import InputError
from headwater.workflow.graph import ArmPlan, StageNode
from headwater.workflow.routes import line
from headwater.workflow.stage_work import StageWork, work_of
from headwater.workflow.study import Study

#: Two arms count as equal when they differ by at most this share: steps are whole.
TOLERANCE = 0.02

_AMOUNTS: Mapping[str, Callable[[StageWork], int]] = {
    "verifier_calls": lambda work: work.verifier_calls,
    "generated_tokens": lambda work: work.generated_tokens,
    "updates": lambda work: work.updates,
}


@dataclass(frozen=True, slots=True)
class Planned:
    """What an arm is planned to spend after its bases, by account."""

    labels: int
    verifier_calls: int
    generated_tokens: int
    updates: int


def planned(study: Study, plan: ArmPlan) -> Planned:
    """The accounts of one arm at one seed, shared stages included."""
    nodes = _own_nodes(study, plan)
    works = [work_of(study, node) for node in nodes]
    readers = (node for node in nodes if node.kind in READS_LABELS)
    return Planned(
        labels=len({problem.id for node in readers for problem in study.problems_of(node)}),
        **{name: sum(amount(work) for work in works) for name, amount in _AMOUNTS.items()},
    )


def match_arms(study: Study) -> Recipe:
    """The recipe with an arm for every `match` that asks for one; the same where none does.

    study: any study of the recipe whose graph has every arm. Raises InputError for an arm that
    cannot be made to spend on the account, and for steps that do not come out even.
    """
    recipe = study.recipe
    plans: dict[str, ArmPlan] = {}
    for plan in study.graph.arms:
        plans.setdefault(plan.arm, plan)
    arms = dict(recipe.arms)
    found: dict[Contrast, Contrast] = {}
    for contrast in recipe.comparisons:
        if contrast.match is None:
            continue
        better, than = (plans[name] for name in (contrast.better, contrast.than))
        name, arm = _matched(study, contrast, contrast.match, better, than)
        arms[name] = arm
        found[contrast] = contrast.model_copy(update={"than": name})
    if len(arms) == len(recipe.arms):
        return recipe
    return recipe.model_copy(
        update={
            "arms": arms,
            "contrasts": tuple(found.get(one, one) for one in recipe.contrasts),
            "hypotheses": {
                name: one.model_copy(
                    update={"claims": tuple(found.get(claim, claim) for claim in one.claims)}
                )
                for name, one in recipe.hypotheses.items()
            },
        }
    )


def _matched(
    study: Study, contrast: Contrast, account: Account, better: ArmPlan, than: ArmPlan
) -> tuple[str, Arm]:
    """Name and arm that stand for `than`: its own, or a sibling's."""
    arm = study.recipe.arms[than.arm]
    wanted, has = (getattr(planned(study, plan), account) for plan in (better, than))
    if wanted == has:
        return than.arm, arm
    where = f"match: {account} of {contrast.than} to {contrast.better}"
    if wanted == 0:
        raise InputError(
            f"{where}: {contrast.better} spends none; leave out match, or contrast other arms"
        )
    if account == "labels":
        chains = _with_labels(study, than, arm, wanted, where)
    else:
        chains = _with_steps(study, than, arm, account, wanted - has, where)
    title = (
        f"{arm.title or than.arm}, {account.replace('_', ' ')} as "
        f"{study.recipe.arms[better.arm].title or better.arm}"
    )
    sibling = arm.model_copy(update={"title": title, **chains})
    return f"{than.arm}.{account}-of-{better.arm}", sibling


def _with_steps(
    study: Study, plan: ArmPlan, arm: Arm, account: str, missing: int, where: str
) -> dict[str, tuple[ChainItem, ...]]:
    """The chain whose last stage spending on the account makes up for what is missing."""
    role: str = plan.evaluates
    chain: Sequence[ChainItem] = (arm.student if role == "student" else arm.teacher) or ()
    nodes, _ = line(study.graph, plan.endpoint)
    for index in reversed(range(len(chain))):
        spent = _AMOUNTS[account](work_of(study, nodes[index]))
        if spent == 0:
            continue
        steps = work_of(study, nodes[index]).updates
        settings = nodes[index].settings()
        if isinstance(settings, GRPOStage | MixedStage):
            steps //= settings.updates_per_batch
        each = spent / steps
        new = steps + round(missing / each)
        off = abs(missing - (new - steps) * each)
        if new < 1 or off > TOLERANCE * (spent + missing):
            raise InputError(
                f"{where}: its {chain[index].kind} would need {steps + missing / each:.2f} steps "
                f"instead of {steps}; choose steps, prompts_per_step and group_size that come out "
                "even, or leave out match"
            )
        item = chain[index]
        changed = item.model_copy(update={"overrides": {**item.overrides, "steps": new}})
        return {role: (*chain[:index], changed, *chain[index + 1 :])}
    raise InputError(f"{where}: none of its own stages spends any; leave out match")


def _with_labels(
    study: Study, plan: ArmPlan, arm: Arm, wanted: int, where: str
) -> dict[str, tuple[ChainItem, ...]]:
    """The chain whose one label-reading stage reads the first `wanted` of its pool."""
    chains: dict[str, tuple[ChainItem, ...]] = {}
    readers = []
    for role, (_, chain) in arm.models.items():
        for index, item in enumerate(chain):
            if item.kind in READS_LABELS:
                readers.append((role, chain, index))
    if len(readers) != 1:
        raise InputError(
            f"{where}: {len(readers)} of its stages read labels and one is needed; name pools of "
            "that size in an arm of your own"
        )
    role, chain, index = readers[0]
    if role.startswith("teachers."):
        raise InputError(
            f"{where}: the one stage that reads labels is {role}'s, expected the teacher's or the "
            "student's; name a pool of that size in an arm of your own"
        )
    pool = (study.recipe.pool(chain[index]) or "labels").partition(":")[0]
    if wanted > len(study.pools[pool]):
        raise InputError(f"{where}: needs {wanted} labels, but pool {pool!r} has fewer")
    item = chain[index].model_copy(update={"pool": f"{pool}:{wanted}"})
    chains[role] = (*chain[:index], item, *chain[index + 1 :])
    return chains


def _own_nodes(study: Study, plan: ArmPlan) -> list[StageNode]:
    """Every training stage of an arm after its bases."""
    nodes = (study.graph.nodes[one] for one in study.graph.arm_stages(plan))
    return [node for node in nodes if node.role != "base"]
