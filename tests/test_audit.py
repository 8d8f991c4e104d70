"""`make audit`: what is found fails, what was not looked up is never called sound."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "audit.py"
SKIPPED = '{"name": "a", "skip_reason": "not found"}'
SOUND = '{"name": "b", "version": "1.0", "vulns": []}'
BROKEN = '{"name": "c", "version": "2.0", "vulns": [{"id": "CVE-1", "fix_versions": ["2.1"]}]}'


@pytest.mark.parametrize(
    ("dependencies", "code", "says"),
    [
        ([SOUND], 0, "no known vulnerability in 1 packages\n"),
        ([SOUND, SKIPPED], 0, "no known vulnerability in 1 packages; 1 could not be looked up"),
        ([SKIPPED, SKIPPED], 0, "NOT DONE (the service knows none of the 2 packages)"),
        ([SOUND, BROKEN, SKIPPED], 1, "c 2.0: CVE-1; fixed in 2.1"),
        (None, 0, "NOT DONE (ConnectionError: no route)"),
    ],
)
def test_the_audit_says_what_was_looked_up(
    tmp_path: Path, dependencies: list[str] | None, code: int, says: str
) -> None:
    answer = None if dependencies is None else f'{{"dependencies": [{", ".join(dependencies)}]}}'
    (tmp_path / "pip_audit.py").write_text(
        f"import sys\nanswer = {answer!r}\n"
        "sys.exit('ConnectionError: no route') if answer is None else print(answer)\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, says in done.stdout) == (code, True), done
