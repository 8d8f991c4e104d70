"""Who may learn from which problem: a fixed random division of the training problems."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from headwater.errors import InputError
from headwater.seeding import derive_key
from headwater.tasks.contamination import normalise
from headwater.tasks.problems import LabelledProblems
from headwater.types import Label, Problem

_WHOLE = ("worked", "validation", "labels", "prompts")
_UNGRADED = "prompts"


class Pools:
    """Named pools of problems. Only those with at least one problem exist.

    `labels` is what the run may read gold answers of, its parts named by the split; `worked`
    has worked solutions, `validation` is graded while training, `prompts` is never graded:
    its labels cannot be had. `NAME:n` is the first n problems of a pool.
    """

    def __init__(self, pools: dict[str, LabelledProblems]) -> None:
        self._pools = {name: pool for name, pool in pools.items() if len(pool)}
        self._firsts: dict[str, LabelledProblems] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Every pool that exists: labels, its parts, then the others."""
        return tuple(self._pools)

    def __getitem__(self, name: str) -> tuple[Problem, ...]:
        """The pool's problems, in pool order. Raises InputError for a pool that is empty."""
        return self._pool(name).problems

    def labels(self, name: str) -> tuple[Label, ...]:
        """Labels of `self[name]`, for the label vault.

        Raises InputError for `prompts`, which is never graded, and for an empty pool.
        """
        if name.partition(":")[0] == _UNGRADED:
            raise InputError(
                f"pool {_UNGRADED!r} is never graded; give the stage a pool with labels: "
                + ", ".join(existing for existing in self.names if existing != _UNGRADED)
            )
        return self._pool(name).labels

    def labelled(self, name: str) -> LabelledProblems:
        """Problems and labels of a pool together, to be evaluated on."""
        return self._pool(name)

    def _pool(self, name: str) -> LabelledProblems:
        whole, _, first = name.partition(":")
        if whole not in self._pools:
            raise InputError(
                f"pool {name!r} has no problems; set its size under pools, or use one of "
                + ", ".join(self.names)
            )
        pool = self._pools[whole]
        if not first:
            return pool
        if name not in self._firsts:
            size = int(first)
            self._firsts[name] = LabelledProblems.of(pool.problems[:size], pool.labels[:size])
        return self._firsts[name]


def make_pools(
    data: LabelledProblems,
    *,
    labels: int,
    split: Sequence[str] = (),
    prompts: int = 0,
    worked: int = 0,
    validation: int = 0,
    seed: int = 0,
    worked_data: LabelledProblems | None = None,
) -> Pools:
    """Divide `data` into disjoint pools of the given sizes; `split` names parts of `labels`.

    Each problem's place in the order comes from `seed` and its id alone, and each pool takes
    the same end of that order, so that a larger `labels` contains the smaller one (its parts
    too) and leaves `worked`, `validation` and `prompts` as they are while there is enough for
    all. Of problems whose normalised texts are equal the first in the order is kept. Parts differ
    in size by at most one.

    worked_data: where `worked` comes from, if not from `data`; problems whose text is in `data`
    are left out.

    Raises InputError for negative sizes, more problems or worked solutions than there are,
    names that repeat or are taken, and fewer labels than parts.
    """
    sizes = {"labels": labels, "prompts": prompts, "worked": worked, "validation": validation}
    _check_request(sizes, split)
    order = _shuffled_distinct(data, seed)
    elsewhere = worked_data is not None
    asked = sum(sizes.values()) - (worked if elsewhere else 0)
    if asked > len(order):
        listed = ", ".join(
            f"{name} {size}"
            for name, size in sizes.items()
            if size and not (elsewhere and name == "worked")
        )
        raise InputError(
            f"pools ask for {asked} problems ({listed}), but there are {len(order)} distinct "
            "training problems; ask for fewer or give more data"
        )
    candidates = order if worked_data is None else _apart(worked_data, order, seed)
    solved = [pair for pair in candidates if pair[1].solution is not None]
    if worked > len(solved):
        raise InputError(
            f"pools.worked asks for {worked} worked solutions, but {len(solved)} problems have "
            "one; ask for fewer or give data with a solution column"
        )
    taken = {pair[0].id for pair in solved[:worked]}
    rest = [pair for pair in order if pair[0].id not in taken]
    labelled = rest[validation : validation + labels]
    pools = {"labels": labelled}
    for part, name in enumerate(split):
        pools[name] = labelled[part :: len(split)]
    pools[_UNGRADED] = rest[len(rest) - prompts :][::-1]
    pools["worked"] = solved[:worked]
    pools["validation"] = rest[:validation]
    made = {
        name: LabelledProblems.of((pair[0] for pair in pairs), (pair[1] for pair in pairs))
        for name, pairs in pools.items()
    }
    return Pools({**made, _UNGRADED: made[_UNGRADED].without_labels()})


def _apart(
    data: LabelledProblems, order: Sequence[tuple[Problem, Label]], seed: int
) -> list[tuple[Problem, Label]]:
    """The problems of `data`, shuffled, whose text `order` does not hold.

    An id that `order` has too is given a prefix: files of one name number their rows alike, and
    two problems of one id would be one label to the ledger.
    """
    ids = {problem.id for problem, _ in order}
    texts = {_text_key(problem) for problem, _ in order}
    return [
        _renamed(pair, f"worked:{pair[0].id}") if pair[0].id in ids else pair
        for pair in _shuffled_distinct(data, seed)
        if _text_key(pair[0]) not in texts
    ]


def _renamed(pair: tuple[Problem, Label], problem_id: str) -> tuple[Problem, Label]:
    return replace(pair[0], id=problem_id), replace(pair[1], problem_id=problem_id)


def _check_request(sizes: dict[str, int], split: Sequence[str]) -> None:
    for name, size in sizes.items():
        if size < 0:
            raise InputError(f"pools.{name}={size}; expected 0 or more")
    taken = [name for name in split if name in _WHOLE]
    if taken or len(set(split)) < len(split):
        raise InputError(
            f"pools.split={list(split)} repeats a name or takes one of {', '.join(_WHOLE)}; "
            "give every part its own name, for instance [1H, 2H]"
        )
    if sizes["labels"] < len(split):
        raise InputError(
            f"pools.labels={sizes['labels']} cannot be split into {len(split)} parts "
            f"({', '.join(split)}); ask for at least {len(split)} labels, or split: []"
        )


def _shuffled_distinct(data: LabelledProblems, seed: int) -> list[tuple[Problem, Label]]:
    pairs = zip(data.problems, data.labels, strict=True)
    shuffled = sorted(pairs, key=lambda pair: (derive_key(seed, "pools", pair[0].id), pair[0].id))
    seen: set[bytes] = set()
    distinct = []
    for pair in shuffled:
        text = _text_key(pair[0])
        if text not in seen:
            seen.add(text)
            distinct.append(pair)
    return distinct


def _text_key(problem: Problem) -> bytes:
    """What stands for a problem's normalised text: 16 bytes, however long the text."""
    text = normalise(problem.whole_text).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).digest()
