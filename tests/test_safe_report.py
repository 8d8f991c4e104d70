"""A report made of hostile completions, names and titles is text, in every form it takes."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from headwater.report.files import write_report
from headwater.report.results import read_results
from headwater.report.samples import print_samples
from headwater.report.terminal import print_summary
from headwater.tasks.contamination_check import check_contamination
from headwater.visible import csv_text, excerpt, one_line, visible
from hostile_run import OWN, PAYLOADS, make_hostile_run
from run_folder import make_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium: `apt-get install chromium`"
)
#: What draws nothing, moves the cursor or turns the direction of reading.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ud800-\udfff\U000e0000-\U000e01ef]"
)
#: What the templates and the plots write; nothing else may be in a page.
ELEMENTS = """
    html head meta title style body header main footer section h1 h2 h3 p ul li div span table
    thead tbody tr th td details summary pre code small b i br dl dt dd figure figcaption
    svg g path defs use clippath rect text
"""
ATTRIBUTES = """
    lang charset http-equiv content name class style title colspan open role aria-label scope
    data-name id d transform width height x y viewbox xmlns xmlns:xlink xlink:href href version
    clip-path aria-hidden fill stroke stroke-width stroke-dasharray x1 x2 y1 y2
"""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    make_hostile_run(folder)
    write_report(read_results(folder), folder)
    return folder


@pytest.fixture(scope="module")
def page(hostile: Path) -> str:
    return (hostile / "report.html").read_text(encoding="utf-8")


class Parts(HTMLParser):
    """Every element, attribute, class and piece of text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: set[str] = set()
        self.attributes: dict[str, set[str]] = {}
        self.text: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, set()).add(value or "")

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_no_element_and_no_attribute_of_the_page_comes_from_the_data(page: str) -> None:
    parts = Parts(page)
    assert parts.elements <= set(ELEMENTS.split())
    assert parts.attributes.keys() <= set(ATTRIBUTES.split())
    links = parts.attributes.get("href", set()) | parts.attributes.get("xlink:href", set())
    assert all(link.startswith("#") for link in links)
    classes = {name for value in parts.attributes["class"] for name in value.split()}
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in classes)
    assert all("url(" not in value for value in parts.attributes["style"])


def test_every_payload_is_there_to_be_read(page: str) -> None:
    text = "".join(Parts(page).text)
    missing = [name for name, payload in PAYLOADS.items() if visible(payload) not in text]
    assert missing == []
    assert not UNSEEN.search(page)


def test_a_response_of_megabytes_is_cut_with_its_length_said(page: str) -> None:
    assert "of 2,000,000 characters not shown" in page
    assert len(page) < 3_000_000


def test_the_page_forbids_whatever_could_run_or_be_fetched(page: str) -> None:
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert page.index(policy.group(0)) < page.index("<title>")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.group(1).split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules.keys() <= {"default-src", "style-src", "img-src", "base-uri", "form-action"}


def test_nothing_in_a_terminal_is_obeyed(hostile: Path) -> None:
    for terminal in (False, True):
        out = io.StringIO()
        console = Console(file=out, width=120, force_terminal=terminal, highlight=False)
        print_summary(read_results(hostile), console)
        print_samples(hostile, console, number=12)
        shown = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()) if terminal else out.getvalue()
        assert not UNSEEN.search(shown)
        assert "]8;" not in shown  # no link
        flat = re.sub(r"\s+", "", shown)
        assert "[red]x[/red][link=http://evil.example]y[/link][/]:bomb:" in flat
        assert max(map(cell_len, shown.split("\n"))) <= 120
        assert len(shown) < 2_000_000


def test_no_cell_of_a_table_is_a_formula(hostile: Path) -> None:
    files = sorted((hostile / "tables").glob("*.csv"))
    assert files
    cells = 0
    for file in files:
        with file.open(encoding="utf-8", newline="") as rows:
            for row in csv.reader(rows):
                for cell in row:
                    cells += 1
                    number = re.fullmatch(r"-?[\d.]+(e-?\d+)?", cell)
                    assert number or cell.lstrip()[:1] not in set("=+-@"), (file.name, cell)
                    assert not UNSEEN.search(cell)
    assert cells > 100
    for formula in ("=1", "+1", "-1", "@x", "\t=1", "  =1", "\N{FULLWIDTH EQUALS SIGN}1"):
        assert csv_text(formula).startswith("'"), formula


def test_no_pair_of_a_contamination_check_is_a_formula(tmp_path: Path) -> None:
    rows = f'{{"id": "=1+1", "problem": {json.dumps(PAYLOADS["formula"])}, "answer": "2"}}'
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / name).write_text(rows, encoding="utf-8")
    found = check_contamination(str(tmp_path / "train.jsonl"), {"e": str(tmp_path / "eval.jsonl")})
    found.write_csv(tmp_path / "pairs.csv")
    with (tmp_path / "pairs.csv").open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["train_id"] == "'=1+1" and row["eval_text"].startswith("'=HYPERLINK")


def test_no_command_of_latex_comes_from_the_data(hostile: Path) -> None:
    text = "".join(file.read_text("utf-8") for file in (hostile / "tables").glob("*.tex"))
    ours = {
        *("begin", "end", "centering", "caption", "label", "toprule", "midrule", "bottomrule"),
        *("textbackslash", "textasciitilde", "textasciicircum", "textless", "textgreater"),
        *("textbar", "textbf", "pm", "to"),
    }
    assert set(re.findall(r"\\([a-zA-Z]+)", text)) <= ours
    assert r"\textbackslash{}input\{/etc/passwd\}" in text


def test_figures_hold_no_script(hostile: Path) -> None:
    figures = list((hostile / "figures").glob("*.svg"))
    assert figures
    for figure in figures:
        parts = Parts(figure.read_text(encoding="utf-8"))
        assert parts.elements <= {*ELEMENTS.split(), "metadata", "rdf:rdf", "cc:work", "dc:type"}
        assert not any(name.startswith("on") for name in parts.attributes)


def test_text_is_shown_on_one_line_and_bounded() -> None:
    assert one_line("a\r\nb\x1b[2J") == "a<U+000D> b<U+001B>[2J"
    assert one_line("x" * 5_000).endswith("... (5,000 characters)")
    assert len(excerpt("x" * 10**6)) < 200_200
    assert visible("a\u200bb\u3164c\ufe00d") == "a<U+200B>b<U+3164>c<U+FE00>d"


# --- in a browser --------------------------------------------------------------------------------


def dumped(page: str, folder: Path) -> str:
    """The page as Chromium has it once it is loaded, as HTML."""
    assert CHROMIUM is not None
    folder.mkdir()
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *(
            "--disable-background-networking",
            "--no-first-run",
            f"--user-data-dir={folder / 'user'}",
        ),
        *("--virtual-time-budget=3000", "--dump-dom", path.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    return done.stdout.decode()


def owned(dom: str) -> bool:
    return "data-owned" in dom.partition("<head")[0] or "<title>owned</title>" in dom


@needs_chromium
def test_a_browser_runs_nothing_of_a_hostile_report(page: str, tmp_path: Path) -> None:
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
    script = f"<script>{OWN % 'control'}</script>"
    with_script = page.replace("</body>", f"{script}</body>", 1)
    # By escaping alone, and by the policy alone; and the mark would be seen.
    assert not owned(dumped(policy.sub("", page), tmp_path / "escaped"))
    assert not owned(dumped(with_script, tmp_path / "forbidden"))
    assert owned(dumped(policy.sub("", with_script), tmp_path / "control"))


@needs_chromium
def test_a_browser_shows_the_whole_of_an_ordinary_report(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    make_run(folder, seeds=(0,))
    write_report(read_results(folder), folder)
    dom = dumped((folder / "report.html").read_text(encoding="utf-8"), tmp_path / "browser")
    assert "Where the numbers come from" in dom and "</svg>" in dom
