"""The simulator's own tests: each family of instructions against values computed by other means, and each check it makes.

The kernels are in gpusim/instructions.cu. Results that the PTX ISA defines exactly are compared exactly.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from gpusim.harness import Instructions, needs_nvcc

pytestmark = needs_nvcc

U32 = 2**32


@pytest.fixture(scope="module", params=["80", "90a"])
def gpu(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Instructions:
    return Instructions(tmp_path_factory.mktemp("gpusim") / f"instructions_{request.param}.so", request.param)


@pytest.fixture(scope="module")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> Instructions:
    return Instructions(tmp_path_factory.mktemp("gpusim") / "instructions_hopper.so", "90a")


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


@pytest.mark.parametrize("schedule", ["", "1", "2"])
def test_locks_and_tickets(gpu: Instructions, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUSIM_SCHED", schedule)
    out = torch.zeros(2, dtype=torch.int32)
    assert gpu.run("lock", out.clone(), out) == ""
    assert out.tolist() == [0, 192]
    given, out = torch.arange(20, dtype=torch.int32), torch.zeros(22, dtype=torch.int32)
    assert gpu.run("ticket", given, out, 20) == ""
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


@pytest.mark.parametrize("mode", ["late", "early", "3"])
def test_tma(hopper: Instructions, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUSIM_ASYNC", mode)
    given = torch.zeros(20, 96, dtype=torch.int16)  # rows of 90 elements, padded to a multiple of 16 bytes
    given[:, :90] = torch.randint(1, 30000, (20, 90), dtype=torch.int16, generator=torch.Generator().manual_seed(11))
    given[:, 90:] = -1
    result, image = torch.zeros(20, 40, dtype=torch.int16), torch.zeros(512, dtype=torch.int16)
    assert hopper.run_tma(given, result, image) == ""
    box = torch.zeros(8, 64, dtype=torch.int16)
    box[2:, :50] = given[:6, 40:90]
    for row in range(8):
        for chunk in range(8):  # 128-byte swizzle: the chunk's number is combined with the row's
            at = row * 64 + (chunk ^ row) * 8
            assert torch.equal(image[at : at + 8], box[row, 8 * chunk : 8 * chunk + 8]), (row, chunk)
    expected = torch.zeros_like(result)
    expected[13:20, 8:40] = box[:7, :32]
    assert torch.equal(result, expected)


@pytest.mark.parametrize("mode", ["late", "early"])
def test_wgmma(hopper: Instructions, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUSIM_ASYNC", mode)
    given = torch.randint(-8, 9, (72, 16), generator=torch.Generator().manual_seed(12)).bfloat16()
    out = torch.zeros(64, 8)
    assert hopper.run("wgmma", given, out) == ""
    assert torch.equal(out, given[:64].float() @ given[64:].float().T + 0.5)


def test_clusters(hopper: Instructions) -> None:
    out = torch.zeros(8, dtype=torch.int32)
    assert hopper.run("cluster", out.clone(), out) == ""
    assert out.tolist() == [103, 100, 101, 102] * 2


MISTAKES = {
    "out_of_bounds": "global memory out of bounds: 4 bytes at ",
    "misaligned": "misaligned access of 4 bytes",
    "unwritten_shared": "shared memory is read before it was written, at offset 128",
    "missing_barrier": "race on shared memory",
    "missing_warp_barrier": "race on shared memory",
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
    assert kernel in message


def test_unwritten_global_memory(gpu: Instructions) -> None:
    fresh = torch.full((128,), 0xFFA5 - 0x10000, dtype=torch.int16).view(torch.int32)  # the pattern that fresh memory holds
    assert "global memory is read before it was written" in gpu.run("missing_warp_barrier", fresh, torch.zeros(64, dtype=torch.int32))


def test_mistakes_stop_one_launch_only(gpu: Instructions) -> None:
    out = torch.zeros(64, dtype=torch.int32)
    assert gpu.run("half_barrier", out.clone(), out) != ""
    assert gpu.run("divergence", out.clone(), out) == ""


def test_files_stay_small() -> None:
    files = {p.name: len(p.read_text().splitlines()) for p in (Path(__file__).parent / "gpusim").rglob("*") if p.suffix in (".cpp", ".h")}
    assert max(files.values()) <= 600, files
