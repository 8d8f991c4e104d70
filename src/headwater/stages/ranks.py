"""A stage's services where several ranks run it: done once, by the main rank, for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from headwater.stages.alerts import Alert
from headwater.stages.job import StageContext
from headwater.world import World

if TYPE_CHECKING:
    from headwater.ledger.spending import SpendingAccount
    from headwater.verify.grading import Grade
    from headwater.verify.vault import Vault

T = TypeVar("T")


def context_of_rank(
    world: World, main: StageContext | None, *, has_vault: bool, strict: bool
) -> StageContext:
    """The context of one rank; `main` is that of a process alone, and None on all other ranks.

    Accounts and vaults may be asked by all ranks together only; progress and alerts are told by
    the main rank. has_vault: whether `main` has one.
    """
    account = None if main is None else main.account
    vault = None if main is None else main.vault

    def report(values: Mapping[str, Any]) -> None:
        if main is not None:
            main.report_progress(values)

    def alert(found: Alert) -> None:
        if main is not None:
            main.report_alert(found)

    def stop() -> bool:
        assert main is not None
        return main.stop_requested()

    return _RankedContext(
        account=_RankedAccount(world, account),
        vault=_RankedVault(world, vault) if has_vault else None,
        report_progress=report,
        stop_requested=lambda: world.from_main(stop),
        report_alert=alert,
        strict=strict,
        world=world,
        main=main,
    )


@dataclass(slots=True)
class _RankedContext(StageContext):
    """One rank's context; `main` is what it stands for, on the main rank."""

    main: StageContext | None = None


def of_main(context: StageContext) -> StageContext:
    """The main rank's own services, for what it does inside `World.from_main`."""
    if not isinstance(context, _RankedContext):
        return context
    assert context.main is not None, "only the main rank has services of its own"
    return context.main


def _main_only(world: World, service: Any, ask: Callable[[Any], T]) -> T:
    return world.from_main(lambda: ask(service))


@dataclass(frozen=True, slots=True)
class _RankedAccount:
    """The stage's account, which the main rank has."""

    world: World
    account: SpendingAccount | None

    def read_labels(self, problem_ids: Sequence[str], verifier_calls_each: int = 1) -> int:
        return _main_only(
            self.world, self.account, lambda a: a.read_labels(problem_ids, verifier_calls_each)
        )

    def charge(self, **amounts: float) -> None:
        _main_only(self.world, self.account, lambda a: a.charge(**amounts))

    def remaining(self, counter: str) -> float:
        return _main_only(self.world, self.account, lambda a: float(a.remaining(counter)))

    def observe_peak_memory(self, bytes_: int) -> None:
        largest = max(self.world.gather(bytes_))
        if self.account is not None:
            self.account.observe_peak_memory(largest)

    def position(self) -> int:
        return _main_only(self.world, self.account, lambda a: int(a.position()))

    def rewind(self, position: int) -> None:
        _main_only(self.world, self.account, lambda a: a.rewind(position))


@dataclass(frozen=True, slots=True)
class _RankedVault:
    """The stage's vault, which the main rank has: gold answers never leave its process."""

    world: World
    vault: Vault | None

    @property
    def reads(self) -> frozenset[str]:
        return _main_only(self.world, self.vault, lambda v: frozenset(v.reads))

    def grade(self, account: SpendingAccount, requests: Sequence[tuple[str, str]]) -> list[Grade]:
        assert isinstance(account, _RankedAccount)
        return _main_only(
            self.world, self.vault, lambda v: list(v.grade(account.account, requests))
        )

    def same_answers(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        return _main_only(self.world, self.vault, lambda v: list(v.same_answers(pairs)))

    def worked_responses(
        self, account: SpendingAccount, problem_ids: Sequence[str], form: str
    ) -> list[str]:
        assert isinstance(account, _RankedAccount)
        return _main_only(
            self.world,
            self.vault,
            lambda v: list(v.worked_responses(account.account, problem_ids, form)),
        )
