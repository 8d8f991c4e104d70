"""The processes that run one stage together, as the stage sees them.

Every rank runs the same stage function on the same job. What only one of them may do (grade,
charge, write) is done by the main rank, and its result, or its error, is everybody's.
`engine.ranks` has the worlds of more than one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

#: Names a file, in the environment of ranks of one machine, where they meet.
MEETING = "HEADWATER_MEETING"


class World:
    """One process alone; also what the worlds of several have in common.

    rank: this process's number, from 0; size: how many there are. A method that talks to the
    others must be called by all ranks, in the same order.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that grades, charges, and writes."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value in order of rank, on all of them. Values are pickled."""
        return [value]

    def from_main(self, compute: Callable[[], T]) -> T:
        """What `compute` returns on the main rank, on all; an error it raises is raised by all."""
        return compute()

    def add(self, tensor: Tensor) -> None:
        """Replace a tensor by the sum of all ranks' tensors, to the same bits on each."""

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part of `items`: every size-th from its rank on."""
        return items[self.rank :: self.size]

    def merge(self, shares: Sequence[Sequence[T]]) -> list[T]:
        """The items whose `share`s these are, by rank, in their order."""
        total = sum(map(len, shares))
        return [shares[place % self.size][place // self.size] for place in range(total)]


#: The world of a process that runs its stages alone.
SOLO = World()
