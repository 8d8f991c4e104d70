"""The torture, in short: a dozen kills and other faults, and the same result."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.slow
def test_a_dozen_kills_change_no_bit() -> None:
    command = "-m torture --small --kills 12 --seconds 900 --lanes 1 --seed 3"
    paths = os.pathsep.join([str(TESTS), *(path for path in sys.path if path)])
    done = subprocess.run(
        [sys.executable, *command.split()],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"(\d+) kills, (\d+) runs to the end", done.stdout)
    assert found is not None
    assert int(found[1]) >= 12
    assert int(found[2]) >= 1
