"""The label vault: the one place that knows gold answers during training.

Whoever wants to know whether a completion is right asks here and is charged first; nobody can
ask for an answer itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NoReturn, Protocol

from headwater.errors import BudgetExhausted, InputError, StageError
from headwater.tasks.prompts import render_solution
from headwater.types import Label
from headwater.verify.grading import Grade, Verifier

if TYPE_CHECKING:
    from headwater.ledger.spending import SpendingAccount


class VaultSealed(StageError):
    """Something tried to copy or pickle a label vault."""


class LabelsExhausted(BudgetExhausted):
    """The label budget ended inside a request; `grades` or `solutions` is what it still paid."""

    def __init__(
        self, message: str, grades: Sequence[Grade] = (), solutions: Sequence[str] = ()
    ) -> None:
        super().__init__(message)
        self.grades = list(grades)
        self.solutions = list(solutions)


class Vault(Protocol):
    """What a stage needs of a vault; `LabelVault` is one, and says what each does."""

    @property
    def reads(self) -> frozenset[str]:
        """The answer forms its verifier looks for."""
        ...

    def grade(self, account: SpendingAccount, requests: Sequence[tuple[str, str]]) -> list[Grade]:
        """A grade for each (problem id, completion), charged beforehand."""
        ...

    def same_answers(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether the answers of each pair are the same to the verifier."""
        ...

    def worked_responses(
        self, account: SpendingAccount, problem_ids: Sequence[str], form: str
    ) -> list[str]:
        """Worked solutions in a prompt form, charged beforehand."""
        ...


class LabelVault:
    """Keeps labels and grades against them, charging every reading before it happens."""

    __slots__ = ("__labels", "__verifier")

    def __init__(self, labels: Iterable[Label], verifier: Verifier) -> None:
        """Take the labels in; raise InputError where two are for one problem."""
        kept: dict[str, Label] = {}
        for label in labels:
            if label.problem_id in kept:
                raise InputError(
                    f"problem {label.problem_id!r} has two labels; keep one label per problem id"
                )
            kept[label.problem_id] = label
        self.__labels = kept
        self.__verifier = verifier

    def grade(self, account: SpendingAccount, requests: Sequence[tuple[str, str]]) -> list[Grade]:
        """Return a grade for each (problem id, completion), charged to `account` beforehand.

        Raises InputError for a problem without a label (nothing is charged then), and
        LabelsExhausted, holding the grades that were paid for, when the budget ends on the way.
        """
        ids = [problem_id for problem_id, _ in requests]
        self.__check_known(ids)
        granted = account.read_labels(ids)
        grades = self.__verifier.examine(
            [(text, self.__labels[problem_id]) for problem_id, text in requests[:granted]]
        )
        if granted < len(ids):
            raise LabelsExhausted(_out_of_budget(granted, len(ids), "completions"), grades)
        return grades

    @property
    def reads(self) -> frozenset[str]:
        """The answer forms its verifier looks for."""
        return self.__verifier.reads

    def same_answers(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether the answers of each pair are the same to the verifier; reads no label."""
        return self.__verifier.same_answers(pairs)

    def solutions(self, account: SpendingAccount, problem_ids: Sequence[str]) -> list[str]:
        """Return the worked solutions of problems; each costs its label and no verifier call.

        Raises InputError where a problem has no label or no solution (nothing is charged then),
        and LabelsExhausted, holding the solutions that were paid for, when the budget ends.
        """
        self.__check_known(problem_ids)
        solutions = []
        for problem_id in problem_ids:
            solution = self.__labels[problem_id].solution
            if solution is None:
                raise InputError(
                    f"problem {problem_id!r} has no worked solution; use data with a solution for "
                    "every problem, or a stage that needs none"
                )
            solutions.append(solution)
        granted = account.read_labels(problem_ids, verifier_calls_each=0)
        if granted < len(problem_ids):
            message = _out_of_budget(granted, len(problem_ids), "worked solutions")
            raise LabelsExhausted(message, solutions=solutions[:granted])
        return solutions

    def worked_responses(
        self, account: SpendingAccount, problem_ids: Sequence[str], form: str
    ) -> list[str]:
        """Return worked solutions that end in the answer as prompt form `form` asks for it.

        Charged and refused as `solutions`.
        """
        solutions = self.solutions(account, problem_ids)
        return [
            render_solution(form, solution, self.__labels[problem_id].answer)
            for problem_id, solution in zip(problem_ids, solutions, strict=True)
        ]

    def __check_known(self, problem_ids: Sequence[str]) -> None:
        for problem_id in problem_ids:
            if problem_id not in self.__labels:
                raise InputError(
                    f"problem {problem_id!r} has no label in this vault; ask only for problems "
                    "of the pool the vault was made for"
                )

    def __len__(self) -> int:
        return len(self.__labels)

    def __repr__(self) -> str:
        return f"LabelVault({len(self)} labels)"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise VaultSealed(
            "a label vault cannot be copied or pickled; send completions to it instead"
        )


def _out_of_budget(granted: int, asked: int, what: str) -> str:
    return (
        f"the label budget paid for {granted} of {asked} {what}; raise budget.labels or "
        "budget.verifier_calls to go on"
    )
