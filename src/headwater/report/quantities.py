"""Numbers as a person reads them: shares, points, counts, durations, p-values."""

from __future__ import annotations

from collections.abc import Mapping

_GIB = 1024.0**3

COUNTER_NAMES: Mapping[str, str] = {
    "labels": "labels",
    "verifier_calls": "verifier calls",
    "prompts": "prompts",
    "generated_tokens": "generated tokens",
    "teacher_scored_tokens": "teacher-scored tokens",
    "trained_tokens": "trained tokens",
    "updates": "updates",
    "flops": "FLOPs",
    "seconds": "stage time",
    "peak_memory_bytes": "peak memory",
}

#: What the table of arms shows of an arm's spending.
TABLE_COUNTERS = ("labels", "verifier_calls", "generated_tokens", "updates", "seconds")


def percent(share: float) -> str:
    """A share as per cent with one decimal.

    >>> percent(0.6125)
    '61.3%'
    """
    return f"{share * 100 + 1e-9:.1f}%"


def points(difference: float) -> str:
    """A difference of shares in percentage points, signed.

    >>> points(0.087), points(-0.004), points(0.0)
    ('+8.7', '−0.4', '0.0')
    """
    rounded = round(difference * 100, 1)
    if rounded == 0:
        return "0.0"
    return f"{'+' if rounded > 0 else '−'}{abs(rounded):.1f}"


def count(number: float) -> str:
    """A count, exact below ten thousand and to three figures beyond.

    >>> count(9600), count(12_800), count(1_234_567), count(3.2e15)
    ('9,600', '12.8k', '1.23M', '3.2e15')
    """
    if number < 9_999.5:
        return f"{number:,.0f}"
    for size, suffix in ((1e3, "k"), (1e6, "M"), (1e9, "G"), (1e12, "T")):
        if number < size * 999.5:
            return f"{number / size:.3g}{suffix}"
    mantissa, exponent = f"{number:.2g}".split("e+")
    return f"{mantissa}e{int(exponent)}"


def duration(seconds: float) -> str:
    """Seconds as the two largest units.

    >>> duration(0.42), duration(48.3), duration(200), duration(3725)
    ('0.4 s', '48 s', '3 min 20 s', '1 h 2 min')
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"


def hours(amount: float) -> str:
    """Hours for adding up in a column: two figures below ten, whole beyond.

    >>> hours(0.034), hours(3.21), hours(41_234.5)
    ('0.03', '3.2', '41,234')
    """
    if amount < 0.995:
        return f"{amount:.2f}"
    return f"{amount:.1f}" if amount < 9.95 else f"{amount:,.0f}"


def p_value(probability: float) -> str:
    """A p-value with its sign, never rounded to zero; its spaces do not break.

    >>> p_value(0.031).split(), p_value(0.00009999).split()
    (['p', '=', '0.031'], ['p', '<', '0.001'])
    """
    text = "< 0.001" if probability < 0.001 else f"= {probability:.2g}"
    return f"p {text}".replace(" ", "\N{NO-BREAK SPACE}")


def bare_p_value(probability: float) -> str:
    """A p-value for a column that says p in its heading.

    >>> bare_p_value(0.031)
    '0.031'
    """
    return p_value(probability).removeprefix("p\N{NO-BREAK SPACE}").removeprefix("=").strip()


def spent(counter: str, amount: float) -> str:
    """An amount of one of the ledger's counters; nothing spent is a dash.

    >>> spent("seconds", 200), spent("peak_memory_bytes", 2**31), spent("labels", 0)
    ('3 min 20 s', '2.0 GiB', '–')
    """
    if not amount:
        return "–"
    if counter == "seconds":
        return duration(amount)
    if counter == "peak_memory_bytes":
        return f"{amount / _GIB:.1f} GiB"
    return count(amount)


def byte_count(amount: float) -> str:
    """Bytes in the largest unit that leaves at least one.

    >>> byte_count(520), byte_count(414_880), byte_count(3.2e9)
    ('520 bytes', '405.2 KiB', '3.0 GiB')
    """
    if amount < 1024:
        return f"{amount:.0f} bytes"
    for unit in ("KiB", "MiB"):
        amount /= 1024
        if amount < 1024:
            return f"{amount:.1f} {unit}"
    return f"{amount / 1024:.1f} GiB"


def tiny(value: float) -> str:
    """A value below a thousandth in short.

    >>> tiny(4e-08), tiny(1.2e-7), tiny(0.0)
    ('4e-8', '1.2e-7', '0')
    """
    mantissa, _, exponent = f"{value:.2g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def stage_name(model: str, kind: str) -> str:
    """A stage's kind beside the name of its model, without saying the model twice.

    >>> stage_name("teacher", "teacher_rollouts(1H)"), stage_name("student", "sample_sft")
    ('rollouts(1H)', 'sample sft')
    """
    return kind.removeprefix(f"{model}_").replace("_", " ")
