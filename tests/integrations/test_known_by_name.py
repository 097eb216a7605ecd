"""`import moe_ext` is enough for `experts_implementation="moe_ext"`, whatever is imported first and in every process that does it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import os
import pickle
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_ext.integrations import transformers_facts
from moe_ext.integrations.after_import import after_import
from moe_ext.integrations.run import decorated
from tests.helpers.models import build, needs_tf5

ROOT = Path(__file__).resolve().parents[2]

LOAD = """
from transformers import AutoModelForCausalLM
from torch.profiler import profile
import torch
model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, experts_implementation="moe_ext")
with profile() as seen, torch.no_grad():
    model(torch.arange(5)[None])
print([event.key for event in seen.key_averages() if event.key.startswith(("moe::", "moe_ext::"))])
"""
ORDERS = {
    "moe_ext first": "import sys, moe_ext; assert 'transformers' not in sys.modules",
    "transformers first, not used yet": "import transformers, moe_ext",
    "a model's class first": "from transformers import Qwen3MoeForCausalLM; import moe_ext",
    "in the middle of the import of transformers": """
import importlib.abc, sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "transformers.integrations":
            import moe_ext
sys.meta_path.insert(0, Finder())
""",
}


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    build("qwen3_moe", num_hidden_layers=1).save_pretrained(folder)
    return folder


@needs_tf5
@pytest.mark.parametrize("order", ORDERS)
def test_T140_the_import_alone_makes_the_name_known(order: str, checkpoint: Path) -> None:
    done = python(f"CHECKPOINT = {str(checkpoint)!r}\n{ORDERS[order]}\n{LOAD}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['moe::grouped_forward']"


@needs_tf5
def test_T140_a_config_that_carries_the_name_needs_the_import_where_it_arrives(tmp_path: Path) -> None:
    """Pickled or copied to another process it is a name, and no code. A checkpoint does not carry it."""
    config = build("qwen3_moe", num_hidden_layers=1, experts_implementation="moe_ext").config
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    config.save_pretrained(tmp_path)
    assert "moe_ext" not in (tmp_path / "config.json").read_text()
    arrives = f"""
import pickle
from transformers import Qwen3MoeForCausalLM
Qwen3MoeForCausalLM(pickle.load(open({str(tmp_path / "config")!r}, "rb")))
print("made")
"""
    assert "is not supported" in python(arrives).stderr
    assert python("import moe_ext" + arrives).stdout == "made\n"
    assert python(arrives.replace("from transformers", "import moe_ext\nfrom transformers")).stdout == "made\n"


@needs_tf5
def test_T140_a_registry_that_is_imported_again_knows_the_name() -> None:
    code = f"""
import importlib, sys, moe_ext, transformers.integrations.moe as registry
for again in (importlib.reload, lambda module: sys.modules.pop(module.__name__) and importlib.import_module(module.__name__)):
    registry = again(registry)
    assert "moe_ext" in registry.ALL_EXPERTS_FUNCTIONS.keys()
moe_ext = importlib.reload(moe_ext)
print(registry.__name__ == {transformers_facts.REGISTRY_MODULE!r}, len([f for f in sys.meta_path if hasattr(f, "_moe_ext_waits_for")]))
"""
    done = python(code)
    assert done.stdout == "True 3\n", done.stderr


@needs_tf5
def test_T140_adapters_are_grouped_when_peft_is_imported_last(checkpoint: Path) -> None:
    code = f"""
import moe_ext, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(checkpoint)!r}, experts_implementation="moe_ext")
from peft import LoraConfig, get_peft_model
from moe_ext.integrations.run import decorated, peft
adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]))
seen, real = [], peft.with_adapters
peft.with_adapters = lambda *arguments: seen.append(real(*arguments)) or seen[-1]
adapted(torch.arange(5)[None])
print([weights.fusable for weights in seen])
"""
    done = python(code)
    assert done.stdout == "[False]\n", done.stdout + done.stderr


@needs_tf5
def test_T140_transformers_is_imported_even_where_the_name_cannot_be_registered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, finders: None
) -> None:
    def fails() -> None:
        raise AttributeError("a registry of another kind")

    importlib.import_module(transformers_facts.REGISTRY_MODULE)
    monkeypatch.setattr(transformers_facts, "experts_registry", fails)
    with caplog.at_level(logging.WARNING, "moe_ext"):
        decorated.register_when_loaded()
    assert "experts_implementation='moe_ext' is not registered: a registry of another kind" in caplog.text


@needs_tf5
def test_T140_releases_that_compare_with_a_list_of_names_accept_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """5.0 to 5.6. `make smoke` runs a model of each."""

    class OldModel:
        def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
            if requested_experts not in ("eager", "grouped_mm"):
                raise ValueError(f"{requested_experts} is not supported")
            return requested_experts

    monkeypatch.setitem(sys.modules, transformers_facts.MODELS_MODULE, types.SimpleNamespace(PreTrainedModel=OldModel))  # type: ignore[arg-type]
    for _ in range(2):
        transformers_facts.accept_implementation("moe_ext")
    checked = OldModel().get_correct_experts_implementation
    assert (checked("moe_ext"), checked("eager")) == ("moe_ext", "eager")
    with pytest.raises(ValueError, match="batched_mm is not supported"):
        checked("batched_mm")


# ---- the hook itself
@pytest.fixture
def finders() -> Iterator[None]:
    before = list(sys.meta_path)
    yield
    sys.meta_path[:] = before


@pytest.mark.tf4
def test_after_import_leaves_no_trace_on_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finders: None) -> None:
    (tmp_path / "waited_for.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    called: list[str] = []
    after_import("waited_for", lambda: called.append("first"))
    after_import("waited_for", lambda: called.append(f"value {sys.modules['waited_for'].VALUE}"))  # takes the place of the first
    assert not called
    spec = importlib.util.find_spec("waited_for")  # looking for it is no import
    assert spec is not None and spec.loader.get_source("waited_for") == "VALUE = 1\n" and not called  # type: ignore[union-attr]
    module = importlib.import_module("waited_for")
    try:
        assert called == ["value 1"]
        assert type(module.__loader__).__name__ == "SourceFileLoader" and module.__spec__.loader is module.__loader__  # type: ignore[union-attr]
        assert inspect.getsource(module) == "VALUE = 1\n"
        after_import("waited_for", lambda: called.append("is loaded"))
        assert called == ["value 1", "is loaded"]
        importlib.reload(module)
        assert called == ["value 1", "is loaded", "is loaded"]
    finally:
        del sys.modules["waited_for"]


@pytest.mark.tf4
def test_after_import_leaves_a_module_that_is_missing_missing(finders: None) -> None:
    after_import("moe_ext_waits_for_nothing", lambda: pytest.fail("it was not imported"))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("moe_ext_waits_for_nothing")
