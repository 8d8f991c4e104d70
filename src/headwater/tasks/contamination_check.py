"""`headwater contamination`: which training problems are in which evaluation sets, pair by pair."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headwater.errors import InputError
from headwater.tasks.contamination import NEAR_SHARE, NGRAM_WORDS, Match, find_matches
from headwater.tasks.problems import is_generated, load_problems
from headwater.visible import csv_text

_COLUMNS = ("kind", "share", "train_id", "eval_set", "eval_id", "train_text", "eval_text")


@dataclass(frozen=True, slots=True)
class MatchedPair:
    """A match with both texts."""

    match: Match
    train_text: str
    eval_text: str

    def as_dict(self) -> dict[str, Any]:
        """One flat row."""
        row = asdict(self.match) | {"train_text": self.train_text, "eval_text": self.eval_text}
        return {name: row[name] for name in _COLUMNS}


@dataclass(frozen=True, slots=True)
class ContaminationCheck:
    """What was compared, how, and every pair that matched."""

    train: str
    train_problems: int
    eval_problems: Mapping[str, int]
    ngram_words: int
    near_share: float
    pairs: tuple[MatchedPair, ...]

    def counts(self, eval_set: str) -> Counter[str]:
        """Problems of an evaluation set that are in training, by the closest kind of match."""
        closest: dict[str, str] = {}
        for kind in ("exact", "normalised", "near"):
            for pair in self.pairs:
                if (pair.match.eval_set, pair.match.kind) == (eval_set, kind):
                    closest.setdefault(pair.match.eval_id, kind)
        return Counter(closest.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "train": self.train,
            "train_problems": self.train_problems,
            "ngram_words": self.ngram_words,
            "near_share": self.near_share,
            "eval": {
                name: {"problems": problems, **self.counts(name)}
                for name, problems in self.eval_problems.items()
            },
            "pairs": [pair.as_dict() for pair in self.pairs],
        }

    def write_csv(self, path: Path) -> None:
        """Write every pair, a row each, making the file's folder; no text becomes a formula."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, _COLUMNS)
            writer.writeheader()
            for pair in self.pairs:
                row = pair.as_dict()
                texts = {k: csv_text(text) for k, text in row.items() if isinstance(text, str)}
                writer.writerow(row | texts)


def check_contamination(
    train: str,
    evals: Mapping[str, str],
    *,
    columns: Mapping[str, str] | None = None,
    ngram_words: int = NGRAM_WORDS,
    near_share: float = NEAR_SHARE,
) -> ContaminationCheck:
    """Compare a source of training problems with evaluation sets (name -> source).

    columns: as in `load_problems`, for every source that has columns. Raises InputError for
    sources that cannot be read and for numbers as `find_matches` does.
    """
    if not evals:
        raise InputError(f"{train} is compared with nothing; name evaluation sets with --eval")
    data = load_problems(train, None if is_generated(train) else columns)
    sets = {
        name: load_problems(source, None if is_generated(source) else columns)
        for name, source in evals.items()
    }
    matches = find_matches(data, sets, ngram_words=ngram_words, near_share=near_share)
    train_texts = {problem.id: problem.prompt for problem in data.problems}
    eval_texts = {
        (name, problem.id): problem.prompt
        for name, items in sets.items()
        for problem in items.problems
    }
    return ContaminationCheck(
        train=train,
        train_problems=len(data),
        eval_problems={name: len(items) for name, items in sets.items()},
        ngram_words=ngram_words,
        near_share=near_share,
        pairs=tuple(
            MatchedPair(m, train_texts[m.train_id], eval_texts[m.eval_set, m.eval_id])
            for m in sorted(matches, key=lambda m: (m.eval_set, -m.share))
        ),
    )
