"""One architecture per layout of experts under the installed release of transformers:
`python -m tests.integrations.release_smoke_cases RESULT.json`.

Each is built tiny, enabled strictly, judged by the error rule (output and all gradients against the unpatched model and float64),
disabled, and run again bit for bit. Before all that, one is loaded by name: `experts_implementation="moe_ext"` after `import moe_ext`
and no more. `tools/release_smoke.py` runs this under one release after another. An architecture that a release does not have is
"not there".
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

import moe_ext
from tests.integrations.architectures import Architecture, measure

#: Which architecture stands for a layout; the first that a release has is run.
LAYOUTS: dict[str, tuple[str, ...]] = {
    "[E,2I,H]": ("qwen3_moe",),
    "[E,2I,H], jitter": ("mixtral",),
    "transposed, interleaved, biases": ("gpt_oss",),
    "no gate": ("nemotron_h",),
    "clamped gate": ("deepseek_v4", "minimax_m3_vl_text"),
    "gelu_tanh": ("gemma4_text",),
    "groups of experts": ("deepseek_v3",),
    "weights on the input": ("llama4_text",),
    "flattened": ("dbrx",),
    "grouped linear, attention": ("jetmoe",),
    "grouped linear": ("granitemoe",),
    "zero experts": ("longcat_flash",),
    "fc1 and fc2": ("aria_text",),
}
BY_NAME = "by name, after the import alone"
MAJOR = int(transformers.__version__.partition(".")[0])


def _options(config_class: type) -> set[str]:
    """The options that a config knows: releases before 5.4 have no dataclasses for them."""
    if dataclasses.is_dataclass(config_class):
        return {f.name for f in dataclasses.fields(config_class)}
    return set(inspect.signature(config_class.__init__).parameters)


def _small(package: str, config: str, **options: Any) -> Any:
    """`v5.small` for the configs of any release."""
    from tests.integrations.architectures import v5

    config_class = getattr(importlib.import_module(f"transformers.models.{package}.configuration_{package}"), config)
    known = _options(config_class)
    return config_class(**({name: value for name, value in v5.SMALL.items() if name in known} | options))


def _older_spelling(name: str) -> Architecture | None:
    """An architecture as earlier releases want it configured."""
    from tests.integrations.architectures import v5

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if name == "nemotron_h" and version < (5, 13):
        layers = ["mamba", "moe", "attention", "moe"]
        return v5.lm("nemotron_h", "NemotronH", **v5.NEMOTRON | {"layers_block_type": layers})
    if name == "jetmoe" and version < (5, 2):  # its config has no such option, and its model reads it
        return v5.lm("jetmoe", "JetMoe", blocks=4, path="composed", kv_channels=16, pad_token_id=None)
    if name == "dbrx" and version < (5, 15):  # heads of keys come from attn_config, and its code runs where all sizes are equal only
        sizes = {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 64}
        attention = {"rope_theta": 10000.0, "clip_qkv": 8.0, "kv_n_heads": 2}
        experts = {"ffn_hidden_size": 32, "hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2, "moe_jitter_eps": 0.1}
        return v5.lm("dbrx", "Dbrx", **sizes, attn_config=attention, ffn_config=experts)
    return None


def architecture(name: str) -> Architecture | None:
    """The entry of that name, or None where the release does not have the architecture."""
    module = importlib.import_module(f"tests.integrations.architectures.v{MAJOR}")
    entry = next((a for a in module.ARCHITECTURES if a.name == name), None)
    if entry is None or find_spec(f"transformers.models.{name.removesuffix('_text')}") is None:
        return None
    return entry if MAJOR < 5 else _older_spelling(name) or entry


def check(entry: Architecture) -> str:
    """The path that the experts took; raises AssertionError for what is not as it was, or less accurate than the rule allows."""
    model, choices = measure.build(entry, torch.float32, training=True), measure.Choices()
    plain = measure.run(entry, model, choices.recording())
    exact = measure.run(entry, measure.in_float64(model), measure.exactly(), choices.replaying())
    report = moe_ext.enable(model, strict=True)
    assert report.enabled_count == entry.blocks, f"{report.enabled_count} blocks were enabled, {entry.blocks} are there"
    figures = measure.errors(measure.run(entry, model, choices.replaying()), plain, exact)
    assert all(f.ok for f in figures.values()), "; ".join(f"{name}: {f}" for name, f in figures.items() if not f.ok)
    assert moe_ext.disable(model) == entry.blocks, "not all blocks were disabled"
    assert measure.run(entry, model).equals(plain), "the model is not what it was"
    return " and ".join(sorted({block.path for block in report.blocks}))


def by_name(entry: Architecture) -> str:
    """The path of experts that were only given the name: `enable` and `register` have not been called in this process."""
    model = measure.build(entry, torch.float32, training=False)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        named = type(model).from_pretrained(folder, experts_implementation="moe_ext").eval()
    calls = measure.Calls()
    measure.run(entry, named, calls)
    assert calls.count["_grouped_forward_train"] == entry.blocks, calls.count
    return "fused"


def outcome(names: tuple[str, ...], check: Callable[[Architecture], str] = check) -> dict[str, str]:
    """Of the first architecture that is there: its name, and the path taken or the reason of a failure."""
    entry = next((a for a in map(architecture, names) if a is not None), None)
    if entry is None:
        return {"path": "not there"}
    try:
        return {"architecture": entry.name, "path": check(entry)}
    except moe_ext.EnableError as error:
        reasons = dict.fromkeys(block.reason for block in error.report.skipped)
        return {"architecture": entry.name, "path": "fails", "reason": "; ".join(map(str, reasons))}
    except Exception as error:  # whatever it is, it is that release's entry in the table
        return {"architecture": entry.name, "path": "fails", "reason": f"{type(error).__name__}: {error}"}


def main() -> None:
    torch.set_num_threads(1)
    if MAJOR >= 5:
        importlib.import_module("tests.integrations.architectures.v5").small = _small
    named = {"path": "not there"} if MAJOR < 5 else outcome(LAYOUTS["[E,2I,H]"], by_name)
    results = {BY_NAME: named} | {layout: outcome(names) for layout, names in LAYOUTS.items()}
    Path(sys.argv[1]).write_text(json.dumps({"transformers": transformers.__version__, "layouts": results}))


if __name__ == "__main__":
    main()
