"""Proof that the simulator proves: kernels broken on purpose are noticed. The list is in mutations.py."""

from __future__ import annotations

import pytest

from tests.gpusim.harness import needs_nvcc
from tests.gpusim.mutations import MUTATIONS, REASONS, SWEEPS, SYNCHRONISING, Mutation, caught_by, kernels_of_9_0

pytestmark = needs_nvcc


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_mutation_is_noticed(mutation: Mutation) -> None:
    if mutation.architecture == 90 and not kernels_of_9_0():
        pytest.skip("CUTLASS is not installed, so the library has no kernels of sm_90a")
    how = caught_by(mutation)
    assert how and "GPUSIM_MUTATE" not in how


def test_without_a_mutation_everything_is_right() -> None:
    for name in sorted({(m.architecture, m.case) for m in MUTATIONS}):
        assert caught_by(Mutation("none", *name, kernel="no such kernel", text="-")) == ""


def test_reasons_are_about_drops_of_the_sweep() -> None:
    for names, text, numbers, reason in REASONS:
        assert set(names) <= {one.name for one in SWEEPS} and any(known.startswith(text) for known in SYNCHRONISING) and numbers, reason
