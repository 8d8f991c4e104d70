"""Known vulnerabilities of what is installed beside this interpreter, as pip-audit finds them.

Ends with 1 for one that is found. A service that cannot be asked, or knows none of the packages,
is said and fails nothing; "nothing found" is only said of packages that were looked up.
"""

from __future__ import annotations

import json
import subprocess
import sys

_SECONDS = 300
_COMMAND = (
    *(sys.executable, "-m", "pip_audit", "--local", "--skip-editable", "--format", "json"),
    *("--progress-spinner", "off", "--timeout", "20"),
)


def main() -> int:
    """Ask, say what came of it, and return the exit code."""
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter with our own arguments
            _COMMAND, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return _not_done(f"no answer within {_SECONDS} s")
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        return _not_done(last[0][:200])
    looked_up = [one for one in packages if "skip_reason" not in one]
    found = [one for one in looked_up if one.get("vulns")]
    for one in found:
        for vulnerability in one["vulns"]:
            fixed = ", ".join(vulnerability.get("fix_versions", [])) or "no version yet"
            print(f"audit: {one['name']} {one['version']}: {vulnerability['id']}; fixed in {fixed}")
    if found:
        print("audit: install fixed versions, and write them into constraints.txt")
        return 1
    if not looked_up:
        return _not_done(f"the service knows none of the {len(packages)} packages")
    unknown = len(packages) - len(looked_up)
    also = f"; {unknown} could not be looked up" if unknown else ""
    print(f"audit: no known vulnerability in {len(looked_up)} packages{also}")
    return 0


def _not_done(reason: str) -> int:
    print(f"audit: NOT DONE ({reason}); run `make audit` where the network reaches the service")
    return 0


if __name__ == "__main__":
    sys.exit(main())
