r"""What kind of thing an answer is: a number, a list, a set, a tuple, an interval, a matrix, ...

`read_answer` takes an answer in the common notation of `notation.normalise` apart from the
outside in; the innermost pieces are expressions.
"""

from __future__ import annotations

import re
from fractions import Fraction

from headwater.verify.expression import Number, Operation, Symbol, read_expression
from headwater.verify.kinds import (
    Answer,
    Based,
    Bracketed,
    Labelled,
    Listing,
    Matrix,
    Opaque,
    Ratio,
    Relation,
    Scalar,
    Text,
    Union,
)
from headwater.verify.numerics import roughly_equal
from headwater.verify.splitting import (
    check_nesting,
    encloses,
    is_label,
    is_single_name,
    label_key,
    split_at,
    split_at_signs,
    without_outer_braces,
)
from headwater.verify.tokens import FUNCTIONS, MAX_CHARACTERS, PastLimits, Unreadable
from headwater.verify.units import split_unit

_MAX_ITEMS = 64
_LONGEST_NUMERAL = 100
_INFINITY = Symbol("infty")


_AND_OR = re.compile(r"\\text ?\{[\s,;]*(and|or|,|;)[\s,;]*\}|(?<![A-Za-z\\])(and|or)(?![A-Za-z])")
_RELATIONS = re.compile(r"(\\le(?![a-z])|\\ge(?![a-z])|\\ne(?![a-z])|<=|>=|=<|=>|!=|:=|==|<|>|=)")
_RELATION_NAMES = {
    "\\le": "<=", "\\ge": ">=", "\\ne": "!=", "=<": "<=", "=>": ">=", ":=": "=", "==": "=",
}  # fmt: skip
_APPROXIMATELY = re.compile(r"\\(?:approx|simeq|doteq|thickapprox)(?![a-z])")
_MEMBER = re.compile(r"\\in(?![a-z])")
_UNION = re.compile(r"\\cup(?![a-z])|(?<=[)\]}]) ?U ?(?=[(\[\\{])")
_ENVIRONMENT = re.compile(
    r"^[(\[]? ?\\begin ?\{(p?matrix|bmatrix|Bmatrix|smallmatrix|array)\} ?(?:\{[clr| ]*\})?(.*)"
    r"\\end ?\{\1\} ?[)\]]?$",
    re.DOTALL,
)
_ROW_SKIP = re.compile(r"^ ?\[[\d.]+ ?(?:em|ex|pt|mm|cm)\]")
_BASED = re.compile(
    r"(-?) ?\(? ?(?:\\text ?\{)? ?(\w*\d[\w.]*|[A-Za-z]\w+) ?\}? ?\)?"
    r" ?(?:_ ?\{?|(?:\\text ?\{ ?)?\(?(?:in )?base[ -])"
    r" ?(?:\\text ?\{)? ?(?:base )?(\d+|[a-z]+)[ })]*"
)
_NUMBER_WORDS = {
    name: number
    for number, name in enumerate(
        (
            "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
            "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen",
        )
    )
}  # fmt: skip
_TEXT = re.compile(r"\\text ?\{([^{}]*)\}")
_ALL_REALS = re.compile(
    r"\\mathbb ?\{R\}|(?:\\text ?\{)? ?all real(?: number)?s ?\}?", re.IGNORECASE
)
_TEXT_LIST = re.compile(r"\\text ?\{((?: ?[A-Za-z\d] ?(?:,|;|and|or|(?=\})))+)\}")
_WORDS = re.compile(r"[A-Za-z\d .,;:'\"!?()\-]+")
_WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{3,}")


def read_answer(text: str) -> Answer:
    """Return what an answer in common notation is; raise PastLimits if it is too long or deep."""
    if len(text) > MAX_CHARACTERS:
        raise PastLimits("too long")
    check_nesting(text)
    return _read(text.strip())


def _read(text: str) -> Answer:
    text = without_outer_braces(text)
    if _ALL_REALS.fullmatch(text):
        return _interval(None, "(", None, ")")
    for reader in (
        _read_matrix, _read_words, _read_approximation, _read_list, _read_member, _read_union,
        _read_relation, _read_brackets, _read_based, _read_ratio,
    ):  # fmt: skip
        answer = reader(text)
        if answer is not None:
            return answer
    return _read_scalar(text)


def label_free(answer: Answer) -> Answer:
    """The value of a labelled answer; any other answer as it is."""
    return label_free(answer.value) if isinstance(answer, Labelled) else answer


def _read_matrix(text: str) -> Answer | None:
    environment = _ENVIRONMENT.match(text)
    if environment is None or "\\begin" in environment.group(2):
        return None
    rows = []
    for row in environment.group(2).split(r"\\"):
        row = _ROW_SKIP.sub("", row).replace(r"\hline", "").strip()
        if row:
            rows.append(tuple(_read(cell.strip()) for cell in row.split("&")))
    return Matrix(tuple(rows))


def _read_words(text: str) -> Answer | None:
    """Words as text, unless they are units, separators or names of functions and variables."""
    if any(sign in text for sign in "=<>^_+*/&|") or "," in text or ";" in text:
        return None
    flat = _TEXT.sub(r" \1 ", text)
    if not _WORDS.fullmatch(flat) or _AND_OR.search(text):
        return None
    words = [word for word in _WORD.findall(flat) if not _mathematical(word)]
    if not words or split_unit(text).body != text:
        return None
    key = text_key(flat)
    return Scalar(Number(Fraction(_NUMBER_WORDS[key]))) if key in _NUMBER_WORDS else Text(key)


def text_key(text: str) -> str:
    """Letters and digits only, without case."""
    return "".join(letter for letter in text.casefold() if letter.isalnum())


def _mathematical(word: str) -> bool:
    return word in FUNCTIONS or word in ("pi", "inf") or "".join(sorted(word)) == word


def _read_approximation(text: str) -> Answer | None:
    """An exact value with its rounding after it is that value; a name before one is a label."""
    sides = split_at(text, _APPROXIMATELY)
    if len(sides) < 2:
        return None
    if not sides[0] or is_label(sides[0]):
        return _read(sides[1]) if len(sides) == 2 else Opaque(text)
    exact = _read(sides[0])
    value = label_free(exact)
    for side in sides[1:]:
        rounded = _read(side)
        if not isinstance(value, Scalar) or not isinstance(rounded, Scalar):
            return Opaque(text)
        if not roughly_equal(value.tree, rounded.tree):
            return Opaque(text)
    return exact


def _read_list(text: str) -> Answer | None:
    text = _TEXT_LIST.sub(lambda piece: f" {piece.group(1)} ", text)
    separators: list[str] = []
    pieces: list[str] = []
    for part in split_at_signs(text, ",;"):
        words = split_at(part, _AND_OR, separators)
        pieces += words
    if len(pieces) < 2 and "\\pm" not in text and "\\mp" not in text:
        return None
    items: list[Answer] = []
    for piece in filter(str.strip, pieces):
        items += [_read(branch) for branch in _plus_and_minus(piece.strip())]
    if len(items) > _MAX_ITEMS:
        raise PastLimits("too many items")
    if len(items) == 1:
        return items[0]
    if separators and all(word == "or" for word in separators) and items:
        parts = [label_free(item) for item in items]
        if all(isinstance(part, Bracketed | Union) for part in parts):
            return Union(tuple(_flat_union(parts)))
    return Listing(tuple(items)) if items else None


def _plus_and_minus(text: str) -> list[str]:
    if "\\pm" not in text and "\\mp" not in text:
        return [text]
    upper = text.replace(r"\pm", "+").replace(r"\mp", "-")
    lower = text.replace(r"\pm", "-").replace(r"\mp", "+")
    return [upper, lower]


def _read_member(text: str) -> Answer | None:
    sides = split_at(text, _MEMBER)
    return _read(sides[1]) if len(sides) == 2 and is_label(sides[0]) else None


def _read_union(text: str) -> Answer | None:
    parts = split_at(text, _UNION)
    return Union(tuple(_flat_union([_read(part) for part in parts]))) if len(parts) > 1 else None


def _flat_union(parts: list[Answer]) -> list[Answer]:
    flat: list[Answer] = []
    for part in parts:
        flat += part.parts if isinstance(part, Union) else [part]
    return flat


def _read_relation(text: str) -> Answer | None:
    operators: list[str] = []
    sides = split_at(text, _RELATIONS, operators)
    if len(sides) < 2:
        return None
    names = tuple(_RELATION_NAMES.get(name, name) for name in operators)
    if names == ("=",):
        for label, value in (sides, sides[::-1]):
            if is_label(label) and not (label is sides[1] and not is_single_name(label)):
                return Labelled(label_key(label), _read(value), _relation(sides, names))
    if any(not side.strip() for side in sides):
        return Opaque(text)
    return _as_interval(sides, names) or _relation(sides, names) or Opaque(text)


def _relation(sides: list[str], operators: tuple[str, ...]) -> Relation | None:
    try:
        return Relation(tuple(read_expression(side) for side in sides), operators)
    except Unreadable:
        return None


def _as_interval(sides: list[str], operators: tuple[str, ...]) -> Answer | None:
    """The set of values an inequality leaves to a single name, as an interval or a union."""
    if any(operator.startswith(">") for operator in operators):
        if not all(operator.startswith(">") for operator in operators):
            return None
        sides, operators = sides[::-1], tuple(_FLIPPED[name] for name in operators[::-1])
    try:
        if operators == ("!=",) and is_label(sides[0]):
            hole = Scalar(read_expression(sides[1]))
            return Union((_interval(None, "(", hole, ")"), _interval(hole, "(", None, ")")))
        if not all(operator in ("<", "<=") for operator in operators):
            return None
        if len(sides) == 3 and is_label(sides[1]):
            low, high = Scalar(read_expression(sides[0])), Scalar(read_expression(sides[2]))
            return _around(sides[1], low, operators[0], high, operators[1])
        if len(sides) == 2 and is_label(sides[0]):
            return _around(sides[0], None, "<", Scalar(read_expression(sides[1])), operators[0])
        if len(sides) == 2 and is_label(sides[1]):
            return _around(sides[1], Scalar(read_expression(sides[0])), operators[0], None, "<")
    except Unreadable:
        pass
    return None


_FLIPPED = {">": "<", ">=": "<="}


def _around(
    label: str, low: Scalar | None, low_operator: str, high: Scalar | None, high_operator: str
) -> Answer | None:
    opening = "(" if low_operator == "<" else "["
    closing = ")" if high_operator == "<" else "]"
    if not re.fullmatch(r"\|.*\|", label.strip()):
        return _interval(low, opening, high, closing)
    if low is None and high is not None:
        return _interval(_negated(high), {")": "(", "]": "["}[closing], high, closing)
    if low is None:
        return None
    mirrored = "]" if opening == "[" else ")"
    left_opening = "[" if closing == "]" else "("
    left = _interval(_negated(high) if high else None, left_opening, _negated(low), mirrored)
    return Union((left, _interval(low, opening, high, closing)))


def _interval(low: Scalar | None, opening: str, high: Scalar | None, closing: str) -> Bracketed:
    ends = (low or _negated(Scalar(_INFINITY)), high or Scalar(_INFINITY))
    return Bracketed(ends, ("(" if low is None else opening) + (")" if high is None else closing))


def _negated(value: Scalar) -> Scalar:
    if isinstance(value.tree, Number):
        return Scalar(Number(-value.tree.value))
    return Scalar(Operation("neg", (value.tree,)))


def _read_brackets(text: str) -> Answer | None:
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return _read_set(text[2:-2].strip())
    text = re.sub(r"^\\langle ?", "(", re.sub(r" ?\\rangle$", ")", text))
    if not text or text[0] not in "([" or text[-1] not in ")]" or not encloses(text):
        return None
    inside = split_at_signs(text[1:-1], ",;")
    if len(inside) < 2:
        return None
    items = tuple(_read(item.strip()) for item in inside)
    if text[0] == "[" and all(isinstance(i, Bracketed) and i.brackets == "[]" for i in items):
        return Matrix(tuple(item.items for item in items if isinstance(item, Bracketed)))
    return Bracketed(items, text[0] + text[-1])


def _read_set(inside: str) -> Answer | None:
    if not inside:
        return Scalar(Symbol("emptyset"))
    builder = split_at_signs(inside, "|:")
    if len(builder) == 2:
        name = split_at(builder[0], _MEMBER)[0]
        return _read(builder[1].strip()) if is_label(name) else None
    if len(builder) > 2:
        return None
    items = tuple(
        _read(branch)
        for item in split_at_signs(inside, ",;")
        for branch in _plus_and_minus(item.strip())
        if branch
    )
    return Listing(items, is_set=True)


def _read_based(text: str) -> Answer | None:
    numeral = _BASED.fullmatch(text) if len(text) <= _LONGEST_NUMERAL else None
    if numeral is None:
        return None
    sign, digits, name = numeral.groups()
    base = int(name) if name.isdigit() and len(name) < 3 else _NUMBER_WORDS.get(name)
    if base is None or not 2 <= base <= 36 or not all(_is_digit(d, base) for d in digits):
        return None
    return Based(sign + (digits.lower().lstrip("0") or "0"), base)


def _is_digit(digit: str, base: int) -> bool:
    return digit == "." or (digit.isascii() and digit.isalnum() and int(digit, 36) < base)


def _read_ratio(text: str) -> Answer | None:
    parts = split_at_signs(text, ":")
    if len(parts) < 2:
        return None
    return Ratio(tuple(_read(part.strip()) for part in parts))


def _read_scalar(text: str) -> Answer:
    measured = split_unit(text)
    body = _TEXT.sub(_plain_piece, measured.body)
    if not body.strip():
        return Opaque(text)
    try:
        tree = read_expression(without_outer_braces(body))
    except Unreadable:
        flat = _TEXT.sub(r" \1 ", text)
        words = flat != text or any(not _mathematical(word) for word in _WORD.findall(flat))
        return Text(text_key(flat)) if words and text_key(flat) else Opaque(text)
    if measured.multiplier != 1:
        tree = Operation("*", (tree, Number(Fraction(measured.multiplier))))
    return Scalar(tree, measured.unit)


def _plain_piece(piece: re.Match[str]) -> str:
    r"""`\text{C}` and `\text{(C)}` are the letter; longer words stay text."""
    inside = piece.group(1).strip()
    return f" {inside} " if len(inside.strip("() ")) <= 1 or inside.isdigit() else piece.group()
