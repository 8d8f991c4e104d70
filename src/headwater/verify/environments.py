r"""Matrices and systems, which LaTeX writes as environments."""

from __future__ import annotations

import re
from collections.abc import Callable

from headwater.verify.expression import Operation, read_expression
from headwater.verify.kinds import Answer, Bracketed, Listing, Matrix, Scalar
from headwater.verify.tokens import Unreadable
from headwater.verify.words import words_of

_ENVIRONMENT = re.compile(
    r"^(?P<factor>[^&]*?)(?P<open>[(\[]|\\\{)? ?"
    r"\\begin ?\{(?P<name>[pbB]?matrix|smallmatrix|array|cases|aligned)\}"
    r" ?(?:\{[clr| ]*\})?(?P<rows>.*)\\end ?\{(?P=name)\} ?(?P<close>[)\]])?$",
    re.DOTALL,
)
_ROW_SKIP = re.compile(r"^ ?\[[\d.]+ ?(?:em|ex|pt|mm|cm)\]")
_CASE_WORDS = re.compile(r"\\text ?\{ ?(?:if|for|when|where|and)?[ ,]*\}")


def read_environment(text: str, read: Callable[[str], Answer]) -> Answer | None:
    r"""A matrix, with a factor in front of it or without, or a system of equations.

    `\begin{cases}` and an array behind a single brace are listings of their rows.
    """
    if "\\begin" not in text:
        return None
    environment = _ENVIRONMENT.match(text)
    if environment is None or text.count("\\begin") > 1:
        return None
    if {"(": ")", "[": "]"}.get(environment["open"]) != environment["close"]:
        return None
    rows = [
        [cell.strip() for cell in row.split("&")]
        for row in (_row(row) for row in environment["rows"].split(r"\\"))
        if row
    ]
    if environment["name"] in ("cases", "aligned") or environment["open"] == "\\{":
        return None if environment["factor"].strip() else _system(rows, read)
    matrix = Matrix(tuple(tuple(read(cell) for cell in row) for row in rows))
    factor = environment["factor"].strip()
    return _multiplied(matrix, factor) if factor else matrix


def _row(text: str) -> str:
    return _ROW_SKIP.sub("", text).replace(r"\hline", "").strip()


def _system(rows: list[list[str]], read: Callable[[str], Answer]) -> Answer:
    items: list[Answer] = []
    for row in rows:
        cells = [_CASE_WORDS.sub(" ", cell).strip(" ,;.") for cell in row]
        cells = [cell for cell in cells if cell]
        if len(cells) > 1:
            items.append(Bracketed(tuple(map(read, cells)), "cases"))
        elif cells:
            items.append(read(cells[0]))
    return Listing(tuple(items))


def _multiplied(matrix: Matrix, factor: str) -> Answer | None:
    if words_of(factor):
        return None
    factor = re.sub(r"(?:\\cdot|\\times|\*)$", "", factor).strip()
    try:
        tree = read_expression(f"{factor}1" if factor in ("", "+", "-") else factor)
    except Unreadable:
        return None
    rows: list[tuple[Answer, ...]] = []
    for row in matrix.rows:
        cells = [cell.tree for cell in row if isinstance(cell, Scalar) and not cell.unit]
        if len(cells) < len(row):
            return None
        rows.append(tuple(Scalar(Operation("*", (tree, cell))) for cell in cells))
    return Matrix(tuple(rows))
