"""`moe-ext doctor`: what is installed, what was built, what this machine has, and which kernel each op would use on each device.

`examine` gathers everything as plain data, the JSON of `--json`; `as_text` prints the same. What the libraries contain is told by
themselves through `moe_ext._C`, the one part that is tied to a Python version: without it everything else works, and the report says
why it is missing. CUDA is initialised only by a torch that was built with it.
"""

from __future__ import annotations

import importlib
import os
import platform
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent.parent
REBUILD = "pip install --no-build-isolation -e ."
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
#: The instruction sets that tell CPU kernels apart, as Linux names them.
INSTRUCTION_SETS = (
    "avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16",
    "asimd", "asimdhp", "bf16", "sve", "sve2", "i8mm",
)  # fmt: skip
#: A fused kernel is for speed alone (csrc/kernels/kernel_table.h).
STEPS = "none, the ops run the steps one by one"

Report = dict[str, Any]


def examine() -> Report:
    """The whole report; `usable` is False when the CPU library cannot work here, and `problem` then says why."""
    failure = load_error()
    introspection, introspection_error = _introspection()
    cpu, cpu_error = _describe(introspection, introspection_error or failure, "libmoe_cpu.so")
    cuda, cuda_error = _describe(introspection, introspection_error or failure, "libmoe_cuda.so")
    gpus = _gpus()
    # A library that loads but cannot choose its kernels (MOE_EXT_CPU_ISA asks for what this processor lacks) fails at the first op.
    problem = failure or (cpu_error if introspection and _file_of("libmoe_cpu.so") else None)
    build = (cpu or {}).get("build") or (introspection.build_info() if introspection else None)
    return {
        "usable": problem is None,
        "problem": problem,
        "versions": _versions(build),
        "libraries": {
            "libmoe_cpu.so": _library("libmoe_cpu.so", failure),
            "libmoe_cuda.so": _library("libmoe_cuda.so", failure),
            "_C": {"path": getattr(introspection, "__file__", None), "loaded": introspection is not None, "why_not": introspection_error},
        },
        "build": build,
        "processor": _processor(),
        "cpu_kernels": _cpu_kernels(cpu, cpu_error),
        "gpus": gpus,
        "kernels": _kernels(cpu, cpu_error, cuda, cuda_error, gpus),
        "rules": introspection.rules() if hasattr(introspection, "rules") else {},  # a module of an older build has none
    }


def load_error() -> str | None:
    """Why the op libraries cannot be loaded, or None."""
    try:
        importlib.import_module("moe_ext.ops")
    except Exception as error:  # missing, of another version, for another torch: whatever it is, it is what the caller wants to print
        return str(error).strip() or type(error).__name__
    return None


def _introspection() -> tuple[Any, str | None]:
    """`moe_ext._C`, or None and why it is missing."""
    try:
        return importlib.import_module("moe_ext._C"), None
    except ImportError as error:
        here = f"{sys.implementation.cache_tag}, {platform.machine()}"
        others = sorted(p.name for p in HERE.glob("_C*.so"))
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        if not others:
            return None, f"moe_ext/_C is not built; kernel tables cannot be shown. Build it with: {REBUILD}"
        if f"_C{suffix}" not in others:
            return None, f"moe_ext/{', '.join(others)} is built for another Python than this one ({here}). Build again with: {REBUILD}"
        return None, f"moe_ext/_C{suffix} cannot be loaded: {error}. Build again with: {REBUILD}"


def _describe(introspection: Any, missing: str | None, library: str) -> tuple[Report | None, str | None]:
    """What a loaded op library says about itself, or None and why it says nothing."""
    path = _file_of(library)
    if introspection is None or missing or path is None:
        return None, (missing if path else None) or _library(library, missing)["why_not"]
    try:
        return introspection.describe(str(path)), None
    except RuntimeError as error:
        return None, str(error).strip()


def _file_of(library: str) -> Path | None:
    """The file that the process has loaded, which a host may have done by itself; where that is not known, ours if it is there."""
    own, maps = HERE / library, Path("/proc/self/maps")
    if not maps.exists():
        return own if own.exists() else None
    paths = (line.split(maxsplit=5)[5] for line in maps.read_text(encoding="utf-8", errors="replace").splitlines() if line.endswith(".so"))
    loaded = list(dict.fromkeys(Path(path) for path in paths if Path(path).name == library))
    if loaded:
        return own if own in loaded else loaded[0]
    registered = hasattr(torch.ops.moe, "grouped_forward")  # by a file of another name
    return own if own.exists() and not registered else None


def _library(name: str, failure: str | None) -> Report:
    path = _file_of(name)
    if path is not None:
        return {"path": str(path), "loaded": failure is None, "why_not": failure}
    if (HERE / name).exists() or (name == "libmoe_cpu.so" and failure is None):
        return {"path": None, "loaded": False, "why_not": "not loaded: the ops came from another library before moe_ext was imported"}
    return {"path": None, "loaded": False, "why_not": "not built"}


def _versions(build: Report | None) -> Report:
    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    own = installed("moe-ext") or (build or {}).get("version")
    return {"python": platform.python_version(), "moe_ext": own, **{name: installed(name) for name in PACKAGES}}


def _processor() -> Report:
    name, flags = platform.processor() or platform.machine(), set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    return {
        "name": name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "instruction_sets": [s for s in INSTRUCTION_SETS if s in flags],
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
    }


def _cpu_kernels(cpu: Report | None, error: str | None) -> Report:
    """Which of the builds of the CPU kernels runs, and why that one."""
    if cpu is None:
        return {"variant": None, "variants": [], "why": error}
    wanted = os.environ.get("MOE_EXT_CPU_ISA")
    if wanted:
        why = f"MOE_EXT_CPU_ISA={wanted} asks for it"
    else:
        why = "the best one built that this processor can run; MOE_EXT_CPU_ISA chooses another"
    return {"variant": cpu["variant"], "variants": cpu["variants"], "why": why}


def _gpus() -> Report:
    if torch.version.cuda is None:
        return {"devices": [], "why_none": f"torch {torch.__version__} is built without CUDA"}
    if not torch.cuda.is_available():
        return {"devices": [], "why_none": f"torch {torch.__version__} is built for CUDA {torch.version.cuda} but sees no GPU or no driver"}
    devices = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        devices.append({"index": i, "name": p.name, "arch": f"sm_{p.major}{p.minor}", "memory_gib": round(p.total_memory / 2**30, 1)})
    return {"devices": devices, "why_none": None}


def _kernels(cpu: Report | None, cpu_error: str | None, cuda: Report | None, cuda_error: str | None, gpus: Report) -> Report:
    """Per device: the dtypes, and per kernel `{"kernel": variant or None, "why_not": reason or None}`."""
    known = cpu or cuda or {"ops": {}, "fused": []}

    def column(table: Report | None, error: str | None) -> Report:
        def why_not(name: str) -> str | None:
            if table is None or error:
                return error
            if table["ops"].get(name):
                return None
            return STEPS if name in known.get("fused", []) else "this build has no such kernel"

        ops = {name: {"kernel": None if why_not(name) else (table or {})["variant"], "why_not": why_not(name)} for name in known["ops"]}
        return {"dtypes": table["dtypes"] if table else None, "why_not": error, "ops": ops}

    no_gpu = None if gpus["devices"] else gpus["why_none"]
    return {"cpu": column(cpu, cpu_error), "cuda": column(cuda, cuda_error or no_gpu)}


def as_text(report: Report, rules: bool = False) -> str:
    """The report for reading; every value in it is in the JSON too. `rules` adds how one of several CUDA kernels is chosen."""
    sections = [("versions", {k: v or "not installed" for k, v in report["versions"].items()})]
    libraries = {n: x["path"] if x["loaded"] else x["why_not"] for n, x in report["libraries"].items()}
    sections.append(("libraries", libraries))
    if report["build"]:
        build = {k.replace("_", " "): ", ".join(v) if isinstance(v, list) else v for k, v in report["build"].items()}
        if "torch target" in build:  # TORCH_TARGET_VERSION: one byte each for major and minor, on top
            target = int(build["torch target"].rstrip("UL"), 16)
            build["torch target"] = f"{target >> 56}.{target >> 48 & 255}, the oldest torch it runs in"
        sections.append(("build", {k: v or "none" for k, v in build.items()}))
    p, k = report["processor"], report["cpu_kernels"]
    processor = {
        "name": p["name"],
        "cores": f"{p['cores']}, torch uses {p['torch_threads']} threads",
        "instructions": " ".join(p["instruction_sets"]) or "not known on this system",
        "torch's own": p["torch_uses"],
        "kernels": f"{k['variant']}: {k['why']}" if k["variant"] else k["why"],
    }
    if k["variants"]:
        processor["built"] = ", ".join(v["name"] + ("" if v["runs_here"] else " (not on this processor)") for v in k["variants"])
    sections.append(("processor", processor))
    gpus = {str(d["index"]): f"{d['name']}, {d['arch']}, {d['memory_gib']} GiB" for d in report["gpus"]["devices"]}
    sections.append(("GPUs", gpus or {"none": report["gpus"]["why_none"]}))
    lines: list[str] = []
    for title, rows in sections:
        width = max(map(len, rows))
        lines += [title, *(f"  {name:<{width}}  {value}" for name, value in rows.items()), ""]
    lines += [*_kernel_table(report["kernels"]), ""]
    if rules:
        lines += [*_rule_tables(report["rules"]), ""]
    lines.append("moe_ext works here." if report["usable"] else f"moe_ext does not work here: {report['problem']}")
    return "\n".join(lines)


def _kernel_table(kernels: Report) -> list[str]:
    lines = ["kernels"]
    ops = list(kernels["cpu"]["ops"])
    if ops:
        cells = {device: [kernels[device]["ops"][op]["kernel"] or "-" for op in ops] for device in kernels}
        width = max(map(len, ops))
        widths = {device: max(map(len, [device, *column])) for device, column in cells.items()}
        lines.append(f"  {'op':<{width}}  " + "  ".join(f"{d:<{widths[d]}}" for d in cells).rstrip())
        for i, op in enumerate(ops):
            lines.append(f"  {op:<{width}}  " + "  ".join(f"{cells[d][i]:<{widths[d]}}" for d in cells).rstrip())
    for device, column in kernels.items():
        if column["dtypes"]:
            lines.append(f"  {device}: {column['dtypes']}")
        if column["why_not"]:
            lines.append(f"  {device}, no kernel: {column['why_not']}")
            continue
        for reason in sorted({x["why_not"] for x in column["ops"].values() if x["why_not"]}):
            names = [name for name, x in column["ops"].items() if x["why_not"] == reason]
            lines.append(f"  {device}, {', '.join(names)}: {reason}")
    return lines


def _rule_tables(tables: Report) -> list[str]:
    lines = ["CUDA kernels of an op: the first whose needs are all met runs"]
    for op, rules in tables.items():
        lines.append(f"  {op}")
        for rule in rules:
            tile = f" ({' x '.join(map(str, rule['tile']))})" if rule["tile"] else ""
            lines.append(f"    {rule['kernel']}{tile}: {rule['reason']}")
            if rule["needs"]:
                lines.append(f"      needs {'; '.join(rule['needs'])}")
    return lines if tables else ["CUDA kernels of an op: not known without moe_ext/_C"]
