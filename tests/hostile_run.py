"""A run folder in which every text that somebody else could have written is hostile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from headwater.report.results import RESULTS_FILE
from run_folder import make_run

#: Sets a mark on the page if it runs; `%` is where one payload differs from another.
OWN = "document.documentElement.dataset.owned='%s';document.title='owned'"
PAYLOADS: dict[str, str] = {
    "script": f"<script>{OWN % 'script'}</script>",
    "closed script": f"</script><script>{OWN % 'closed'}</script>",
    "closed elements": f"</pre></style></title></textarea>--><script>{OWN % 'elements'}</script>",
    "image": f'<img src=x onerror="{OWN % "image"}">',
    "svg": f"<svg><animate onbegin={OWN % 'svg'} attributeName=x dur=1s>",
    "double quote": f'" autofocus tabindex=0 onfocus="{OWN % "double"}" x="',
    "single quote": f"' autofocus tabindex=0 onfocus='{OWN % chr(34)}' x='",
    "frame": '"><iframe srcdoc="<script>parent.document.title=1</script>"></iframe>',
    "link": '<a href="javascript:alert(1)">x</a><link rel=stylesheet href=//evil.example/x.css>',
    "refresh": '<meta http-equiv="refresh" content="0;url=http://evil.example/">',
    "form": "<form action=//evil.example><button autofocus>x</button></form><base href=//evil/>",
    "template": "{{ 7 * 7 }}{% for x in cycler.__init__.__globals__ %}{{ x }}{% endfor %}",
    "entities": "&lt;script&gt;&#x3c;script&#x3e;&NewLine;",
    "markup of a terminal": "[red]x[/red][link=http://evil.example]y[/link][/] :bomb:",
    "escape sequences": "\x1b]0;owned\x07\x1b[2J\x1b[31m\x9b31m\r\x08",
    "bidirectional": "\u202egnp.exe\u202c \u2066x\u2069 \u200b\u200d\ufeff\u2060\U000e0041",
    "line ends": "a\u2028b\u2029c\x85d\x0be\x0cf",
    "nul": "a\x00b",
    "formula": '=HYPERLINK("http://evil.example","x")',
    "latex": "\\input{/etc/passwd} $\\write18{x}$ \\end{document} % & # _ ^ ~",
    "mathtext": "$\\frac{1}{",
    "zalgo": "z" + "\u0301" * 60,
    "unbroken": "W" * 300,
}
#: Of results.json: texts that name something, wherever they stand.
_NAMES = frozenset(
    {
        *("name", "title", "question", "eval_set", "model", "pool", "statement", "student"),
        *("cpu", "torch", "transformers", "headwater", "arm", "better", "than", "rule", "against"),
        *("warnings", "chain", "alarms", "contamination", "pools", "used_by", "arms", "base"),
        *("signal", "after"),
    }
)


def make_hostile_run(run_dir: Path) -> None:
    """Write a run folder as training leaves it, then all its texts as a stranger might."""
    make_run(run_dir, seeds=(0,), eval_sets=("arithmetic", "hard"))
    path = run_dir / RESULTS_FILE
    path.write_text(json.dumps(_hostile(json.loads(path.read_text()), None)), encoding="utf-8")
    (run_dir / "recipe.yaml").write_text("\n".join(PAYLOADS.values()), encoding="utf-8")
    texts = [*PAYLOADS.values(), "x" * 2_000_000, "\n" * 50_000, "y \x1b[0m" * 20_000]
    for file in run_dir.glob("artifacts/*/*.parquet"):
        table = pq.read_table(file)
        rows = table.to_pylist()
        for number, row in enumerate(rows):
            row["response"] = texts[number % len(texts)]
            row["prompt"] = texts[(number + 7) % len(texts)]
            row["problem_id"] += list(PAYLOADS.values())[int(row["problem_id"][1:])]
            if row["verdict"] is not None and number % 5 == 4:
                row["verdict"] = PAYLOADS["double quote"]
        pq.write_table(pa.Table.from_pylist(rows, table.schema), file)


def _hostile(value: Any, key: str | None) -> Any:
    """The value with payloads behind the names in it: the same name always with the same."""
    if isinstance(value, dict):
        renames = key in ("pools", "contamination")
        return {
            (_worse(name) if renames else name): _hostile(below, key if renames else name)
            for name, below in value.items()
        }
    if isinstance(value, list):
        return [_hostile(below, key) for below in value]
    return _worse(value) if isinstance(value, str) and key in _NAMES else value


def _worse(name: str) -> str:
    """A name that is not yet hostile, with one payload in front and all behind."""
    if name in ("teacher", "student"):
        return name
    payloads = list(PAYLOADS.values())
    first = payloads[sum(map(ord, name)) % len(payloads)]
    return f"{first} {name} {' '.join(payloads[: 1 + len(name) % len(payloads)])}"
