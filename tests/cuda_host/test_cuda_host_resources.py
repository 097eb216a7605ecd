"""Registers, spills, tensor-core instructions and 16-byte accesses of the CUDA kernels of the last build are those that were recorded;
what their PTX says where nothing was built; and that the kernels of mma.sync compile for devices after 9.0.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from build_tools import plan, products, toolchain
from tools import gpusim_build, kernel_resources

ROOT = Path(__file__).resolve().parents[2]


needs_nvcc = pytest.mark.skipif(
    toolchain.find_nvcc(os.environ) is None or shutil.which("c++filt") is None, reason="no nvcc to compile kernels with"
)
needs_cplusplus = pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt to read kernel names with")

CUTLASS_NAME = (
    "_ZN7cutlass13device_kernelINS_4gemm6kernelMMA_AtomIJNS5_4SM904GMMA28MMA_64x256x16_F32BF16BF16_SS"
    "ILNST_5MajorE0ELSV_1ELNST_7ScaleInE1ELSW_1EEE"
)
OWN_NAME = "_ZN3moe4cuda39_GLOBAL__N__79a91ce4_7_sort_cu_95d7502811sort_kernelIiEEvNS_10SortParamsENS0_8SortPlanE"
REPORT = """\
ptxas info    : Compiling entry function '{}' for 'sm_90a'
ptxas info    : Function properties for {}
    0 bytes stack frame, {} bytes spill stores, {} bytes spill loads
ptxas info    : Used {} registers, used 1 barriers
"""
LISTING = """
	code for sm_90a
		Function : {}
        /*3e70*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], RZ, !UPT ;
        /*3e80*/              @!P0 UTMALDG.2D [UR4], [UR6] ;
        /*3e90*/                   EXIT ;
"""
ACCESSES = """
	code for sm_80
		Function : {}
        /*0100*/                   LDG.E.128.CONSTANT R24, [R2.64] ;
        /*0110*/              @!P0 LDG.E R3, [R2.64+0x128] ;
        /*0120*/               @P1 STG.E.128 [R4.64], R24 ;
        /*0130*/                   STG.E.U16 [R4.64], R3 ;
        /*0140*/                   LDS.128 R4, [R3] ;
"""
# Of the first template argument, the element type.
ELEMENT_BYTES = {"d": 8, "f": 4, "6__half": 2, "13__nv_bfloat16": 2}


def table() -> object:
    return kernel_resources.Table("13.0.88")


def test_a_report_is_read() -> None:
    built = table()
    log = REPORT.format(CUTLASS_NAME, CUTLASS_NAME, 4, 8, 168)
    kernel_resources.read_report(log, "grouped_mm_bf16_sm90", built)
    kernel_resources.read_instructions(LISTING.format(CUTLASS_NAME), "grouped_mm_bf16_sm90", built)
    (key,) = built.lines
    assert key == ("grouped_mm_bf16_sm90", "wgmma<bf16,64x256x16,K,MN>", "sm_90a")
    assert (built.lines[key].registers, built.lines[key].spilled) == (168, 12)
    assert built.lines[key].instructions == Counter(HGMMA=1, UTMALDG=1)


@needs_cplusplus
def test_accesses_count_by_their_width() -> None:
    built = table()
    kernel_resources.read_instructions(ACCESSES.format(OWN_NAME), "sort", built)
    assert [line.text() for line in built.lines.values()] == ["LDG.128:1 STG.128:1"]


@needs_cplusplus
def test_instances_of_a_small_kernel_share_a_line() -> None:
    built = table()
    log = "".join(REPORT.format(n, n, 0, 0, r) for n, r in ((OWN_NAME, 30), (OWN_NAME.replace("Ii", "Il"), 32)))
    kernel_resources.read_report(log, "sort", built)
    assert {key: line.registers for key, line in built.lines.items()} == {("sort", "sort_kernel", "sm_90a"): 32}


def test_differences_are_named(tmp_path: Path) -> None:
    built = table()
    kernel_resources.read_report(REPORT.format(CUTLASS_NAME, CUTLASS_NAME, 0, 0, 168), "grouped_mm", built)
    path = tmp_path / "resources.txt"
    path.write_text(str(built))
    recorded = kernel_resources.read_record(path)
    assert recorded.nvcc == "13.0.88" and kernel_resources.differences(built, recorded) == []
    (line,) = built.lines.values()
    line.registers, line.instructions = 200, Counter(HGMMA=8)
    (difference,) = kernel_resources.differences(built, recorded)  # instructions were not known then
    assert "200 registers" in difference and "recorded 168" in difference
    path.write_text(str(built))
    line.instructions = Counter(HMMA=8)
    assert kernel_resources.differences(built, kernel_resources.read_record(path)) == [
        "grouped_mm wgmma<bf16,64x256x16,K,MN> sm_90a: HMMA:8; recorded HGMMA:8"
    ]
    assert "built but not recorded" in kernel_resources.differences(built, table())[0]
    assert "recorded but not built" in kernel_resources.differences(table(), built)[0]


@pytest.mark.skipif(not kernel_resources.RECORD.exists(), reason="the C++ sources are not beside the tests")
def test_every_gemm_kernel_is_recorded_with_its_instructions() -> None:
    for (source, kernel, target), line in kernel_resources.read_record().lines.items():
        name = f"{source} {kernel} {target}"
        assert line.spilled == 0 or not source.startswith(kernel_resources.GEMM_FILES), name
        if kernel.startswith("wgmma"):
            assert line.instructions["HGMMA"] and line.instructions["UTMALDG"] and line.instructions["UTMASTG"], name
        elif kernel.startswith("few_rows_kernel"):
            assert line.instructions["HMMA"] and not line.instructions["LDSM"] and line.registers <= 128, name  # two blocks of 256
        elif kernel.startswith("mma_kernel"):
            assert line.instructions["HMMA"] and line.instructions["LDSM"], name
            assert bool(line.instructions["LDGSTS"]) == kernel.endswith("true>"), name  # the others load element by element
        elif kernel.startswith("wgrad_gather_kernel"):
            assert line.instructions["HGMMA"] and line.instructions["LDGSTS"] and not line.instructions["UTMALDG"], name


@pytest.mark.skipif(not kernel_resources.RECORD.exists(), reason="the C++ sources are not beside the tests")
def test_every_kernel_of_rows_is_recorded_with_16_byte_accesses() -> None:
    lines = kernel_resources.read_record().lines
    for (source, kernel, target), line in lines.items():
        name, counts = f"{source} {kernel} {target}", line.instructions or Counter()
        if source in ("permute", "activation", "grouped_bias_grad"):
            assert counts["LDG.128"] and (counts["STG.128"] or source == "grouped_bias_grad"), name
            assert not line.spilled, name
        elif kernel.startswith("mma_kernel"):
            assert counts["STG.128"], name


def ptx_of(path: Path) -> list[tuple[str, str]]:
    """Mangled name and text of the kernels in an object that carries readable PTX, for all of its targets."""
    parts = re.split(rb"\.entry (\w+)\(", path.read_bytes())[1:]
    return [(name.decode(), body.decode(errors="replace")) for name, body in zip(parts[::2], parts[1::2], strict=True)]


@needs_nvcc
@pytest.mark.parametrize("source", ["permute", "activation", "grouped_bias_grad"])
def test_no_element_moves_alone_where_16_bytes_can(source: str) -> None:
    gpusim_build.build()
    kinds: Counter[bool] = Counter()
    for name, text in ptx_of(gpusim_build.ROOT / gpusim_build.FOLDER / f"{source}.cu.o"):
        template = re.search(r"I(d|f|6__half|13__nv_bfloat16)(?:LNS_14ActivationKindE\dE)?Li(\d)EE", name)
        assert template, name
        wide = int(template[2]) > 1
        assert not wide or int(template[2]) * ELEMENT_BYTES[template[1]] == 16, name
        kinds[wide] += 1
        moved = set(re.findall(r"\b(?:ld|st)\.global\S*", text))
        assert ("ld.global.v4.b32" in moved) == wide, name
        assert ("st.global.v4.b32" in moved) == (wide and source != "grouped_bias_grad"), name
        assert not wide or not any(re.match(r"ld\.global\.(nc\.)?[bu]16", access) for access in moved), name
    assert kinds[True] == kinds[False] > 0


@needs_nvcc
def test_products_compile_for_devices_after_9_0(tmp_path: Path) -> None:
    cuda = toolchain.find_cuda(os.environ)
    newer = [n for n in (100, 120) if n in cuda.archs]
    command = [str(cuda.nvcc), *products.NVCC_FLAGS, *(f for n in newer for f in plan.Arch(n // 10, n % 10).gencode())]
    command += ["-c", "csrc/kernels/cuda/grouped_mm_wgrad.cu", "-o", str(tmp_path / "grouped_mm_wgrad.o")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    built = table()
    kernel_resources.read_report(done.stdout + done.stderr, "grouped_mm_wgrad", built)
    assert {target for _, _, target in built.lines} == {f"sm_{n}" for n in newer}
    assert all(line.registers <= 128 and line.spilled == 0 for line in built.lines.values()), built  # two blocks of 256 threads


@needs_cplusplus
def test_the_last_build_is_as_recorded() -> None:
    if not list(kernel_resources.OBJECTS.glob("*.ptxas")):
        pytest.skip("the CUDA kernels were not built here")
    built, recorded = kernel_resources.read_build(), kernel_resources.read_record()
    if built.nvcc != recorded.nvcc:
        pytest.skip(f"recorded with nvcc {recorded.nvcc}, this is {built.nvcc}: another compiler, other registers")
    targets = {key[2] for key in built.lines} & {key[2] for key in recorded.lines}  # of the architectures that were built
    for table in (built, recorded):
        table.lines = {key: line for key, line in table.lines.items() if key[2] in targets}
    found = kernel_resources.differences(built, recorded)
    assert found == [], "\n".join([*found, "when intended: python -m tools.kernel_resources --record"])
