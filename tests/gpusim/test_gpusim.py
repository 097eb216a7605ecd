"""The simulator's own tests: each family of instructions against values computed by other means, and each check it makes.

The kernels are in gpusim/instructions.cu. Results that the PTX ISA defines exactly are compared exactly.
"""

from __future__ import annotations

import functools
import math
from operator import and_, or_, xor
from pathlib import Path

import pytest
import torch

from moe_ext.testing import SimulatedGpu
from tests.gpusim.harness import Instructions, needs_nvcc

pytestmark = needs_nvcc

U32 = 2**32


@pytest.fixture(scope="module", params=["80", "90a"])
def gpu(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Instructions:
    return Instructions(tmp_path_factory.mktemp("gpusim") / f"instructions_{request.param}.so", request.param)


@pytest.fixture(scope="module")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> Instructions:
    return Instructions(tmp_path_factory.mktemp("gpusim") / "instructions_sm90.so", "90a", "instructions_sm90.cu")


def words(values: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    bits = torch.iinfo(dtype).bits
    return torch.tensor([v - 2**bits if v >= 2 ** (bits - 1) else v for v in values], dtype=dtype)


def signed(v: int, bits: int = 32) -> int:
    return v - 2**bits if v >= 2 ** (bits - 1) else v


def expected_integers(a: int, b: int) -> list[int]:
    sa, sb = signed(a), signed(b)
    both = b << 32 | a
    permuted = sum((both >> (8 * selector) & 255) << (8 * k) for k, selector in enumerate((0, 4, 2, 6)))
    chosen = (a & b) | (~a & (a ^ 0x55555555))
    field = a >> 5 & 511
    inserted = (b & ~(0x7FF << 3)) | (a & 0x7FF) << 3
    bits = bin(a).count("1") | (32 - a.bit_length()) << 8 | ((a & -a).bit_length()) << 16
    quotient = int(math.copysign(abs(sa) // abs(sb), sa * sb)) if sb else 0
    return [
        v % U32
        for v in (
            *(a + b, a - b, a * b, a * b >> 32, sa * sb >> 32, a // b if b else 0, a % b if b else 0, quotient, sa >> (b & 31)),
            *((((b << 32 | a) << 7) >> 32), permuted, chosen, field - 512 if field & 256 else field, inserted, bits),
            int(f"{a:032b}"[::-1], 2),
        )
    ]


def test_integers(gpu: Instructions) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(0, U32, (64,), generator=generator).tolist()
    values[:6] = [0, 1, U32 - 1, 1 << 31, 5, 0x7FFFFFFF]
    values[32:36] = [0, 3, 2, 7]
    out = torch.zeros(32, 16, dtype=torch.int32)
    assert gpu.run("integers", words(values), out, 32) == ""
    for t in range(32):
        assert [v % U32 for v in out[t].tolist()] == expected_integers(values[t], values[32 + t]), t


def test_carries(gpu: Instructions) -> None:
    values = torch.randint(-(2**62), 2**62, (16,), generator=torch.Generator().manual_seed(2))
    values[0], values[8] = -1, -1
    out = torch.zeros(8, 4, dtype=torch.int64)
    assert gpu.run("carries", values, out, 8) == ""
    for t in range(8):
        high, low = values[t].item() % 2**64, values[8 + t].item() % 2**64
        a = high << 64 | low
        product, difference = (a * high + a) % 2**128, (a - high) % 2**128
        assert [v % 2**64 for v in out[t].tolist()] == [product % 2**64, product >> 64, difference % 2**64, difference >> 64]


def rounded(x: float, up: bool) -> float:
    """The float32 neighbour of an exact double sum, in one direction."""
    nearest = torch.tensor(x, dtype=torch.float64).float()
    if nearest.double().item() == x:
        return nearest.item()
    if (nearest.double().item() < x) != up:
        return nearest.item()
    return torch.nextafter(nearest, torch.tensor(math.inf if up else -math.inf)).item()


def test_floats(gpu: Instructions) -> None:
    values = torch.randn(64, generator=torch.Generator().manual_seed(3)) * 8
    a, b = values[:32], values[32:]
    out = torch.zeros(32, 12)
    assert gpu.run("floats", values, out, 32) == ""
    a64, b64 = a.double(), b.double()
    up = torch.tensor([rounded(v, True) for v in (a64 + b64).tolist()])
    down = torch.tensor([rounded(v, False) for v in (a64 + b64).tolist()])
    zero = torch.where(a64 + b64 > 0, down, up)
    columns = [a * b, zero, up, down, (a64 * b64 + a64).float(), a / b, a64.abs().sqrt().float(), torch.minimum(a, b), a.trunc(), a.round()]
    columns += [torch.copysign(a, b), torch.where(a < b, a, -b)]
    for k, column in enumerate(columns):
        assert torch.equal(out[:, k], column), k


def test_conversions(gpu: Instructions) -> None:
    values = torch.randn(32, generator=torch.Generator().manual_seed(4)) * torch.logspace(-9, 5, 32)
    out = torch.zeros(32, 6, dtype=torch.int16)
    assert gpu.run("conversions", values, out, 32) == ""
    bf16, half = values.bfloat16(), values.half()
    assert torch.equal(out[:, 0].view(torch.bfloat16), bf16)
    assert torch.equal(out[:, 1].view(torch.float16), half)
    assert torch.equal(out[:, 2].view(torch.bfloat16), bf16)
    assert torch.equal(out[:, 3].view(torch.bfloat16), bf16.roll(-1))
    assert torch.equal(out[:, 4].view(torch.bfloat16), bf16 * 3)
    assert torch.equal(out[:, 5].view(torch.float16), (half.double() * half.double() + 1).half())


def test_doubles(gpu: Instructions) -> None:
    """The library's double functions: software over fma, within the two units in the last place that CUDA documents."""
    values = torch.randn(32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    out = torch.zeros(32, 3, dtype=torch.float64)
    assert gpu.run("doubles", values, out, 32) == ""
    for k, f in enumerate((math.exp, lambda v: math.sin(v * 1000), math.erf)):
        for v, found in zip(values.tolist(), out[:, k].tolist(), strict=True):
            assert abs(found - f(v)) <= 2 * math.ulp(f(v)), (k, v)


def test_warps(gpu: Instructions) -> None:
    v = torch.randint(0, 100, (32,), generator=torch.Generator().manual_seed(6), dtype=torch.int32).tolist()
    out = torch.zeros(32, 8, dtype=torch.int32)
    assert gpu.run("warps", torch.tensor(v, dtype=torch.int32), out) == ""
    for t in range(32):
        segment = t // 16 * 16
        down = v[t + 5] if t + 5 < segment + 16 else v[t]
        matching = sum(1 << k for k in range(32) if v[k] & 7 == v[t] & 7)
        expected = [
            v[t - 3] if t >= 3 else v[t],
            down,
            v[t ^ 9],
            v[v[t] & 31],
            sum((x & 1) << k for k, x in enumerate(v)),
            matching,
            sum(v),
        ]
        expected.append((77 in v) + 2)
        assert [x % U32 for x in out[t].tolist()] == [x % U32 for x in expected], t


def test_groups_of_lanes(gpu: Instructions) -> None:
    v = torch.randint(-(2**31), 2**31, (32,), generator=torch.Generator().manual_seed(13), dtype=torch.int64).tolist()
    out = torch.zeros(32, 10, dtype=torch.int32)
    assert gpu.run("groups", torch.tensor(v).int(), out) == ""
    for t in range(32):
        lanes = [k for k in range(32) if (k % 3 == 0) == (t % 3 == 0)]
        mine, unsigned = [v[k] for k in lanes], [v[k] % U32 for k in lanes]
        expected = [sum(mine), min(mine), max(mine), min(unsigned), max(unsigned)]
        expected += [functools.reduce(f, values) for f, values in ((and_, [u | 256 for u in unsigned]), (or_, unsigned), (xor, unsigned))]
        expected += [0, 1] if t % 3 else [sum(1 << k for k in lanes), 3]
        assert [x % U32 for x in out[t].tolist()] == [x % U32 for x in expected], t


def test_divergence(gpu: Instructions) -> None:
    out = torch.zeros(64, dtype=torch.int32)
    assert gpu.run("divergence", out.clone(), out) == ""
    for t in range(64):
        n, steps = t + 1, 0
        while n != 1:
            n, steps = (3 * n + 1 if n % 2 else n // 2), steps + 1
        warp = range(t // 32 * 32, t // 32 * 32 + 32)
        steps += 1000 if t % 3 == 0 else -sum(k % 3 == 1 for k in warp) if t % 3 == 1 else 0
        assert out[t] == steps, t


def test_atomics(gpu: Instructions) -> None:
    v = torch.randint(-(2**31), 2**31, (64,), generator=torch.Generator().manual_seed(14), dtype=torch.int64).tolist()
    out = torch.tensor([0, 5, 0, 0, -1, 0, 0, 0, 0, 0], dtype=torch.int32)
    assert gpu.run("atomics", torch.tensor(v).int(), out) == ""
    expected = [min(x % U32 for x in v), sum(v) + 5, min(v), max(v), *(functools.reduce(f, v) for f in (and_, or_, xor))]
    assert [x % U32 for x in out[:7].tolist()] == [x % U32 for x in expected]
    assert out[7:8].view(torch.float32).item() == 63 * 32 and out[8:].tolist() == [64, 64]


@pytest.mark.parametrize("schedule", ["", "1", "2"])
def test_locks_and_tickets(gpu: Instructions, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUSIM_SCHED", schedule)
    out = torch.zeros(2, dtype=torch.int32)
    assert gpu.run("lock", out.clone(), out) == ""
    assert out.tolist() == [0, 192]
    given, out = torch.arange(20, dtype=torch.int32), torch.zeros(22, dtype=torch.int32)
    assert gpu.run("ticket<true>", given, out, 20) == ""
    assert out[1] == 2 * given.sum()


def test_mma(gpu: Instructions) -> None:
    given = torch.randint(-8, 9, (24, 16), generator=torch.Generator().manual_seed(7)).bfloat16()  # every product and sum is exact
    out = torch.zeros(16, 8)
    assert gpu.run("mma", given, out) == ""
    assert torch.equal(out, given[:16].float() @ given[16:].float().T)
    given = torch.randint(1, 99, (8, 8), dtype=torch.int16, generator=torch.Generator().manual_seed(8))
    turned = torch.zeros_like(given)
    assert gpu.run("transposed", given, turned) == ""
    assert torch.equal(turned, given.T)
    assert gpu.run("movmatrix", given, turned.zero_()) == ""  # lane 4 r + c / 2 holds (r, c): the rows lie as in memory
    assert torch.equal(turned, given.T)
    given = torch.randint(-8, 9, (24, 8), generator=torch.Generator().manual_seed(9)).float()
    assert gpu.run("tf32", given, out) == ""
    assert torch.equal(out, given[:16] @ given[16:].T + 1)


@pytest.mark.parametrize("mode", ["late", "early", "3"])
def test_copies(gpu: Instructions, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUSIM_ASYNC", mode)
    given = torch.randint(0, 256, (32, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(10))
    out = torch.ones_like(given)
    assert gpu.run("copies", given, out) == ""
    read = torch.arange(16)[None] < (torch.arange(32) % 5 * 4)[:, None]
    assert torch.equal(out, torch.where(read, given, torch.zeros_like(given)))


def tma_tensor() -> torch.Tensor:
    """Rows of 90 elements, padded to a multiple of 16 bytes."""
    given = torch.full((20, 96), -1, dtype=torch.int16)
    given[:, :90] = torch.randint(1, 30000, (20, 90), dtype=torch.int16, generator=torch.Generator().manual_seed(11))
    return given


def unswizzled(image: torch.Tensor) -> torch.Tensor:
    """8 rows of 128 bytes, of which chunk c of row r lies where chunk c ^ r would."""
    chunks = image.reshape(8, 8, 8)
    return torch.stack([torch.stack([chunks[row, chunk ^ row] for chunk in range(8)]) for row in range(8)]).reshape(8, 64)


@pytest.mark.parametrize("mode", ["late", "early", "3"])
def test_tma(hopper: Instructions, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUSIM_ASYNC", mode)
    given, out = tma_tensor(), torch.zeros(512 + 20 * 40, dtype=torch.int16)
    assert hopper.run("tma", given, out) == ""
    box = torch.zeros(8, 64, dtype=torch.int16)
    box[2:, :50] = given[:6, 40:90]
    assert torch.equal(unswizzled(out[:512]), box)
    expected = torch.zeros(20, 40, dtype=torch.int16)
    expected[13:20, 8:40] = box[:7, :32]
    assert torch.equal(out[512:].reshape(20, 40), expected)

    images = torch.ones(4, 512, dtype=torch.int16)
    SimulatedGpu(hopper.simulator).take_launches()
    assert hopper.run("multicast", given, images) == ""
    for rank in range(4):
        assert torch.equal(unswizzled(images[rank]), box if rank != 1 else torch.zeros_like(box))
    (launch,) = SimulatedGpu(hopper.simulator).take_launches()
    assert launch["global_loaded"] == 6 * 50 * 2, "each byte is read once, for all CTAs"

    changed = torch.zeros(8, 64, dtype=torch.int16)
    changed[2:, :10] = given[3:15:2, 40:50]
    assert hopper.run("replace", given, images) == ""
    assert torch.equal(unswizzled(images[0]), changed)


@pytest.mark.parametrize("mode", ["late", "early", "3"])
def test_bulk_copies(hopper: Instructions, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUSIM_ASYNC", mode)
    given, out = torch.arange(128, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    assert hopper.run("bulk", given, out) == ""
    assert torch.equal(out, given + 1)
    box, total = torch.arange(128.0).reshape(8, 16), torch.arange(360.0).reshape(18, 20)
    expected = total.clone()
    expected[13:, 8:] += 2 * box[:5, :12]
    assert hopper.run("reduce", box, total) == ""
    assert torch.equal(total, expected)


@pytest.mark.parametrize("mode", ["late", "early", "3"])
def test_mbarriers(hopper: Instructions, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUSIM_ASYNC", mode)
    out = torch.full((4,), 7, dtype=torch.int32)
    assert hopper.run("test_wait", out.clone(), out) == ""
    assert out.tolist() == [0, 0, 1, 1]  # by state and by parity
    given, out = torch.arange(1, 129, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    for noinc in (0, 1):
        assert hopper.run("copy_arrivals", given, out.zero_(), noinc) == ""
        assert torch.equal(out, given[:64])


def test_matrices_are_stored(hopper: Instructions) -> None:
    given = torch.arange(256, dtype=torch.int16)  # matrix, lane, half
    rows, columns = torch.arange(64) // 8, torch.arange(64) % 8
    matrices = given.reshape(4, 64)[:, (4 * rows + columns // 2) * 2 + columns % 2].reshape(4, 8, 8)  # lane 4 r + c / 2 holds (r, c)
    out = torch.zeros_like(given)
    assert hopper.run("stmatrix", given, out) == ""
    assert torch.equal(out.reshape(4, 8, 8), matrices)
    assert hopper.run("stmatrix_trans", given, out) == ""
    assert torch.equal(out.reshape(4, 8, 8), matrices.mT)


@pytest.mark.parametrize("mode", ["late", "early"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_wgmma(hopper: Instructions, dtype: torch.dtype, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUSIM_ASYNC", mode)
    k, name = (16, "wgmma") if dtype == torch.bfloat16 else (8, "wgmma_tf32")
    given = torch.randint(-8, 9, (72, k), generator=torch.Generator().manual_seed(12)).to(dtype)
    product = given[:64].float() @ given[64:].float().T
    out = torch.zeros(64, 8)
    assert hopper.run(name, given, out) == ""
    assert torch.equal(out, product + 0.5)
    assert hopper.run(name + "_registers", given, out) == ""
    assert torch.equal(out, 0.5 - product)
    if dtype == torch.float32:  # the tensor core reads the upper 19 bits
        assert hopper.run(name, given * (1 + 2.0**-11), out) == ""
        assert torch.equal(out, product + 0.5)


def test_clusters(hopper: Instructions) -> None:
    out = torch.zeros(8, dtype=torch.int32)
    assert hopper.run("cluster", out.clone(), out) == ""
    assert out.tolist() == [103, 100, 101, 102] * 2


REGISTERS = {
    "": "",
    "setmaxnreg.dec;0; 40=> 32": "",
    "setmaxnreg.dec;0; 40=> 48": "setmaxnreg.inc.sync.aligned.u32 232  -- waits for registers: the CTA's pool has too few",
    "setmaxnreg.dec;0; 40=> 176": "setmaxnreg.dec to more than the 168 held",
    "setmaxnreg.inc;0;232=>160": "setmaxnreg.inc to fewer than the 168 held",
    "setmaxnreg.inc;0;232=>236": "setmaxnreg takes multiples of 8 from 24 to 256",
    "setmaxnreg.inc;0;232=>264": "setmaxnreg takes multiples of 8 from 24 to 256",
}


@pytest.mark.parametrize("change", REGISTERS)
def test_register_pool(hopper: Instructions, change: str) -> None:
    out = torch.zeros(384, dtype=torch.int32)
    message = hopper.run("registers", out.clone(), out, change=change)
    assert REGISTERS[change] in message
    assert (message == "") == (REGISTERS[change] == "") == bool(out.all())


ASYNCHRONOUS_READS = {
    "wait_group;0;drop": "is written before an asynchronous read",
    "commit_group;0;drop": "is written before an asynchronous read",
    "st.volatile.shared;0;drop": "",
    "bar.sync;2;drop": "race on shared memory",
    "fence.proxy.async;0;drop": "is read asynchronously without fence.proxy.async",
}


@pytest.mark.parametrize("mode", ["late", "early"])
@pytest.mark.parametrize("change", ASYNCHRONOUS_READS)
def test_asynchronous_reads(hopper: Instructions, change: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared memory that a bulk store reads: written and fenced before, and not written again before the store has been waited for."""
    monkeypatch.setenv("GPUSIM_ASYNC", mode)
    out = torch.zeros(128, dtype=torch.int32)
    message = hopper.run("bulk", out.clone(), out, change=change)
    assert ASYNCHRONOUS_READS[change] in message
    assert (message == "") == (ASYNCHRONOUS_READS[change] == "")


def test_bulk_store_is_waited_for_before_the_exit(hopper: Instructions) -> None:
    given, out = torch.arange(128.0).reshape(8, 16), torch.arange(360.0).reshape(18, 20)
    assert "a thread exits without having waited" in hopper.run("reduce", given, out, change="wait_group;0;drop")


MISTAKES = {
    "out_of_bounds": "global memory out of bounds: 4 bytes at ",
    "misaligned": "misaligned access of 4 bytes",
    "unwritten_shared": "shared memory is read before it was written, at offset 128",
    "missing_barrier": "race on shared memory",
    "missing_warp_barrier": "race on shared memory",
    "two_writers": "race on global memory at ",
    "reader_and_writer": "race on global memory at ",
    "ticket<false>": "race on global memory at ",
    "half_barrier": "deadlock in ",
    "bounded": "64 threads per block; __launch_bounds__ says 32",
    "missing_copy_wait": "shared memory is read before it was written",
    "wrong_mask": "a lane runs a .sync instruction whose mask does not name it",
    "unknown_opcode": "unknown opcode: dp4a",
}


@pytest.mark.parametrize("kernel", MISTAKES)
def test_mistakes_are_reported(gpu: Instructions, kernel: str) -> None:
    message = gpu.run(kernel, torch.zeros(128, dtype=torch.int32), torch.zeros(64, dtype=torch.int32), 128)
    assert MISTAKES[kernel] in message
    assert kernel.partition("<")[0] in message


def test_unwritten_global_memory(gpu: Instructions) -> None:
    fresh = torch.full((128,), 0xFFA5 - 0x10000, dtype=torch.int16).view(torch.int32)  # the pattern that fresh memory holds
    assert "global memory is read before it was written" in gpu.run("missing_warp_barrier", fresh, torch.zeros(64, dtype=torch.int32))


def test_mistakes_stop_one_launch_only(gpu: Instructions) -> None:
    out = torch.zeros(64, dtype=torch.int32)
    assert gpu.run("half_barrier", out.clone(), out) != ""
    assert gpu.run("divergence", out.clone(), out) == ""


def test_files_stay_small() -> None:
    files = {p.name: len(p.read_text().splitlines()) for p in Path(__file__).parent.rglob("*") if p.suffix in (".cpp", ".h")}
    assert max(files.values()) <= 600, files
