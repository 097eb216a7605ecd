"""The commands `demo`, `doctor`, `explain`: what they print, write and return, and that they end in a sentence where they cannot go on."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_ext
from moe_ext.cli import command, doctor
from moe_ext.cli.main import main

PACKAGE = Path(moe_ext.__file__).parent


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError(f"a command reached for the network: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("MOE_EXT_DISABLE", raising=False)
    monkeypatch.delenv("MOE_EXT_CPU_ISA", raising=False)


def process(*args: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds the same moe_ext, or the one in `cwd`."""
    path = {"PYTHONPATH": str(cwd or PACKAGE.parent)}
    return subprocess.run([sys.executable, *args], cwd=cwd, env={**os.environ, **path, **environment}, capture_output=True, text=True)


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    real = command.find_spec
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == package else real(name))


# demo


def check_plot(path: Path) -> None:
    """Decodes the image: a plot has a background, and lines of both runs' colours wherever it likes."""
    from matplotlib import colors, image

    from moe_ext.cli.demo import COLORS

    pixels = torch.from_numpy(image.imread(path)[..., :3].copy())
    height, width, _ = pixels.shape
    assert min(height, width) >= 400
    white = (pixels == 1).all(-1)
    assert height * width / 2 < white.sum() < height * width
    levels = (pixels * 255).round().int()
    for color in COLORS:
        wanted = (torch.tensor(colors.to_rgb(color)) * 255).round().int()
        assert (levels == wanted).all(-1).sum() > 100, f"no line of colour {color}"


@pytest.mark.tf4
def test_demo_trains_compares_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "curves.png"
    assert main(["demo", "--size", "tiny", "--steps", "6", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    import transformers

    for expected in (
        f"transformers {transformers.__version__}",
        "loss of the last step",
        "tokens/s",
        "peak memory",
        "largest difference",
        str(out),
    ):
        assert expected in printed.out
    assert "model.layers.{0-1}.mlp" in printed.out and "2 of 2 expert blocks enabled" in printed.out
    assert "6/6" in printed.err, "the progress bar"
    assert "The curves agree." in printed.out
    check_plot(out)


@pytest.mark.tf4
def test_demo_fails_when_the_curves_part(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    enable = moe_ext.enable

    def enable_wrongly(model: torch.nn.Module) -> Any:
        report = enable(model)
        experts = [p for name, p in model.named_parameters() if ".experts." in name and "down_proj" in name]
        torch.nn.init.normal_(experts[0].data)
        return report

    monkeypatch.setattr(moe_ext, "enable", enable_wrongly)
    out = tmp_path / "curves.png"
    assert main(["demo", "--size", "tiny", "--steps", "4", "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert "The curves part" in printed.err and "The curves agree" not in printed.out
    check_plot(out)


@pytest.mark.tf4
def test_demo_has_nothing_to_compare_when_disabled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_EXT_DISABLE", "1")
    assert main(["demo", "--size", "tiny", "--steps", "1", "--out", str(tmp_path / "x.png")]) == 1
    printed = capsys.readouterr()
    assert "MOE_EXT_DISABLE" in printed.out and "nothing was enabled" in printed.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["matplotlib", "transformers"])
def test_demo_names_the_missing_package(
    package: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, package)
    assert main(["demo", "--out", str(tmp_path / "x.png")]) == 2
    printed = capsys.readouterr()
    assert f"pip install {package}" in printed.err and not printed.out
    assert not list(tmp_path.iterdir())


def test_demo_refuses_an_output_it_cannot_write_before_it_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path / "missing" / "x.png")]) == 2
    printed = capsys.readouterr()
    assert str(tmp_path / "missing") in printed.err and not printed.out
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "is a directory" in capsys.readouterr().err


def test_curves_agree_up_to_rounding_only() -> None:
    from moe_ext.cli.demo import EARLY_LIMIT, EARLY_STEPS, LATE_LIMIT, agreement

    steps = 4 * EARLY_STEPS
    curve = [5.0 * 0.99**i for i in range(steps)]

    def scaled(first: int, last: int, factor: float) -> list[float]:
        return [loss * factor if first <= i < last else loss for i, loss in enumerate(curve)]

    assert agreement(curve, curve).agree and agreement(curve, curve).largest == 0
    assert agreement(curve, scaled(0, steps, 1 + EARLY_LIMIT / 2)).agree
    assert not agreement(curve, scaled(2, 3, 1 + EARLY_LIMIT * 2)).agree, "an early step tells"
    assert agreement(curve, scaled(EARLY_STEPS, EARLY_STEPS + 2, 1 + LATE_LIMIT * 2)).agree, "a single later step does not"
    assert not agreement(curve, scaled(3 * steps // 4, steps, 1 - LATE_LIMIT * 2)).agree, "the level that is reached does"
    assert agreement(curve, scaled(7, 8, 1 + EARLY_LIMIT * 2)).largest_step == 8
    assert not agreement(curve, [*curve[:-1], math.nan]).agree
    assert not agreement([math.inf] * steps, [math.inf] * steps).agree


def test_demo_text_is_this_pythons_sources() -> None:
    from moe_ext.cli.demo import standard_library_text

    text, files = standard_library_text(200_000)
    assert len(text) == 200_000 and files > 1
    assert text == standard_library_text(200_000)[0]
    assert text.startswith((Path(os.__file__).parent / "__future__.py").read_bytes())


# doctor


def test_doctor_prints_the_same_as_text_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert report["usable"] and report["problem"] is None
    assert report["versions"]["torch"] == torch.__version__
    assert report["libraries"]["libmoe_cpu.so"]["loaded"]
    assert report["processor"]["torch_threads"] == torch.get_num_threads()
    shown = [v for v in report["versions"].values() if v] + report["processor"]["instruction_sets"]
    shown += [x["path"] or x["why_not"] for x in report["libraries"].values()]
    shown += [v["name"] for v in report["cpu_kernels"]["variants"]] + [report["cpu_kernels"]["why"]]
    shown += [g["name"] for g in report["gpus"]["devices"]] or [report["gpus"]["why_none"]]
    for device in report["kernels"].values():
        for op, answer in device["ops"].items():
            assert (answer["kernel"] is None) != (answer["why_not"] is None)
            shown += [op, answer["kernel"] or answer["why_not"]]
    assert not any(rule["reason"] in text for rules in report["rules"].values() for rule in rules)
    assert main(["doctor", "--rules"]) == 0
    text = capsys.readouterr().out
    for op, rules in report["rules"].items():
        shown += [op, *(part for rule in rules for part in (rule["kernel"], rule["reason"], *rule["needs"]))]
    for value in shown:
        assert value in text


def test_doctor_finds_every_cpu_kernel() -> None:
    pytest.importorskip("moe_ext._C", reason="kernel tables are read through moe_ext._C, built for one Python version")
    report = doctor.examine()
    variants = report["cpu_kernels"]["variants"]
    assert variants[-1] == {"name": "generic", "runs_here": True}
    assert report["cpu_kernels"]["variant"] == next(v["name"] for v in variants if v["runs_here"]), "the best that runs here"
    ops = report["kernels"]["cpu"]["ops"]
    fused = {"grouped_up", "grouped_down_backward"}
    assert fused < set(ops) and list(ops) == list(report["kernels"]["cuda"]["ops"])
    assert {x["kernel"] for name, x in ops.items() if name not in fused} == {report["cpu_kernels"]["variant"]}
    assert {(ops[name]["kernel"], ops[name]["why_not"]) for name in fused} == {(None, doctor.STEPS)}
    assert list(report["rules"]) == ["grouped_mm", "grouped_mm_wgrad", "grouped_up", "grouped_down_backward"]
    assert "bfloat16" in report["kernels"]["cpu"]["dtypes"]


def test_doctor_explains_the_chosen_instruction_set() -> None:
    pytest.importorskip("moe_ext._C", reason="kernel tables are read through moe_ext._C, built for one Python version")
    chosen = process("-m", "moe_ext", "doctor", "--json", MOE_EXT_CPU_ISA="generic")
    assert chosen.returncode == 0, chosen.stderr
    kernels = json.loads(chosen.stdout)["cpu_kernels"]
    assert kernels["variant"] == "generic" and "MOE_EXT_CPU_ISA=generic" in kernels["why"]
    wrong = process("-m", "moe_ext", "doctor", MOE_EXT_CPU_ISA="mmx")
    assert wrong.returncode == 1
    assert "does not work here" in wrong.stdout and "MOE_EXT_CPU_ISA=mmx" in wrong.stdout


def test_doctor_works_without_introspection(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "moe_ext._C", None)
    (tmp_path / "_C.cpython-27-x86_64-linux-gnu.so").touch()
    monkeypatch.setattr(doctor, "HERE", tmp_path)
    assert "built for another Python" in doctor.examine()["libraries"]["_C"]["why_not"]
    (tmp_path / "_C.cpython-27-x86_64-linux-gnu.so").unlink()
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "moe_ext/_C is not built" in text and doctor.REBUILD in text
    assert "moe_ext works here" in text


def test_doctor_tells_what_the_cpu_library_lacks(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "moe_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    done = process("-m", "moe_ext", "doctor", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "moe_ext does not work here: libmoe_cpu.so is missing" in done.stdout
    for arguments in (["demo"], ["explain", "."]):
        done = process("-m", "moe_ext", *arguments, cwd=tmp_path)
        assert done.returncode in (1, 2) and "Traceback" not in done.stderr
        assert done.returncode == 2 or "libmoe_cpu.so is missing" in done.stderr


def test_T142_an_unbuilt_source_folder_says_that_it_is_one_and_what_to_do(tmp_path: Path) -> None:
    """Python started in the clone after `pip install .` finds the clone before the package."""
    clone, site = tmp_path / "clone", tmp_path / "site"
    shutil.copytree(PACKAGE, clone / "moe_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (clone / "csrc").mkdir()
    done = process("-m", "moe_ext", "doctor", cwd=clone)
    assert f"imported from its source folder {clone}, which is not built; build here with: pip install" in done.stdout
    shutil.copytree(PACKAGE, site / "moe_ext", ignore=shutil.ignore_patterns("libmoe_cuda.so", "__pycache__"))
    done = process("-m", "moe_ext", "doctor", cwd=clone, PYTHONPATH=os.pathsep.join(("", str(site))))
    assert done.returncode == 1
    assert f"start Python in another folder to use the one installed in {site}, or build here with: pip install" in done.stdout
    done = process("-c", "import moe_ext", cwd=clone)
    assert "moe_ext cannot be used: libmoe_cpu.so is missing" in done.stderr and str(clone) in done.stderr
    elsewhere = process("-m", "moe_ext", "doctor", cwd=tmp_path, PYTHONPATH=str(site))
    assert elsewhere.returncode == 0, elsewhere.stdout


@pytest.mark.parametrize("name", ["libmoe_cpu.so", "renamed.so"])
def test_T143_doctor_works_with_a_library_that_another_program_has_loaded(name: str, tmp_path: Path) -> None:
    library = tmp_path / name
    shutil.copy(PACKAGE / "libmoe_cpu.so", library)
    code = f"import torch; torch.ops.load_library({str(library)!r}); from moe_ext.cli.main import main; "
    done = process("-c", code + "raise SystemExit(main(['doctor', '--json']))")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    shown = report["libraries"]["libmoe_cpu.so"]
    assert report["usable"] and report["problem"] is None
    if name == "libmoe_cpu.so" and sys.platform == "linux":
        assert shown == {"path": str(library), "loaded": True, "why_not": None}
        assert report["libraries"]["libmoe_cuda.so"]["loaded"] is False
    elif sys.platform == "linux":  # whoever loads it by another name is not asked what it contains
        assert "came from another library" in shown["why_not"] and report["kernels"]["cpu"]["why_not"] == shown["why_not"]


def test_doctor_imports_no_model_library() -> None:
    done = process("-c", "import sys; from moe_ext.cli.main import main; main(['doctor']); assert 'transformers' not in sys.modules")
    assert done.returncode == 0, done.stderr


# explain


def write_config(folder: Path, **changes: Any) -> Path:
    """A Qwen3-MoE whose weights no machine that runs these tests could hold."""
    from transformers import Qwen3MoeConfig

    sizes: dict[str, Any] = {"hidden_size": 8192, "moe_intermediate_size": 8192, "num_experts": 128, "num_hidden_layers": 3}
    Qwen3MoeConfig(vocab_size=256, num_experts_per_tok=8, **{**sizes, **changes}).save_pretrained(folder)
    return folder


@pytest.mark.tf4
def test_explain_reads_a_checkpoint_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(tmp_path)
    assert main(["explain", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "Qwen3MoeForCausalLM" in text and "G parameters" in text
    assert "model.layers.{0-2}.mlp" in text and "can be enabled" in text
    assert main(["explain", str(tmp_path / "config.json")]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == text.splitlines()[1:]

    assert main(["explain", "--json", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"] == "Qwen3MoeForCausalLM" and not report["quantized"]
    assert [block["module"].split(".")[:4] for block in report["blocks"]] == [["model", "layers", str(i), "mlp"] for i in range(3)]
    for block in report["blocks"]:
        assert block["class"] in text and block["reason"] is None and not block["enabled"]


@pytest.mark.tf4
def test_explain_says_when_a_checkpoint_is_quantized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    assert main(["explain", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "is quantized" in printed and "cannot be made here" in printed and "before quantization" in printed


def test_T145_explain_refuses_experts_in_fp8_as_enable_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The checkpoint's layers are made on meta, so the reason is that of the model with its weights."""
    write_config(tmp_path, num_hidden_layers=1, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert main(["explain", str(tmp_path)]) == 1
    assert "registry of its own, FP8ExpertsInterface" in capsys.readouterr().err


@pytest.mark.tf4
def test_T145_explain_of_a_4_bit_checkpoint_describes_its_4_bit_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(tmp_path, num_hidden_layers=1, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert main(["explain", str(tmp_path)]) == 0
    assert "The table describes its quantized layers." in capsys.readouterr().out


@pytest.mark.tf4
def test_explain_finds_no_experts_in_a_dense_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig

    LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    assert main(["explain", str(tmp_path)]) == 1
    assert "Llama" in capsys.readouterr().err


@pytest.mark.tf4
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "has no config.json"),
        ("{", "cannot be read as JSON"),
        ("[]", "no JSON object"),
        ('{"hidden_size": 8}', "without model_type"),
        ('{"model_type": "mixture_of_nothing"}', "does not know model_type 'mixture_of_nothing'"),
        ('{"model_type": "qwen3_moe", "num_hidden_layers": "many"}', "transformers"),
    ],
)
def test_explain_says_what_is_wrong_with_a_checkpoint(
    content: str | None, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert main(["explain", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert expected in error and str(tmp_path) in error or "cannot build" in error


def test_explain_never_downloads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "Qwen/Qwen3-30B-A3B"]) == 2
    assert "nothing is ever downloaded" in capsys.readouterr().err


@pytest.mark.tf4
def test_explain_runs_a_checkpoints_own_code_only_when_told(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    write_config(checkpoint, num_hidden_layers=1)
    fields = json.loads((checkpoint / "config.json").read_text())
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (checkpoint / "config.json").write_text(json.dumps({**fields, "model_type": "own", "auto_map": auto_map}))
    (checkpoint / "own.py").write_text(
        "import pathlib\n"
        "from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM\n"
        f"pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class OwnConfig(Qwen3MoeConfig):\n    model_type = 'own'\n"
        "class OwnModel(Qwen3MoeForCausalLM):\n    config_class = OwnConfig\n"
    )
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "home")}
    done = process("-m", "moe_ext", "explain", str(checkpoint), **environment)
    assert done.returncode == 2 and "--trust-remote-code" in done.stderr
    assert not (tmp_path / "ran").exists()
    done = process("-m", "moe_ext", "explain", "--trust-remote-code", str(checkpoint), **environment)
    assert done.returncode == 0, done.stderr
    assert "OwnModel" in done.stdout and (tmp_path / "ran").exists()


# the command line itself


def test_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["frobnicate"], ["explain"], ["demo", "--steps", "0"], ["demo", "--size", "huge"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
        assert "usage: moe-ext" in capsys.readouterr().err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("demo", "doctor", "explain"))
