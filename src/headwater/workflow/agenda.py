"""What of a graph may run next, what is finished, and why a run ends before its end.

Knows nothing of processes: whoever runs stages asks for the next one and says what came of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heappop, heappush

from headwater.errors import BudgetExhausted, HeadwaterError, Interrupted
from headwater.workflow.graph import Graph
from headwater.workflow.schedule import urgency

#: Whether a running stage is to save itself and stop.
Concerns = Callable[[str], bool]


class Agenda:
    """The stages of one run: a stage is ready once its parents are finished.

    failure: the first error that ends the run; budget: the first budget that was met, after
    which only evaluations start.
    """

    def __init__(self, graph: Graph) -> None:
        self.failure: HeadwaterError | None = None
        self.budget: BudgetExhausted | None = None
        self._graph = graph
        self._urgency = urgency(graph)
        self._finished: set[str] = set()
        self._waits_for: dict[str, int] = {}  # of a wanted stage, parents that are not finished
        self._ready: list[tuple[float, int, str]] = []  # a heap: the most urgent stage first
        self._places = {fingerprint: place for place, fingerprint in enumerate(graph.nodes)}

    def queue(self, wanted: Iterable[str], published: Iterable[str]) -> None:
        """Take up the `wanted` stages that are not `published`; those that wait for nothing are
        ready. Their parents must be in one of both."""
        self._finished |= set(published)
        self._waits_for, self._ready = {}, []
        for fingerprint in wanted:
            if fingerprint not in self._finished:
                parents = self._graph.nodes[fingerprint].parents
                waits_for = sum(parent not in self._finished for parent in parents)
                self._waits_for[fingerprint] = waits_for
                if waits_for == 0:
                    self._push(fingerprint)

    def next(self) -> str | None:
        """The most urgent ready stage, which is then in hand; None where none may start."""
        while self._ready and self.failure is None:
            _, _, fingerprint = heappop(self._ready)
            if self.budget is None or self._graph.nodes[fingerprint].is_evaluation:
                return fingerprint
        return None

    def finish(self, fingerprint: str) -> None:
        """One parent less for its children; a child whose last one it was is ready."""
        self._finished.add(fingerprint)
        for child in self._graph.children[fingerprint]:
            if child in self._waits_for:
                self._waits_for[child] -= 1
                if self._waits_for[child] == 0:
                    self._push(child)

    def again(self, fingerprint: str) -> None:
        """A stage in hand was lost: it is ready once more."""
        self._push(fingerprint)

    def take_error(self, error: HeadwaterError) -> Concerns:
        """A stage ended with this error; returns which of the running ones are to stop.

        A stage that was stopped because a budget was met is no failure.
        """
        if isinstance(error, BudgetExhausted):
            self.budget = self.budget or error
            return lambda fingerprint: not self._graph.nodes[fingerprint].is_evaluation
        if isinstance(error, Interrupted) and self.budget is not None:
            return _none
        return self.fail(error)

    def fail(self, error: HeadwaterError) -> Concerns:
        """Remember the first error that ends the run; returns which running stages are to stop."""
        if self.failure is not None:
            return _none
        self.failure = error
        return _all

    def outcome(self) -> BudgetExhausted | None:
        """Once no stage is in hand: the budget that ended the run early. Raises its failure."""
        if self.failure is not None:
            raise self.failure
        return self.budget

    def interrupted(self, *, at_once: bool) -> Interrupted:
        """The error for Ctrl-C. at_once: the stages in hand did not save themselves."""
        done = sum(fingerprint in self._finished for fingerprint in self._graph.nodes)
        state = f"{done} of {len(self._graph.nodes)} stages are finished"
        cure = "run the same command again to continue"
        if at_once:
            return Interrupted(f"stopped at once: {state}; {cure} from the last checkpoints")
        return Interrupted(f"stopped: {state}; {cure}")

    def _push(self, fingerprint: str) -> None:
        """Ready: among equally urgent stages the first of the graph goes first."""
        entry = (-self._urgency[fingerprint], self._places[fingerprint], fingerprint)
        heappush(self._ready, entry)


def _all(_: str) -> bool:
    return True


def _none(_: str) -> bool:
    return False
