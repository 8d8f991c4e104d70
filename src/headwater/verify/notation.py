r"""One spelling for the many ways of writing an answer.

`normalise` turns unicode, LaTeX styling, spacing commands and digit grouping into a small common
notation, without judging what the answer means. Every step is linear in the text.
"""

from __future__ import annotations

import re
import unicodedata

_SUPERSCRIPTS = dict(
    zip(
        "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱᵃᵇᶜᵈᵉᶠᵍʰʲᵏˡᵐᵒᵖʳˢᵗᵘᵛʷˣʸᶻ",
        "0123456789+-()niabcdefghjklmoprstuvwxyz",
        strict=True,
    )
)
_SUBSCRIPTS = dict(
    zip("₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₐₑₕᵢⱼₖₗₘₙₒₚᵣₛₜᵤᵥₓ", "0123456789+-()aehijklmnoprstuvx", strict=True)
)
_FRACTIONS = {
    letter: unicodedata.normalize("NFKC", letter).split("⁄") for letter in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"
}
_GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "ζ": "zeta",
    "η": "eta", "θ": "theta", "λ": "lambda", "μ": "mu", "ν": "nu", "ξ": "xi", "π": "pi",
    "ρ": "rho", "σ": "sigma", "τ": "tau", "φ": "phi", "ϕ": "phi", "χ": "chi", "ψ": "psi",
    "ω": "omega", "Γ": "Gamma", "Δ": "Delta", "Θ": "Theta", "Λ": "Lambda", "Σ": "Sigma",
    "Φ": "Phi", "Ψ": "Psi", "Ω": "Omega",
}  # fmt: skip
_SIGNS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": r"\times ", "·": r"\cdot ",
    "⋅": r"\cdot ", "∙": r"\cdot ", "∗": "*", "÷": r"\div ", "≤": r"\le ", "≥": r"\ge ",
    "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∞": r"\infty ", "∪": r"\cup ",
    "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ", "∓": r"\mp ", "°": r"^\circ ", "º": r"^\circ ",
    "′": "'", "’": "'", "″": "''", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "⁄": "/", "∕": "/",
    "∠": r"\angle ", "…": r"\ldots ", "“": "", "”": "", "∖": r"\setminus ",
    "⟨": "(", "⟩": ")", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ",
    "⌉": r"\rceil ", "￥": "¥", "\u200b": "", "\u200c": "", "\u200d": "",
    "\u2060": "", "\ufeff": "",
}  # fmt: skip
_LETTERS = str.maketrans(_SIGNS | {letter: f"\\{name} " for letter, name in _GREEK.items()})

_RAISED = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_LOWERED = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
_PRESET_FRACTION = re.compile(f"[{''.join(_FRACTIONS)}]")
_ROOT_SIGN = re.compile(r"([√∛∜])\s*(\d+(?:\.\d+)?)?")
_ROOT_INDEX = {"√": "", "∛": "[3]", "∜": "[4]"}

_COMMANDS = {
    "dfrac": r"\frac", "tfrac": r"\frac", "cfrac": r"\frac", "leq": r"\le ", "leqslant": r"\le ",
    "geq": r"\ge ", "geqslant": r"\ge ", "lt": "<", "gt": ">", "neq": r"\ne ", "infin": r"\infty ",
    "ast": "*", "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]", "lvert": "|",
    "rvert": "|", "vert": "|", "mid": "|", "colon": ":", "dots": r"\ldots ", "cdots": r"\ldots ",
    "varnothing": r"\emptyset ", "degree": r"^\circ ", "degrees": r"^\circ ", "arcsin": r"\arcsin ",
    "vee": r" \text{ or } ", "lor": r" \text{ or } ", "land": r" \text{ and } ",
    "wedge": r" \text{ and } ", "varphi": r"\phi ", "varepsilon": r"\epsilon ", "tbinom": r"\binom",
    "dbinom": r"\binom", "bar": r"\overline", "prime": "'",
    "percent": "%", "pounds": "£", "euro": "€", "lparen": "(",
    "rparen": ")", "langle": "(", "rangle": ")", "minus": "-", "plus": "+", "bold": "", "left": "",
    "right": "", "big": "",
    "Big": "", "bigg": "", "Bigg": "", "bigl": "", "bigr": "", "Bigl": "", "Bigr": "", "biggl": "",
    "biggr": "", "displaystyle": "", "textstyle": "", "limits": "", "nolimits": "", "middle": "",
    "quad": " ", "qquad": " ", "thinspace": " ", "enspace": " ", "space": " ", "nobreakspace": " ",
    "hfill": " ", "newline": " ", "boldsymbol": "", "mathbf": "", "mathit": "", "mathsf": "",
    "bm": "", "mathnormal": "", "rm": "", "bf": "", "it": "", "mathop": "", "mathrel": "",
    "boxed": "", "tiny": "", "small": "", "normalsize": "", "large": "", "Large": "", "LARGE": "",
    "huge": "", "Huge": "", "scriptstyle": "", "scriptscriptstyle": "", "checkmark": "",
}  # fmt: skip
_TEXT_COMMANDS = frozenset(
    {
        "text", "textbf", "textit", "textrm", "textsf", "texttt", "textnormal", "mbox", "hbox",
        "fbox", "mathrm", "operatorname", "emph", "mathtt", "underline", "textup",
        "textsc", "textmd", "mathring",
    }
)  # fmt: skip
_COMMAND = re.compile(r"\\([a-zA-Z]+)(?:\*(?=\{))?[ \t\n]*|\\([^a-zA-Z])", re.DOTALL)
_SPACES_OF_TEX = frozenset(",;:! >/\t\n()[]")
_DOUBLED_BACKSLASH = re.compile(r"\\\\(?=[A-Za-z])")
_BOLD = re.compile(r"\*\*([^*]+)\*\*")
_NO_BRACKET = re.compile(r"\\(?:left|right) ?\.")
_COLOUR = re.compile(r"\\(?:text)?color ?\{[^{}]*\}")
_PHANTOM = re.compile(r"\\[hv]?phantom ?(?:\{[^{}]*\}|.)")
_TEXT_MARK = re.compile(r"\\text ?\{ ?[.,;:]? ?\}$")
_TEXT_DOLLAR = re.compile(r"\\text ?\{([^{}]*\\\$) ?\}")
_GROUPED_BY_TEX = re.compile(
    r"(?<![\d.,}!])[1-9]\d{0,2}(?:\s*(?:\{\s*,\s*\}|,\s*\\!)\s*\d{3})+(?!\d)"
)
_GROUPED_BY_COMMA = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
_GROUPED_BY_SPACE = re.compile(
    r"(?<![\d.,/^_}\w] )(?<![\d.,/^_}\w])\d{1,3}(?: \d{3})+(?![\d/]| ?/| \d(?!\d?/)| ?\\frac)"
)
_NO_DIGIT = re.compile(r"\D+")
_BLANKS = re.compile(r"\s+")


def normalise(text: str) -> str:
    r"""Return `text` in the common notation.

    >>> normalise("$\\dfrac{1}{2}\\,x²$"), normalise("1,\\!722"), normalise("√2 · π")
    ('\\frac{1}{2} x^{2}', '1722', '\\sqrt{2} \\cdot\\pi')
    """
    text = _without_unicode(text)
    if "\\" in text:
        text = _without_decoration(text)
    if bold := _BOLD.fullmatch(text.strip()):
        text = bold.group(1)
    if "," in text and ("\\!" in text or "}" in text):
        text = _GROUPED_BY_TEX.sub(lambda number: _NO_DIGIT.sub("", number.group()), text)
    text = _COMMAND.sub(_common_command, text)
    text = text.replace("$", " ").replace("~", " ").replace("**", "^").replace("\u00a4", r"\$")
    text = _TEXT_DOLLAR.sub(r"\1", _TEXT_MARK.sub("", _BLANKS.sub(" ", text).strip()))
    text = _without_closing_mark(text)
    return _join_digit_groups(text)


def _without_decoration(text: str) -> str:
    r"""Without colours and phantoms, and with `\\\\frac`, as doubly escaped text has it, single."""
    if "\\begin" not in text or "\\\\begin" in text:
        if "\\\\begin" in text:
            text = text.replace("\\\\", "\\")
        text = _DOUBLED_BACKSLASH.sub(lambda _: "\\", text)
    text = _NO_BRACKET.sub("", text)
    return _PHANTOM.sub("", _COLOUR.sub("", text)) if "o" in text else text


def _without_unicode(text: str) -> str:
    if text.isascii():
        return text
    text = _RAISED.sub(lambda run: "^{" + _mapped(run.group(), _SUPERSCRIPTS) + "}", text)
    text = _LOWERED.sub(lambda run: "_{" + _mapped(run.group(), _SUBSCRIPTS) + "}", text)
    text = _PRESET_FRACTION.sub(_spelled_fraction, text)
    text = _ROOT_SIGN.sub(_spelled_root, text)
    return unicodedata.normalize("NFKC", text.translate(_LETTERS)).translate(_LETTERS)


def _mapped(run: str, letters: dict[str, str]) -> str:
    return "".join(letters[letter] for letter in run)


def _spelled_fraction(match: re.Match[str]) -> str:
    over, under = _FRACTIONS[match.group()]
    return rf"\frac{{{over}}}{{{under}}}"


def _spelled_root(match: re.Match[str]) -> str:
    sign, digits = match.groups()
    radicand = f"{{{digits}}}" if digits else " "
    return rf"\sqrt{_ROOT_INDEX[sign]}{radicand}"


def _common_command(match: re.Match[str]) -> str:
    name, sign = match.groups()
    if name is None:
        if sign == "$":
            return "\u00a4"
        if sign == "%":
            return "%"
        if sign == "\\":
            return r"\\ "
        if sign == "|":
            return "|"
        return " " if sign in _SPACES_OF_TEX else f"\\{sign}"
    if name in _TEXT_COMMANDS:
        return r"\text"
    if name in _COMMANDS:
        return _COMMANDS[name]
    following = match.string[match.end() : match.end() + 1]
    return f"\\{name} " if following.isalnum() else f"\\{name}"


def _without_closing_mark(text: str) -> str:
    while text and text[-1] in ".,;:\\" and not text.endswith(("...", "\\;")):
        text = text[:-1].rstrip()
    return text


def _join_digit_groups(text: str) -> str:
    """Join 1,234,567 and 1 234 567, but not inside brackets, where a comma separates."""
    if not any(mark in text for mark in ", "):
        return text
    pieces, depth, since = [], 0, 0
    for place, letter in enumerate(text):
        if letter in "([{":
            if depth == 0:
                pieces.append(_joined(text[since:place]))
                since = place
            depth += 1
        elif letter in ")]}" and depth:
            depth -= 1
            if depth == 0:
                inside = text[since : place + 1]
                pieces.append(_joined(inside) if inside[0] == "{" else inside)
                since = place + 1
    tail = text[since:]
    pieces.append(tail if depth else _joined(tail))
    return "".join(pieces)


def _joined(text: str) -> str:
    text = _GROUPED_BY_COMMA.sub(lambda number: number.group().replace(",", ""), text)
    return _GROUPED_BY_SPACE.sub(lambda number: number.group().replace(" ", ""), text)
