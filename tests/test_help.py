"""Help, completion in a shell, and what the command line loads to show them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from headwater.cli.app import PANELS, app
from headwater.cli.entry import main
from headwater.recipes import copy_recipe, shipped_recipes

COMMAND = get_command(app)
VERBS = COMMAND.commands  # type: ignore[attr-defined]
#: Arguments of examples that stand for what only the reader has.
PLACEHOLDERS = ("my-study.yaml", "cases.jsonl", "train.jsonl", "ID-OR-PATH", "runs/", ">")


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    assert left.value.code == 0
    return capsys.readouterr().out


def test_verbs_stand_in_panels_those_of_a_study_first(capsys: pytest.CaptureFixture[str]) -> None:
    shown = output(capsys, "--help")
    headings = [name for name in re.findall(r"─ (\w+) ─", shown) if name in PANELS]
    assert headings == list(PANELS)
    places = [shown.index(f"│ {verb} ") for verb in ("run", "plan", "eval", "verify", "doctor")]
    assert places == sorted(places)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_panel_and_examples_that_it_takes(
    capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    command = VERBS[verb]
    assert command.rich_help_panel
    heading, *examples = command.epilog.splitlines()
    assert heading == "Examples:" and examples
    shown = output(capsys, verb, "--help")
    for example in examples:
        assert example in shown  # not broken in a terminal of 80 columns
        dollar, called, named, *arguments = shlex.split(example)
        assert (dollar, called, named) == ("$", "headwater", verb)
        if ">" in arguments:
            arguments = arguments[: arguments.index(">")]
        command.make_context(verb, arguments)  # parses them; raises for what it does not know


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_prints_json(verb: str) -> None:
    assert any("--json" in parameter.opts for parameter in VERBS[verb].params)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["rnu"], "No such command 'rnu'; did you mean 'run'? see `headwater --help`"),
        (
            ["plan", "x", "--mean-respose", "3"],
            "No such option: --mean-respose; did you mean --mean-response? see `headwater plan "
            "--help`",
        ),
        (["plan"], "Missing argument 'RECIPE'; see `headwater plan --help`"),
        (
            ["recipes", "quickstrat"],
            "quickstrat: no such recipe, neither a file nor a shipped one; did you mean "
            "'quickstart'?",
        ),
    ],
)
def test_a_misspelt_word_comes_with_the_one_that_was_meant(
    capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert capsys.readouterr().err == f"headwater: {line}\n"


# --- completion ----------------------------------------------------------------------------------


@pytest.fixture
def offered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> object:
    """What bash is offered for the last word of a line, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def offer(line: str) -> list[str]:
        monkeypatch.setenv("_HEADWATER_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
        return output(capsys).split()

    return offer


def test_recipes_are_offered_shipped_and_local(offered, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    shipped = [one.name for one in shipped_recipes()]
    assert offered("headwater run ") == shipped
    assert offered("headwater run quick") == ["quickstart"]
    copy_recipe("quickstart", tmp_path / "queer.yaml")
    assert offered("headwater plan qu") == ["quickstart", "queer.yaml"]
    assert offered("headwater recipes qu") == ["quickstart"]


def test_runs_and_what_they_hold_are_offered(offered, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for name in ("first", "second", "no-run"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        if name != "no-run":
            (tmp_path / "runs" / name / "run.json").touch()
            copy_recipe("quickstart", tmp_path / "runs" / name / "recipe.yaml")
    assert offered("headwater report ") == ["runs/first", "runs/second"]
    assert offered("headwater samples runs/s") == ["runs/second"]
    assert offered("headwater samples runs/first --arm bri") == ["bridge", "bridge_grpo"]


def test_arms_profiles_and_keys_of_the_recipe_are_offered(offered) -> None:  # type: ignore[no-untyped-def]
    assert offered("headwater run quickstart --arms bri") == ["bridge", "bridge_grpo"]
    assert offered("headwater run quickstart --arms bridge,bri") == ["bridge,bridge_grpo"]
    assert offered("headwater plan qwen3-1.7b --profile f") == ["fast"]
    assert offered("headwater run quickstart --set stages.grpo.st") == ["stages.grpo.steps=24"]
    # A value that a shell would read something into is left to be written.
    assert offered("headwater run quickstart --set task.train") == ["task.train="]
    # Defaults, where no recipe is named yet.
    assert offered("headwater run --set stages.grpo.group_s") == ["stages.grpo.group_size=8"]


def test_names_of_sets_are_offered_and_nothing_where_nothing_is_known(offered) -> None:  # type: ignore[no-untyped-def]
    assert offered("headwater eval m --problems aime") == ["aime24", "aime25"]
    assert offered("headwater run nowhere.yaml --arms ") == []
    assert offered("headwater run nowhere.yaml --profile ") == []


def test_the_script_for_a_shell_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from headwater.cli import entry

    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m headwater --show-completion; exit"],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(entry.__file__).parents[2])},
    )
    assert "_HEADWATER_COMPLETE=complete_bash" in done.stdout


# --- speed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["recipes"]])
def test_nothing_heavy_is_loaded_to_help(arguments: list[str]) -> None:
    heavy = ("torch", "transformers", "numpy", "scipy", "pyarrow", "matplotlib", "yaml")
    code = (
        "import sys\n"
        "from headwater.cli.entry import main\n"
        f"try: main({arguments})\n"
        "except SystemExit: pass\n"
        f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
