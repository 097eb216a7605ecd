"""Runs one nvcc command for ninja: `python -m build_tools.run_nvcc SOURCE OBJECT -- nvcc ...`, in the repository's root.

Keeps ptxas' report beside the object, shows what is not part of that report, and fails, without leaving an object, when the
report has something check_ptxas complains about. A failed check therefore fails the next build as well.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from .checks import check_ptxas

REPORT = re.compile(
    r"^ptxas info\s*: (Compiling|Compile time|Function properties|Used|\d+ bytes gmem|Overriding)|^\s+\d+ bytes stack frame"
)


def main(source: str, target: str, command: list[str]) -> int:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in done.stdout.splitlines():
        if not REPORT.match(line):
            print(line)
    output = Path(target)
    if done.returncode:
        return done.returncode
    output.with_suffix(".ptxas").write_text(done.stdout)
    complaints = check_ptxas(done.stdout, source)
    if complaints:
        output.unlink()
        print("\n".join(complaints))
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[4:]))
