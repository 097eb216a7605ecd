"""Every Mixture-of-Experts architecture of the installed transformers: block count, path, forward, all gradients, and the way back.

With `--support-json FILE` the results are written down; `tools/support_table.py` makes docs/SUPPORT.md of such files.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moe_ext
from moe_ext.testing import ErrorReport
from tests.helpers.models import transformers, transformers_major
from tests.integrations.architectures import Architecture, measure

pytestmark = pytest.mark.tf4

ARCHITECTURES: list[Architecture] = importlib.import_module(f"tests.integrations.architectures.v{transformers_major()}").ARCHITECTURES
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Case:
    """What one test found out: the error rule's figures, or the reason why the model is left alone, or that of a failure."""

    figures: dict[str, ErrorReport] = field(default_factory=dict)
    reason: str = ""
    failed: bool = False


class Support:
    """What was found out about each architecture, for the table."""

    def __init__(self) -> None:
        self.cases: defaultdict[str, dict[tuple[str, bool], Case]] = defaultdict(dict)

    @contextmanager
    def noting(self, name: str, dtype: str, training: bool) -> Iterator[Case]:
        case = self.cases[name][dtype, training] = Case()
        try:
            yield case
        except Exception as error:
            case.failed, case.reason = True, next(iter(str(error).splitlines()), type(error).__name__)
            raise

    def rows(self) -> dict[str, dict[str, Any]]:
        """Architectures of which every case was run."""
        return {a.name: self._row(a) for a in ARCHITECTURES if len(self.cases[a.name]) == 2 * len(DTYPES)}

    def _row(self, a: Architecture) -> dict[str, Any]:
        cases = sorted(self.cases[a.name].values(), key=lambda case: not case.failed)
        row = {"blocks": a.blocks, "path": "fails" if cases[0].failed else a.path, "reason": cases[0].reason}
        for dtype in () if row["reason"] else DTYPES:
            figures = [f for (d, _), case in self.cases[a.name].items() if d == dtype for f in case.figures.items()]
            row[f"{dtype} forward"] = round(max(f.ratio for name, f in figures if name == "output"), 2)
            row[f"{dtype} backward"] = round(max(f.ratio for name, f in figures if name != "output"), 2)
        return row


@pytest.fixture(scope="session")
def support(request: pytest.FixtureRequest) -> Iterator[Support]:
    """Written to the file of `--support-json` at the end; of a run of some architectures only, the others' rows in it stay."""
    found = Support()
    yield found
    path = request.config.getoption("--support-json")
    if path is None:
        return
    before = json.loads(Path(path).read_text())["architectures"] if Path(path).exists() else {}
    rows = {name: row for name, row in sorted((before | found.rows()).items()) if name in {a.name for a in ARCHITECTURES}}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    Path(path).write_text(f'{{"transformers": "{transformers.__version__}", "architectures": {{\n{lines}\n}}}}\n')


def forwards(model: nn.Module) -> set[str]:
    """Modules whose forward is an attribute of the instance."""
    return {name for name, module in model.named_modules() if "forward" in module.__dict__}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_architecture(architecture: Architecture, dtype: str, training: bool, support: Support) -> None:
    with support.noting(architecture.name, dtype, training) as case:
        model = measure.build(architecture, DTYPES[dtype], training)
        own_forwards, choices = forwards(model), measure.Choices()
        plain = measure.run(architecture, model, choices.recording())
        if architecture.path == "skipped":
            case.reason = refusal(architecture, model)
        else:
            exact = measure.run(architecture, measure.in_float64(model), measure.exactly(DTYPES[dtype]), choices.replaying())
            check_report(architecture, moe_ext.enable(model, strict=True))
            case.figures = measure.errors(measure.run(architecture, model, choices.replaying()), plain, exact)
            wrong = [f"{name}: {figure}" for name, figure in case.figures.items() if not figure.ok]
            assert not wrong, "; ".join(wrong)
            check_calls(architecture, model)
            assert moe_ext.disable(model) == architecture.blocks
        assert measure.run(architecture, model).equals(plain), "the model is not what it was"
        assert forwards(model) == own_forwards, "a forward was left on an instance"


def check_report(architecture: Architecture, report: moe_ext.EnableReport) -> None:
    assert [b.path for b in report.blocks] == [architecture.path] * architecture.blocks, str(report)
    assert report.enabled_count == architecture.blocks, str(report)


def check_calls(architecture: Architecture, model: nn.Module) -> None:
    """The path that the report names is the one that is run, once for each set of experts: nothing fell back in silence."""
    calls = measure.Calls()
    measure.run(architecture, model, calls)
    fused, products = (architecture.blocks, 0) if architecture.path == "fused" else (0, 2 * architecture.blocks)
    assert (calls.count["_grouped_forward_train"], calls.count["grouped_mm"]) == (fused, products), calls.count


def refusal(architecture: Architecture, model: nn.Module) -> str:
    with pytest.raises(moe_ext.NoExpertsFound, match=re.escape(architecture.reason)) as error:
        moe_ext.enable(model)
    blocks = error.value.rejected
    return str(blocks[0].reason) if blocks else str(error.value).partition(": ")[2]


def test_every_class_of_experts_is_in_the_list() -> None:
    """A new transformers shows its new architectures here."""
    named = r"\w*(?:Experts|SparseMoeBlock|SparseMoEBlock|SparseMLP|Moe|MoE)"
    pattern = re.compile(rf"^@use_experts_implementation.*?^class (\w+)|^class ({named})\(", re.MULTILINE | re.DOTALL)
    expected = set()
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        expected |= {f"{file.stem}.{a or b}" for a, b in pattern.findall(file.read_text())}
    classes = {type(module) for architecture in ARCHITECTURES for module in architecture.build().modules()}
    assert expected - {f"{c.__module__.rpartition('.')[2]}.{c.__name__}" for c in classes} == set()


def test_the_table_is_what_the_results_give() -> None:
    command = [sys.executable, "-m", "tools.support_table", "--check"]
    check = subprocess.run(command, cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


# --------------------------------------------------------------------------------------------------------------- the measuring itself
def _routed(x: torch.Tensor) -> list[torch.Tensor]:
    top = x.topk(2, dim=-1)
    best, where = torch.max(x, dim=1)
    return [
        top.values, top.indices, best, where, x.argmax(-1), x.sort(dim=-1, descending=True).indices, x.argsort(dim=0),
        x.max(dim=-1, keepdim=True)[0], x > 0, torch.rand_like(x), torch.empty_like(x).uniform_(), torch.empty_like(x).exponential_(),
    ]  # fmt: skip


def test_a_replay_makes_the_recorded_choices_and_draws() -> None:
    x, other = torch.randn(2, 5, 7)
    choices = measure.Choices()
    with choices.recording():
        recorded = _routed(x)
    other.requires_grad_()
    with choices.replaying():
        replayed = _routed(other)
    assert all(torch.equal(a, b) for a, b in zip(recorded, _routed(x)[:9], strict=False))  # recording changes nothing
    for i in (1, 3, 4, 5, 6, 8, 9, 10, 11):  # indices, masks and noise are the recorded ones
        assert torch.equal(recorded[i], replayed[i]), i
    assert not torch.equal(other.topk(2).indices, recorded[1])
    # Values are those of the recorded places, and that is where their gradients go.
    assert torch.equal(replayed[0], other.gather(-1, recorded[1]))
    assert torch.equal(replayed[2], other.gather(1, recorded[3][:, None])[:, 0])
    assert torch.equal(replayed[7], other.gather(-1, recorded[4][:, None]))
    replayed[0].sum().backward()
    assert torch.equal(other.grad, torch.zeros(5, 7).scatter(-1, recorded[1], 1.0))


def test_a_replay_notices_other_choices() -> None:
    x = torch.randn(3, 4)
    choices = measure.Choices()
    with choices.recording():
        x.argmax(-1)
    with pytest.raises(AssertionError, match="did not make"), choices.replaying():
        pass
    with pytest.raises(AssertionError, match=r"argmax of shape \(3,\)"), choices.replaying():
        x.argmax(-1), x.argmax(-1)


def test_exactly_computes_in_float64_where_float32_is_asked_for() -> None:
    x = torch.rand(9, dtype=torch.float64)
    with measure.exactly():
        results = [x.float(), x.to(torch.float32), x.softmax(-1, dtype=torch.float32), torch.zeros(2), torch.ones(2, dtype=torch.float32)]
    assert {t.dtype for t in results} == {torch.float64} and torch.equal(results[0], x)
    assert torch.zeros(2).dtype == torch.float32


def test_a_wrong_gradient_of_any_kind_is_an_error() -> None:
    """Each quantity can fail: what is judged together does not hide what is wrong in one of it."""
    architecture = next(a for a in ARCHITECTURES if a.name == "qwen3_moe")
    model = measure.build(architecture, torch.float32, training=True)
    choices = measure.Choices()
    plain = measure.run(architecture, model, choices.recording())
    exact = measure.run(architecture, measure.in_float64(model), measure.exactly(), choices.replaying())
    names = measure.quantities(list(plain.gradients))
    assert len(names) >= 4 and all(figure.ok for figure in measure.errors(plain, plain, exact).values())
    for kind, members in names.items():
        wrong = measure.Run(plain.output, plain.gradients | {members[-1]: plain.gradients[members[-1]] * 1.001})
        assert [name for name, figure in measure.errors(wrong, plain, exact).items() if not figure.ok] == [kind]
    assert not measure.errors(measure.Run(plain.output * 1.001, plain.gradients), plain, exact)["output"].ok
