"""A recipe made ready: its data divided, its stages planned; nothing trained yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from headwater.config.recipe import Recipe
from headwater.tasks.pools import Pools
from headwater.tasks.problems import LabelledProblems
from headwater.types import Label, Problem
from headwater.workflow.graph import NEEDS_VAULT, Graph, StageNode
from headwater.workflow.recorded_data import ReadSource


@dataclass(frozen=True)
class Study:
    """Everything a run needs to know before its first stage.

    contamination: one row for each training problem that was found in an evaluation set.
    sources: what was read, as the recipe names it.
    """

    recipe: Recipe
    graph: Graph
    pools: Pools = field(repr=False)
    evals: Mapping[str, LabelledProblems] = field(repr=False)
    contamination: tuple[Mapping[str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    sources: tuple[ReadSource, ...] = field(default=(), repr=False)

    def problems_of(self, node: StageNode) -> tuple[Problem, ...]:
        """What a stage asks: its evaluation set or pool; nothing for a stage without either."""
        if node.eval_set is not None:
            return self.evals[node.eval_set].problems
        problems = self.pools[node.pool] if node.pool is not None else ()
        if not node.sources:
            return problems
        return tuple(problem for problem in problems if problem.source in node.sources)

    def labels_of(self, node: StageNode) -> tuple[Label, ...] | None:
        """What the stage's label vault holds; None for a stage that may not see a label."""
        if node.kind not in NEEDS_VAULT:
            return None
        if node.eval_set is not None:
            return self.evals[node.eval_set].labels
        return self.pools.labels(node.pool) if node.pool is not None else ()

    def pool_sizes(self) -> dict[str, int]:
        """Number of problems in every pool and evaluation set."""
        sizes = {name: len(self.pools[name]) for name in self.pools.names}
        return sizes | {f"eval:{name}": len(data) for name, data in self.evals.items()}
