"""Runs tests/integrations/release_smoke_cases.py under the releases of transformers: the first and the last patch of each minor version
from 5.0 on.

Each release gets a folder of its own with what it needs besides the packages of the environment that this is started with, which stays
as it is; the folders are kept, so a second run downloads nothing. The result is a table, release by layout, and exit status 1 when
anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CASES = "tests.integrations.release_smoke_cases"
OLDER = ("4.57.6",)  # the one transformers 4 that is supported
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
Row = dict[str, Any]


def published() -> list[str]:
    """The releases on the package index, without candidates, oldest first."""
    done = subprocess.run([*PIP, "index", "versions", "transformers"], capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("Available versions:"))
    return sorted(line.partition(":")[2].replace(" ", "").split(","), key=number_of)


def number_of(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".") if part.isdigit())


def first_and_last(releases: list[str]) -> list[str]:
    """Of each minor version from 5.0 on, of sorted releases."""
    by_minor: dict[tuple[int, ...], list[str]] = {}
    for release in releases:
        if number_of(release) >= (5,):
            by_minor.setdefault(number_of(release)[:2], []).append(release)
    return [release for found in by_minor.values() for release in dict.fromkeys((found[0], found[-1]))]


def environment(folder: Path, release: str) -> Path:
    """The interpreter of a folder with this release in front of the packages of our own environment."""
    place = folder.absolute() / release
    python, ready = place / "bin" / "python", place / "ready"
    if not ready.exists():
        venv.create(place, clear=True, symlinks=True)
        packages = place / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        shared = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        (packages / "shared.pth").write_text("\n".join(shared) + "\n")
        install = [*PIP, "--python", str(python), "install", "--quiet", "--no-compile", f"transformers=={release}"]
        subprocess.run(install, check=True)
        ready.touch()
    return python


def smoke(folder: Path, release: str) -> Row:
    """What the cases found out under this release; a run that breaks is a failure of the release."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        try:
            command = [str(environment(folder, release)), "-m", CASES, str(result)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": str(ROOT)})
            row = json.loads(result.read_text()) if result.exists() else failure(release, done.stderr)
        except subprocess.SubprocessError as error:
            row = failure(release, str(error))
    if row["transformers"] != release:
        row = failure(release, f"transformers {row['transformers']} was imported instead")
    return row | {"seconds": round(time.perf_counter() - begin, 1)}


def failure(release: str, text: str) -> Row:
    lines = text.strip().splitlines() or ["no output"]
    return {"transformers": release, "layouts": {}, "reason": lines[-1]}


def failures(row: Row) -> list[str]:
    """Sentences, one for each failure of a release."""
    found = [f"{layout} ({one['architecture']}): {one['reason']}" for layout, one in row["layouts"].items() if one["path"] == "fails"]
    return found + ([row["reason"]] if "reason" in row else [])


def table(rows: list[Row]) -> str:
    """Markdown: one line per release, one column per layout, and the reasons of failures below."""
    layouts = list(next((row["layouts"] for row in rows if row["layouts"]), {}))
    names = [next((r["layouts"][x]["architecture"] for r in rows[::-1] if "architecture" in r["layouts"].get(x, {})), "") for x in layouts]
    lines = [
        "# Releases of transformers",
        "",
        "The first and the last patch release of each minor version, one architecture per layout of experts: forward and all gradients",
        "by the error rule, and bit for bit the same after `disable`. Made by `make smoke`. A dash: the release does not have it.",
        "",
        "| transformers | " + " | ".join(f"{layout}<br>{name}" for layout, name in zip(layouts, names, strict=True)) + " |",
        "|---" * (len(layouts) + 1) + "|",
    ]
    for row in rows:
        paths = [row["layouts"].get(layout, {"path": "fails"})["path"].replace("not there", "-") for layout in layouts]
        lines.append(f"| {row['transformers']} | " + " | ".join(paths) + " |")
    reasons = [f"- {row['transformers']}: {reason}" for row in rows for reason in failures(row)]
    return "\n".join([*lines, *(["", "Failures:", "", *reasons] if reasons else [])]) + "\n"


def write(rows: list[Row], results: Path | None, markdown: Path | None) -> None:
    if results is not None:
        lines = ",\n".join(json.dumps({key: value for key, value in row.items() if key != "seconds"}) for row in rows)
        results.write_text(f"[\n{lines}\n]\n")
    if markdown is not None:
        markdown.write_text(table(rows))


def main() -> int:
    parser = argparse.ArgumentParser(description="One architecture per layout under many releases of transformers.")
    parser.add_argument("folder", type=Path, help="where the releases are installed and kept, some 60 MB each")
    parser.add_argument("--release", action="append", help="only this one (may be given several times)")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--markdown", type=Path, help="file for the table")
    chosen = parser.parse_args()
    rows = []
    for release in chosen.release or [*OLDER, *first_and_last(published())]:
        rows.append(smoke(chosen.folder, release))
        counts = {path: sum(one["path"] == path for one in rows[-1]["layouts"].values()) for path in ("fused", "composed", "fails")}
        print(f"{release:8} {rows[-1]['seconds']:6.1f} s  " + ", ".join(f"{n} {path}" for path, n in counts.items()), flush=True)
        for reason in failures(rows[-1]):
            print(f"  {reason}", flush=True)
        write(rows, chosen.json, chosen.markdown)  # each time, so that a run that is broken off leaves what it found out
    broken = sum(len(failures(row)) for row in rows)
    print(f"{len(rows)} releases in {sum(row['seconds'] for row in rows):.0f} s, {broken} failures")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
