"""What a finished build must satisfy, as functions from a library or a compiler's log to sentences; none means fine.

CUDA kernels   no C75xx advisory of ptxas (wgmma serialised: the kernel runs at a fraction of its speed), no spill in a GEMM
libraries      libtorch.so among the CUDA library's needs (else its CUDA shims stay unbound), no libpython in an op library
  CPU kernels    nothing the linker could share between instruction sets
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from pathlib import Path

DT_NEEDED = 1
SHT_SYMTAB, SHT_DYNAMIC, SHT_DYNSYM = 2, 6, 11
STB_WEAK, SHN_UNDEF = 2, 0
GEMM_FILES = ("grouped_mm", "grouped_up", "grouped_down_backward")  # how the names of .cu files with GEMM kernels begin


@dataclass
class Elf:
    """What matters here of a 64-bit little-endian library or object."""

    needed: list[str] = field(default_factory=list)
    weak_undefined: list[str] = field(default_factory=list)
    exported: list[str] = field(default_factory=list)
    weak_defined: list[str] = field(default_factory=list)  # inline functions and template instances, of which the linker keeps one copy
    versions: list[str] = field(default_factory=list)  # "GLIBC_2.34", "GLIBCXX_3.4.29", ...

    def newest(self, family: str) -> tuple[int, ...]:
        """The newest symbol version of a family, the least the machine that runs the library must have; () when none."""
        found = [v.removeprefix(family + "_") for v in self.versions if v.startswith(family + "_")]
        return max((tuple(int(n) for n in v.split(".")) for v in found if re.fullmatch(r"[\d.]+", v)), default=())


def read_elf(path: Path) -> Elf:
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"{path} is not a 64-bit little-endian ELF file")
    (offset,) = struct.unpack_from("<Q", data, 40)
    size, count = struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, offset + i * size) for i in range(count)]

    def text(strings: int, at: int) -> str:
        start = sections[strings][4] + at
        return data[start : data.index(b"\0", start)].decode()

    elf = Elf()
    for _, kind, _, _, start, length, link, _, _, entry in sections:
        if kind == SHT_DYNAMIC:
            for at in range(start, start + length, entry):
                tag, value = struct.unpack_from("<QQ", data, at)
                if tag == DT_NEEDED:
                    elf.needed.append(text(link, value))
        elif kind == SHT_SYMTAB:
            for at in range(start + entry, start + length, entry):
                name, info, _, section = struct.unpack_from("<IBBH", data, at)
                if section != SHN_UNDEF and info >> 4 == STB_WEAK:
                    elf.weak_defined.append(text(link, name))
        elif kind == SHT_DYNSYM:
            for at in range(start + entry, start + length, entry):
                name, info, _, section = struct.unpack_from("<IBBH", data, at)
                if section != SHN_UNDEF:
                    elf.exported.append(text(link, name))
                elif info >> 4 == STB_WEAK:
                    elf.weak_undefined.append(text(link, name))
            strings = data[sections[link][4] : sections[link][4] + sections[link][5]]
            elf.versions = sorted({s.decode() for s in strings.split(b"\0") if re.match(rb"(GLIBC|GLIBCXX|CXXABI)_\d", s)})
    return elf


def check_library(path: Path) -> list[str]:
    """Complaints about one op library."""
    elf, found = read_elf(path), []
    if any(n.startswith("libpython") for n in elf.needed):
        found.append(
            f"{path.name} needs libpython, so it would load in one Python only: no file of csrc/ops or csrc/kernels may include Python.h."
        )
    if path.stem == "libmoe_cuda" and "libtorch.so" not in elf.needed:
        found.append(
            f"{path.name} does not need libtorch.so, so torch's CUDA functions would stay unbound: keep -ltorch between "
            "-Wl,--no-as-needed and -Wl,--as-needed, also against LDFLAGS."
        )
    return found


def check_kernel_object(path: Path, isa: str) -> list[str]:
    """Complaints about one CPU kernel object.

    An inline function outside the instruction set's namespace exists once per set, and the linker keeps any one of them: the
    generic kernels could then run AVX-512 code on a processor without it.
    """
    shared = [s for s in read_elf(path).weak_defined if f"{len(isa)}{isa}" not in s]
    if not shared or isa == "generic":
        return []
    return [
        f"{path.name} of {isa} defines {shared[0]}, which the linker may use for every instruction set: "
        "move it into namespace moe::cpu::MOE_ISA, or make it static."
    ]


def check_ptxas(log: str, source: str) -> list[str]:
    """Complaints about what ptxas said (-Xptxas -v) while it compiled one .cu file."""
    found = []
    advisories = re.findall(r"^ptxas\s.*\bC75\d\d\b.*$", log, flags=re.MULTILINE)
    if advisories:
        found.append(
            f"{source}: ptxas reorders or serialises tensor-core instructions, {len(advisories)} advisories in all; change the kernel "
            f"until there is none, beginning with the last: {advisories[-1]}"
        )
    if Path(source).name.startswith(GEMM_FILES):
        for name, target, spilled in spills(log):
            found.append(f"{source}: {spilled} bytes of registers spill for {target} in the GEMM kernel {name}: make its tile smaller.")
    return found


def spills(log: str) -> list[tuple[str, str, int]]:
    """(function, target, bytes stored and loaded) of every function that spills."""
    found, name, target = [], "?", "?"
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '([^']+)' for '([^']+)'", line):
            name, target = entry.groups()
        elif function := re.search(r"Function properties for (\S+)", line):
            name = function.group(1)
        elif numbers := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            total = sum(map(int, numbers.groups()))
            if total:
                found.append((name, target, total))
    return found
