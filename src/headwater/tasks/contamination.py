"""Keeping evaluation problems out of training: exact, normalised and near matches."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

from headwater.errors import InputError
from headwater.tasks.problems import LabelledProblems
from headwater.types import Problem

# LaTeX that only styles: the command goes, what it is applied to stays.
_STYLING = re.compile(
    r"\\(?:left|right|big|Big|bigg|Bigg|displaystyle|textstyle|limits|quad|qquad|hfill|newline|"
    r"text|textbf|textit|textrm|textsf|emph|mbox|mathrm|mathbf|mathit|mathsf|operatorname|"
    r"boldsymbol|begin|end)(?![a-zA-Z])\*?|\\[,;:!> ()\[\]\\]|[${}~]"
)
_STYLED = re.compile(r"[\\${}~]")
_VARIANTS = {
    "dfrac": "frac",
    "tfrac": "frac",
    "dbinom": "binom",
    "tbinom": "binom",
    "leq": "le",
    "geq": "ge",
    "neq": "ne",
    "ldots": "dots",
    "cdots": "dots",
    "dotsc": "dots",
}
# LaTeX takes one digit: \log_82 is log to base 8 of 2, \frac12 a half.
_ONE_DIGIT = re.compile(r"([_^]|\\[dt]?frac)\s*(\d)(?=\d)")
_THOUSANDS = re.compile(r"(?<=\d)(?:,(?:\\!)?|\{,\}|\\,)(?=\d{3}(?!\d))")
# A number with its decimals, a word, or one operator or bracket. Punctuation is left out.
_TOKEN = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+|[^\w\s.,;:!?'\"`\\]|_")
_WORD = re.compile(r"\w+")
NGRAM_WORDS = 8
NEAR_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Match:
    """A training problem found in an evaluation set.

    share: part of the evaluation problem's word n-grams (8 words unless asked otherwise) that
    the training problem holds (0 to 1; 1 for exact and normalised matches).
    """

    kind: Literal["exact", "normalised", "near"]
    train_id: str
    eval_set: str
    eval_id: str
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class ContaminationReport:
    """What was compared, what was removed from training, and near matches that stayed."""

    train_problems: int
    eval_problems: Mapping[str, int]
    removed: tuple[Match, ...]
    near: tuple[Match, ...]

    @property
    def removed_ids(self) -> frozenset[str]:
        """Training problems that were removed."""
        return frozenset(match.train_id for match in self.removed)

    def with_other(self, other: ContaminationReport) -> ContaminationReport:
        """What was found in two sources of training problems, against the same evaluation sets."""
        return ContaminationReport(
            train_problems=self.train_problems + other.train_problems,
            eval_problems=self.eval_problems,
            removed=self.removed + other.removed,
            near=self.near + other.near,
        )

    def counts(self, eval_set: str) -> dict[str, int]:
        """Matching pairs with one evaluation set: {"exact": .., "normalised": .., "near": ..}."""
        counts = {"exact": 0, "normalised": 0, "near": 0}
        for match in (*self.removed, *self.near):
            counts[match.kind] += match.eval_set == eval_set
        return counts

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {
            "train_problems": self.train_problems,
            "eval_problems": dict(self.eval_problems),
            "removed": [asdict(match) for match in self.removed],
            "near": [asdict(match) for match in self.near],
        }


@lru_cache(maxsize=1 << 16)  # comparing and pools ask for the same texts
def normalise(text: str) -> str:
    r"""Text without case, spacing, punctuation and LaTeX styling, as tokens with one space.

    Operators, brackets and decimals stay: a sign or a point makes another problem.

    >>> normalise(r"Find $\dfrac{1}{2}+ x$."), normalise("find  $\\left(-1,000.5\\right)$")
    ('find frac 1 2 + x', 'find ( - 1000.5 )')
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    # What an expression cannot match without is looked for first: most texts have none of it.
    if "_" in text or "^" in text or "\\" in text:
        text = _ONE_DIGIT.sub(r"\1\2 ", text)
    if "," in text:
        text = _THOUSANDS.sub("", text)
    if _STYLED.search(text):
        text = _STYLING.sub(" ", text)
    tokens = _TOKEN.findall(text.lower())
    if not _VARIANTS.keys().isdisjoint(tokens):
        tokens = [_VARIANTS.get(token, token) for token in tokens]
    return " ".join(tokens)


def find_matches(
    train: LabelledProblems,
    evals: Mapping[str, LabelledProblems],
    *,
    ngram_words: int = NGRAM_WORDS,
    near_share: float = NEAR_SHARE,
) -> list[Match]:
    """Every pair of a training problem and an evaluation problem that match; equal texts first.

    Near: at least `near_share` of the evaluation problem's n-grams of `ngram_words` words are in
    the training problem; problems with fewer words can only be equal. Raises InputError for
    n-grams and shares that match nothing or everything.
    """
    if ngram_words < 2 or not 0 < near_share <= 1:
        raise InputError(
            f"n-grams of {ngram_words} words, of which {near_share:g} must be shared, tell nothing "
            "apart; use 2 words or more, and a share above 0 and up to 1"
        )
    held_out = _HeldOut(evals, ngram_words, near_share)
    equal: list[Match] = []
    near: list[Match] = []
    for problem in train.problems:
        text = normalise(problem.prompt)
        found = held_out.equal_to(problem, text)
        pairs = {(match.eval_set, match.eval_id) for match in found}
        equal += found
        near += [m for m in held_out.near(problem, text) if (m.eval_set, m.eval_id) not in pairs]
    return equal + near


def remove_contaminated(
    train: LabelledProblems, evals: Mapping[str, LabelledProblems]
) -> tuple[LabelledProblems, ContaminationReport]:
    """Remove training problems whose exact or normalised text is in an evaluation set.

    Near matches (at least half of the evaluation problem's word 8-grams are in the training
    problem; often the same template with other numbers) are reported and stay. Raises
    InputError when nothing is left to train on.
    """
    held_out = _HeldOut(evals, NGRAM_WORDS, NEAR_SHARE)
    removed: list[Match] = []
    near: list[Match] = []
    for problem in train.problems:
        text = normalise(problem.prompt)
        if found := held_out.equal_to(problem, text):
            removed += found
        else:
            near += held_out.near(problem, text)
    gone = {match.train_id for match in removed}
    kept = train.only(lambda problem: problem.id not in gone)
    if not len(kept):
        raise InputError(
            f"all {len(train)} training problems are in the evaluation sets "
            f"({', '.join(evals)}); train and evaluate on different problems"
        )
    report = ContaminationReport(
        train_problems=len(train),
        eval_problems={name: len(data) for name, data in evals.items()},
        removed=tuple(removed),
        near=tuple(near),
    )
    return kept, report


class _HeldOut:
    """Evaluation problems by their normalised texts and by their n-grams of words."""

    def __init__(
        self, evals: Mapping[str, LabelledProblems], ngram_words: int, near_share: float
    ) -> None:
        self._ngram_words = ngram_words
        self._near_share = near_share
        self._texts: dict[str, list[tuple[str, Problem]]] = defaultdict(list)
        self._holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self._sizes: list[tuple[str, str, int]] = []  # evaluation set, problem, number of n-grams
        for eval_set, data in evals.items():
            for problem in data.problems:
                text = normalise(problem.prompt)
                self._texts[text].append((eval_set, problem))
                ngrams = set(self._ngrams(text))
                for ngram in ngrams:
                    self._holders[ngram].append(len(self._sizes))
                self._sizes.append((eval_set, problem.id, len(ngrams)))

    def equal_to(self, problem: Problem, text: str) -> list[Match]:
        """Matches of a training problem whose normalised text this is, by the whole text."""
        return [
            Match(
                "exact" if held.prompt == problem.prompt else "normalised",
                problem.id,
                eval_set,
                held.id,
            )
            for eval_set, held in self._texts.get(text, ())
        ]

    def near(self, problem: Problem, text: str) -> list[Match]:
        """Matches by n-grams, those by the whole text included where it is long enough."""
        ngrams = list(self._ngrams(text))
        if self._holders.keys().isdisjoint(ngrams):
            return []
        shared: dict[int, int] = defaultdict(int)
        for ngram in dict.fromkeys(ngrams):
            for index in self._holders.get(ngram, ()):
                shared[index] += 1
        matches = []
        for index, count in shared.items():
            eval_set, eval_id, size = self._sizes[index]
            if count >= self._near_share * size:
                matches.append(Match("near", problem.id, eval_set, eval_id, count / size))
        return matches

    def _ngrams(self, text: str) -> Iterator[tuple[str, ...]]:
        words = _WORD.findall(text)
        return zip(*(words[start:] for start in range(self._ngram_words)), strict=False)
