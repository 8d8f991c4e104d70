"""AdamW on float32 masters, a few of their elements at a time.

What one slice of the weights needs (gradient, moments, master, and the copy that computes) is read
and written while it lies in a core's cache: no float32 gradient of the whole model ever exists,
and no pass over all weights is made only to scale, widen or copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.optim.adamw import adamw

#: Elements of a slice: 1 MiB of float32 on a CPU; on a GPU enough that calls cost nothing.
_SLICE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}
_EPSILON = 1e-8


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some elements of one weight, flat: which, and their views."""

    index: int
    elements: slice
    master: torch.Tensor
    mean: torch.Tensor
    square: torch.Tensor
    copy: torch.Tensor | None  # what computes, where that is not the master


class SlicedAdamW:
    """AdamW (arXiv:1711.05101) over `masters`, keeping `copies` (the same weights in the format
    that computes, or the masters themselves) equal to them.

    Gradients come in either format, and are None for a weight that had no part in the loss.
    """

    def __init__(
        self,
        masters: Sequence[torch.Tensor],
        copies: Sequence[torch.Tensor],
        *,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        self._betas, self._weight_decay = betas, weight_decay
        self.updates = 0
        self.means = [torch.zeros_like(m, requires_grad=False) for m in masters]
        self.squares = [torch.zeros_like(m, requires_grad=False) for m in masters]
        self._slices = list(self._cut(masters, copies))
        longest = max((sum(p.master.numel() for p in s) for s in self._slices), default=0)
        narrow = any(copy is not master for master, copy in zip(masters, copies, strict=True))
        self._wide = masters[0].new_empty(longest if narrow else 0, requires_grad=False)

    def _cut(
        self, masters: Sequence[torch.Tensor], copies: Sequence[torch.Tensor]
    ) -> Iterator[list[_Piece]]:
        """Pieces by turns, as many in a slice as fit; a small model is one slice."""
        pieces: list[_Piece] = []
        free = limit = _SLICE_ELEMENTS[masters[0].device.type]
        for index, (master, copy) in enumerate(zip(masters, copies, strict=True)):
            whole, mean, square, narrow = (
                t.detach().view(-1) for t in (master, self.means[index], self.squares[index], copy)
            )
            start = 0
            while start < master.numel():
                part = slice(start, min(start + free, master.numel()))
                computes = None if copy is master else narrow[part]
                pieces.append(_Piece(index, part, whole[part], mean[part], square[part], computes))
                free -= part.stop - part.start
                start = part.stop
                if free == 0:
                    yield pieces
                    pieces, free = [], limit
        if pieces:
            yield pieces

    @torch.no_grad()
    def norm(self, gradients: Sequence[torch.Tensor | None]) -> float:
        """Euclidean norm of all gradients together, in the masters' format."""
        norms = [
            torch.linalg.vector_norm(part)
            for _, given in self._given(gradients)
            for part in self._widened(given)
        ]
        return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0

    @torch.no_grad()
    def step(self, gradients: Sequence[torch.Tensor | None], lr: float, scale: float) -> None:
        """One update with the gradients times `scale`, which may be overwritten."""
        beta1, beta2 = self._betas
        for pieces, given in self._given(gradients):
            wide = self._widened(given)
            if scale != 1.0:
                torch._foreach_mul_(wide, scale)
            adamw(
                [piece.master for piece in pieces],
                wide,
                [piece.mean for piece in pieces],
                [piece.square for piece in pieces],
                [],
                [piece.master.new_tensor(float(self.updates)) for piece in pieces],
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=lr,
                weight_decay=self._weight_decay,
                eps=_EPSILON,
                maximize=False,
            )
            self._publish(pieces)
        self.updates += 1

    def _given(
        self, gradients: Sequence[torch.Tensor | None]
    ) -> Iterator[tuple[list[_Piece], list[torch.Tensor]]]:
        """Slice by slice, the pieces that have a gradient, and those."""
        flat = [None if gradient is None else gradient.reshape(-1) for gradient in gradients]
        for pieces in self._slices:
            found = [(piece, flat[piece.index]) for piece in pieces]
            pairs = [(piece, whole) for piece, whole in found if whole is not None]
            if pairs:
                yield [piece for piece, _ in pairs], [whole[p.elements] for p, whole in pairs]

    def _widened(self, given: list[torch.Tensor]) -> list[torch.Tensor]:
        """Gradients in the masters' format; narrow ones in memory that the next slice takes."""
        if given[0].dtype == self._wide.dtype:
            return given
        wide = list(self._wide[: sum(map(len, given))].split([len(part) for part in given]))
        torch._foreach_copy_(wide, given)
        return wide

    def publish(self) -> None:
        """Set every copy to its master."""
        for pieces in self._slices:
            self._publish(pieces)

    @staticmethod
    @torch.no_grad()
    def _publish(pieces: Sequence[_Piece]) -> None:
        copies = [piece.copy for piece in pieces if piece.copy is not None]
        if copies:
            torch._foreach_copy_(copies, [piece.master for piece in pieces])
