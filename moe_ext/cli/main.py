"""The console script `moe-ext`: `demo`, `doctor`, `explain DIR`.

Exit codes: 0 done, 1 the answer is no (the demo's curves part, the CPU library cannot be loaded, no expert layer found), 2 nothing was
begun (usage, a missing package, an unreadable checkpoint). transformers and matplotlib are imported by the command that needs them;
no command ever reaches for the network.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .command import CommandError, require


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; `argv` without the program's name, by default the process's own."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except CommandError as error:
        print(f"moe-ext {args.command}: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moe-ext", description="Fast mixture-of-experts layers for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="train a small Qwen3-MoE with and without moe_ext, compare and plot",
        description="Trains a small Qwen3-MoE as a byte-level language model on the Python standard library's sources, as transformers "
        "ships it and with moe_ext, on the same data from the same weights. Exit code 1 when the loss curves part.",
    )
    demo.add_argument("--steps", type=_positive, default=None, help="training steps of each run (default: 150; with --size tiny: 40)")
    demo.add_argument("--size", choices=("small", "tiny"), default="small", help="size of the model (default: small)")
    demo.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the data (default: 0)")
    demo.add_argument("--out", type=Path, default=Path("demo.png"), help="where to write the plot (default: demo.png)")
    demo.set_defaults(run=_demo)

    doctor = commands.add_parser(
        "doctor",
        help="what is installed and built, and which kernel each device would use",
        description="Shows versions, libraries, instruction sets, GPUs, and which kernel each op would use on each device, or why none. "
        "Exit code 1 when moe_ext cannot work here.",
    )
    doctor.add_argument("--json", action="store_true", help="the same as JSON, with the rules")
    doctor.add_argument("--rules", action="store_true", help="show the rules by which one of several CUDA kernels for an op is chosen")
    doctor.set_defaults(run=_doctor)

    explain = commands.add_parser(
        "explain",
        help="what moe_ext.enable would do with a checkpoint, without its weights",
        description="Builds the model of a checkpoint directory or config.json on the meta device, without weights, and shows what "
        "moe_ext.enable would do with each of its expert layers. Reads local files only.",
    )
    explain.add_argument("checkpoint", type=Path, metavar="DIR", help="a checkpoint directory, or a config.json")
    explain.add_argument("--json", action="store_true", help="the report as JSON")
    explain.add_argument("--trust-remote-code", action="store_true", help="run the Python files that the checkpoint brings along")
    explain.set_defaults(run=_explain)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _demo(args: argparse.Namespace) -> int:
    require("transformers", "matplotlib", "tqdm")
    _need_libraries()
    from .demo import run

    return run(args.size, args.steps, args.seed, args.out)


def _need_libraries() -> None:
    from .doctor import load_error

    if reason := load_error():
        raise CommandError(reason, exit_code=1)


def _doctor(args: argparse.Namespace) -> int:
    from . import doctor

    report = doctor.examine()
    print(json.dumps(report, indent=2) if args.json else doctor.as_text(report, args.rules))
    return 0 if report["usable"] else 1


def _explain(args: argparse.Namespace) -> int:
    require("transformers")
    _need_libraries()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    config = _read_config(args.checkpoint, args.trust_remote_code)
    quantization = getattr(config, "quantization_config", None)
    model = _model_on_meta(config, args.trust_remote_code)
    unquantized = _quantize(model, quantization) if quantization else None
    if unquantized:
        model = _model_on_meta(config, args.trust_remote_code)  # the first one may be quantized in part

    from .. import NoExpertsFound, explain

    try:
        report = explain(model)
    except NoExpertsFound as error:
        raise CommandError(f"{args.checkpoint}: {error}", exit_code=1) from error
    if args.json:
        head = {"checkpoint": str(args.checkpoint), "model": type(model).__name__, "quantized": bool(quantization)}
        print(json.dumps({**head, **report.to_dict()}, indent=2))
        return 0
    print(f"{args.checkpoint}: {type(model).__name__}, {_count(model)} parameters, {_dtypes(model)}")
    print(report)
    if quantization:
        print(f"The checkpoint is quantized. {unquantized or 'The table describes its quantized layers.'}")
    return 0


def _read_config(checkpoint: Path, trust_remote_code: bool) -> Any:
    """The transformers config of a directory or file, or a CommandError that says what is wrong with it."""
    path = checkpoint / "config.json" if checkpoint.is_dir() else checkpoint
    if not path.is_file():
        if checkpoint.is_dir():
            raise CommandError(f"{checkpoint} has no config.json; give the directory of a Hugging Face checkpoint, or its config.json")
        raise CommandError(f"{checkpoint} does not exist; give a local directory or config.json: nothing is ever downloaded")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CommandError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CommandError(f"{path} holds no JSON object, so it is no transformers config")

    import transformers

    known = fields.get("model_type") in transformers.CONFIG_MAPPING
    if "auto_map" in fields and not known and not trust_remote_code:
        raise CommandError(
            f"{checkpoint} describes its model in Python files of its own; they are not run unless, having read them, "
            "you add --trust-remote-code"
        )
    if "auto_map" not in fields and not known:
        name = f"model_type {fields['model_type']!r}" if "model_type" in fields else "a config without model_type"
        raise CommandError(f"{path}: transformers {transformers.__version__} does not know {name}; a newer transformers may")
    try:
        # The directory, where there is one: files that the config refers to lie beside it.
        source = path.parent if path.name == "config.json" else path
        return transformers.AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise CommandError(f"transformers {transformers.__version__} cannot read {path}: {error}") from error


def _model_on_meta(config: Any, trust_remote_code: bool) -> torch.nn.Module:
    """The model of `config` without memory for its weights: the language model where there is one, else whatever it describes."""
    import transformers

    reasons = []
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        try:
            with torch.device("meta"):
                return auto.from_config(config, trust_remote_code=trust_remote_code)
        except Exception as error:  # another way may work; the reasons are printed when none does
            reasons.append(f"{auto.__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}")
    raise CommandError(f"transformers {transformers.__version__} cannot build a model of {type(config).__name__}: " + "; ".join(reasons))


def _quantize(model: torch.nn.Module, quantization: Any) -> str | None:
    """Gives a model on meta the layers of a quantized checkpoint, as transformers does before it loads one; None, or why it cannot."""
    from transformers.quantizers import AutoHfQuantizer

    try:
        quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=True)
        with torch.device("meta"):
            quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    except Exception as error:  # each kind needs another package, and some need a GPU: what stands in the way is printed
        return f"Its layers cannot be made here ({error}), so the table describes the model before quantization."
    return None


def _dtypes(model: torch.nn.Module) -> str:
    return ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}))


def _count(model: torch.nn.Module) -> str:
    number = float(sum(p.numel() for p in model.parameters()))
    for unit in ("", " k", " M", " G"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} T"
