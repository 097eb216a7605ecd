"""Registers, spills, tensor-core instructions and 16-byte accesses of every CUDA kernel, read from a finished build.

`python -m tools.kernel_resources` prints them; `--record` writes csrc/kernels/cuda/resources.txt, with which a test compares
the next build. Registers and spills come from ptxas' reports beside the objects; instructions need cuobjdump (with nvdisasm beside
it), which not every toolkit has: without it those columns keep what was recorded.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from build_tools.checks import GEMM_FILES
from build_tools.products import BUILD_FOLDER
from build_tools.toolchain import find_nvcc, read_nvcc_version

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = ROOT / BUILD_FOLDER / "cuda" / "kernels"
RECORD = ROOT / "csrc" / "kernels" / "cuda" / "resources.txt"
INSTRUCTIONS = ("HMMA", "HGMMA", "LDSM", "LDGSTS", "UTMALDG", "UTMASTG", "LDG.128", "STG.128", "LD.128", "ST.128")


@dataclass
class Resources:
    """Of the kernels that share one line: the most registers and bytes spilled, and the instructions of all of them."""

    registers: int = 0
    spilled: int = 0
    instructions: Counter[str] | None = None  # None: not known

    def text(self) -> str:
        if self.instructions is None:
            return "?"
        return " ".join(f"{name}:{self.instructions[name]}" for name in INSTRUCTIONS if self.instructions[name]) or "-"


@dataclass
class Table:
    nvcc: str
    lines: dict[tuple[str, str, str], Resources] = field(default_factory=dict)  # (file, kernel, target)

    def line(self, *key: str) -> Resources:
        return self.lines.setdefault((key[0], key[1], key[2]), Resources())

    def __str__(self) -> str:
        head = f"# nvcc {self.nvcc}. Written by `python -m tools.kernel_resources --record`.\n# file target registers spilled kernel"
        body = [
            f"{file} {target} {r.registers} {r.spilled} {kernel} | {r.text()}" for (file, kernel, target), r in sorted(self.lines.items())
        ]
        return "\n".join([head + " | instructions", *body]) + "\n"


def demangle(names: list[str]) -> list[str]:
    """c++filt comes with every g++."""
    return subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout.splitlines()


def kernel_name(source: str, demangled: str) -> str:
    """GEMM kernels by their template arguments (CUTLASS' by their wgmma shape and operand layouts), others by name alone."""
    # c++filt gives names of CUTLASS' length back as they are.
    mma = re.search(r"MMA_(\d+x\d+x\d+)_F32(BF16|F16)\w*?_SSIL\w+?MajorE(\d)EL\w+?_(\d)E", demangled)
    if mma:
        majors = ",".join("K" if major == "0" else "MN" for major in mma.groups()[2:])
        return f"wgmma<{mma[2].lower()},{mma[1]},{majors}>"
    name = re.sub(r"\(?(\w+::)*(Major|Pairing)\)?(?=\d)|\(anonymous namespace\)::|\w+::|^void ", "", demangled)
    name = name[: name.index("(")] if "(" in name else name
    return name.replace(" ", "") if source.startswith(GEMM_FILES) else name.partition("<")[0].replace(" ", "")


def read_report(log: str, source: str, table: Table) -> None:
    found = re.findall(
        r"Compiling entry function '([^']+)' for '([^']+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        log,
        flags=re.DOTALL,
    )
    for (_, target, stores, loads, registers), demangled in zip(found, demangle([f[0] for f in found]), strict=True):
        line = table.line(source, kernel_name(source, demangled), target)
        line.registers = max(line.registers, int(registers))
        line.spilled = max(line.spilled, int(stores) + int(loads))


def instruction_name(opcode: str) -> str:
    """HMMA of HMMA.16816.F32, but LDG.128 of LDG.E.128.CONSTANT: accesses count by their width."""
    name, *modifiers = opcode.strip().split(".")
    return f"{name}.128" if name in ("LDG", "STG", "LD", "ST") and "128" in modifiers else name


def read_instructions(listing: str, source: str, table: Table) -> None:
    sections = re.split(r"^\s*code for (sm_\w+)$", listing, flags=re.MULTILINE)
    for target, section in zip(sections[1::2], sections[2::2], strict=True):
        parts = re.split(r"^\s*Function : (\S+)$", section, flags=re.MULTILINE)
        for demangled, code in zip(demangle(parts[1::2]), parts[2::2], strict=True):
            line = table.line(source, kernel_name(source, demangled), target)
            line.instructions = Counter() if line.instructions is None else line.instructions
            line.instructions.update(name for name in map(instruction_name, re.findall(r"\b[A-Z]+[.\s]\S*", code)) if name in INSTRUCTIONS)


def find_cuobjdump() -> str | None:
    nvcc = find_nvcc(os.environ)
    return shutil.which("cuobjdump") or (shutil.which("cuobjdump", path=str(nvcc.resolve().parent)) if nvcc else None)


def read_build(objects: Path = OBJECTS) -> Table:
    """What the last build made; empty when there was none."""
    nvcc = find_nvcc(os.environ)
    table = Table(read_nvcc_version(nvcc) if nvcc else "?")
    cuobjdump = find_cuobjdump()
    for report in sorted(objects.glob("*.ptxas")):
        source = report.name.removesuffix(".cu.ptxas")
        read_report(report.read_text(), source, table)
        if cuobjdump:
            listing = subprocess.run([cuobjdump, "-sass", str(report.with_suffix(".o"))], capture_output=True, text=True, check=True)
            read_instructions(listing.stdout, source, table)
    return table


def read_record(path: Path = RECORD) -> Table:
    text = path.read_text().splitlines()
    table = Table(text[0].removeprefix("# nvcc ").partition(". ")[0])
    for entry in text[2:]:
        numbers, instructions = entry.split(" | ")
        source, target, registers, spilled, kernel = numbers.split(" ")
        counts = {name: int(n) for name, n in (part.split(":") for part in instructions.split() if ":" in part)}
        table.lines[source, kernel, target] = Resources(int(registers), int(spilled), None if instructions == "?" else Counter(counts))
    return table


def differences(built: Table, recorded: Table) -> list[str]:
    """One sentence per kernel that is new, gone, or other than recorded."""
    found = []
    for key in sorted({*built.lines, *recorded.lines}):
        now, then, name = built.lines.get(key), recorded.lines.get(key), " ".join(key)
        if now is None or then is None:
            found.append(f"{name}: {'recorded but not built' if now is None else 'built but not recorded'}")
            continue
        if (now.registers, now.spilled) != (then.registers, then.spilled):
            found.append(f"{name}: {now.registers} registers, {now.spilled} bytes spilled; recorded {then.registers}, {then.spilled}")
        if None not in (now.instructions, then.instructions) and now.text() != then.text():
            found.append(f"{name}: {now.text()}; recorded {then.text()}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Registers, spills and tensor-core instructions of the CUDA kernels.")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.relative_to(ROOT)}")
    chosen = parser.parse_args()
    table = read_build()
    if chosen.record:
        recorded = read_record() if RECORD.exists() else Table("?")
        for key, line in table.lines.items():
            if line.instructions is None and key in recorded.lines:
                line.instructions = recorded.lines[key].instructions
        RECORD.write_text(str(table))
    print(table, end="")


if __name__ == "__main__":
    main()
