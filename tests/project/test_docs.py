"""Every code block of README.md, CONTRIBUTING.md and docs/ runs: Python page by page, shell commands are looked up and the quick ones run.

A page's Python blocks share one namespace, in order, as a reader would type them. Where a page shows what is printed (a `text` block
after the comment `<!-- prints -->`), it is compared. A block that cannot run at all has a comment `<!-- not run: reason -->` above it.

Stand-in: names of models on the Hugging Face Hub are folders here, with a tiny random model of the same architecture and a tiny
tokenizer, made by `checkpoints` below. Everything else, from_pretrained included, is the real thing.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import re
import shlex
import subprocess
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_ext
from moe_ext import testing

transformers = pytest.importorskip("transformers", reason="needs transformers (pip install 'moe-ext[hf]')")
pytestmark = pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="the pages are written for transformers 5")

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
EXCUSE, PRINTS, INCLUDED = re.compile(r"<!-- not run: (.+?) -->$"), "<!-- prints -->", re.compile(r'^--8<-- "([^"]+)"$')

#: How many blocks of all pages may go without being run.
EXCUSED = 4


@dataclass(frozen=True)
class Block:
    page: Path
    line: int  # of its first line of text
    language: str
    text: str
    above: str  # the line above the fence that is not empty

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def excuse(self) -> str | None:
        found = EXCUSE.search(self.above)
        return found[1] if found else None

    @property
    def included(self) -> str | None:
        """The file of the project whose text the site puts here."""
        found = INCLUDED.match(self.text.strip())
        return found[1] if found else None


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for m in FENCE.finditer(text):
        above = text[: m.start()].rstrip().rsplit("\n", 1)[-1].strip()
        indent = len(m["indent"])
        body = "".join(line[indent:] if line.strip() else "\n" for line in m["text"].splitlines(keepends=True))
        found.append(Block(page, text.count("\n", 0, m.start("text")) + 1, m["language"], body, above))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def of(*languages: str) -> list[Block]:
    return [b for b in BLOCKS if b.language in languages and b.excuse is None and b.included is None]


# ------------------------------------------------------------------------------------------------------------ models, without the Hub
#: Names that the pages load, and the family of transformers that the tiny model is of.
HUB = {"Qwen/Qwen3-30B-A3B": "Qwen3Moe", "mistralai/Mixtral-8x7B-v0.1": "Mixtral"}
SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from tokenizers import Tokenizer, models, pre_tokenizers

    folders = {}
    for name, family in HUB.items():
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(family)
        config = getattr(transformers, f"{family}Config")(**SIZES)
        getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16).save_pretrained(folder)
        words = ["<pad>", "<s>", "</s>", "<unk>", *(chr(c) for c in range(ord(" "), ord("Z") + 1))]
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
        folders[name] = folder
    return folders


@pytest.fixture
def hub(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The reader's machine: a folder to work in, and a Hub that has the models of HUB."""
    monkeypatch.chdir(tmp_path)
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        real = auto.from_pretrained.__func__

        def load(cls: Any, name: Any, *args: Any, real: Callable[..., Any] = real, **kwargs: Any) -> Any:
            return real(cls, checkpoints.get(str(name), name), *args, **kwargs)

        monkeypatch.setattr(auto, "from_pretrained", classmethod(load))


# ------------------------------------------------------------------------------------------------------------------------------ Python
def pages_with(*languages: str) -> list[Any]:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES if any(b.page == page for b in of(*languages))]


def without_times(text: str) -> str:
    """What a block printed, but for durations and the ends of lines."""
    return "\n".join(re.sub(r"\d+\.\d+ s\b", "0.0 s", line).rstrip() for line in text.strip().splitlines())


@pytest.fixture
def quiet_libraries() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_of_the_page_runs(page: Path, hub: None, quiet_libraries: None) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for block in blocks_of(page):
        if block.language == "python" and block.excuse is None and block.included is None:
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")  # a traceback names the line of the page
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, namespace)
            printed = out.getvalue()
        elif block.above == PRINTS:
            assert without_times(printed) == without_times(block.text), f"{block.where} is not what the block above it prints"


# ------------------------------------------------------------------------------------------------------------------------------- shell
def commands(block: Block) -> list[list[str]]:
    lines = block.text.replace("\\\n", " ").splitlines()
    split = (shlex.split(line, comments=True) for line in lines)
    return [words for words in split if words]


def without_variables(words: list[str]) -> list[str]:
    return words[next((i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), len(words)) :]


def pip_is_right(arguments: list[str]) -> None:
    """Extras and files exist, and pinned versions are those that the build itself installs."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    pinned = (ROOT / "build_tools" / "environment.py").read_text()
    assert arguments[0] == "install", arguments
    for i, word in enumerate(arguments[1:], 1):
        if arguments[i - 1] == "-r":
            assert (ROOT / word).is_file(), word
        if extras := re.fullmatch(r"(?:\.|moe-ext)\[(.+)\]", word):
            for extra in extras[1].split(","):
                assert re.search(rf"^{extra} = \[", pyproject, re.MULTILINE), f"pyproject.toml has no extra {extra}"
        if exact := re.fullmatch(r"(torch|nvidia-cutlass)==([\w.]+)", word):
            assert f'"{exact[2]}"' in pinned, f"the build installs another {exact[1]} than {exact[2]}"


def cli(arguments: list[str]) -> str:
    """What the console script `moe-ext` prints; it must not fail."""
    module, function = re.search(r'^moe-ext = "(.+):(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).groups()  # type: ignore
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            code = getattr(importlib.import_module(module), function)(arguments)
        except SystemExit as exit:  # --help
            code = exit.code
    assert not code, arguments
    return out.getvalue()


def check(words: list[str]) -> None:
    program, *rest = words
    if program == "pip":
        pip_is_right(rest)
    elif program == "make":
        done = subprocess.run(["make", "-n", *rest], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif program == "moe-ext":
        printed = cli([rest[0], "--help"])
        assert all(word in printed for word in rest[1:] if word.startswith("--")), words
    elif program == "python" and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]), rest[1]
    elif program == "python" and rest[0] == "-c":
        compile(rest[1], "-c", "exec")
    elif program == "python":
        assert (ROOT / rest[0]).is_file(), rest[0]
    elif program == "cd":
        assert (ROOT / rest[0]).is_dir(), rest[0]
    else:
        raise AssertionError(f"nobody has looked at this command: {words}")


@pytest.mark.parametrize("block", [pytest.param(b, id=b.where) for b in of("bash")])
def test_commands_exist(block: Block) -> None:
    assert commands(block)
    for words in map(without_variables, commands(block)):
        check(words)


def test_quick_commands_run(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """`doctor`, `explain` and one-liners of Python, as the pages have them; the checkpoint is the one of the tiny model."""
    tried = 0
    for block in of("bash"):
        for words in commands(block):
            program, *rest = without_variables(words)
            if program == "moe-ext" and rest[0] in ("doctor", "explain"):
                with monkeypatch.context() as patch:
                    for name, value in (word.split("=", 1) for word in words[: words.index(program)]):
                        patch.setenv(name, value)
                    assert cli([str(checkpoints["Qwen/Qwen3-30B-A3B"]) if "/" in word else word for word in rest])
            elif program == "python" and rest[0] == "-c":
                exec(rest[1], {})
            else:
                continue
            tried += 1
    assert tried >= 3


# ------------------------------------------------------------------------------------------------------------------ nothing is left out
def test_every_block_is_run_compared_included_or_excused() -> None:
    for block in BLOCKS:
        if block.included is not None:
            assert (ROOT / block.included).is_file(), block.where
        elif block.excuse is None:
            assert block.language in ("python", "bash", "text"), f"{block.where}: a block of {block.language or 'no language'}"
            if block.language == "text":  # a schema, or compared with what is printed
                assert block.above == PRINTS or block.page.name == "ops.md", f"{block.where} is compared with nothing"
    excused = [b for b in BLOCKS if b.excuse is not None]
    assert len(excused) <= EXCUSED, [(b.where, b.excuse) for b in excused]
    assert testing.ERROR_RATIO == 2  # what the pages say of the error rule


# ------------------------------------------------------------------------------------------------------------ pages follow the sources
def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 80


def schemas() -> list[str]:
    """Every schema of csrc/registration/schemas.cpp, as torch.ops writes it: namespace::name(...)."""
    source = (ROOT / "csrc/registration/schemas.cpp").read_text()
    found = []
    for library in re.finditer(r"STABLE_TORCH_LIBRARY(?:_FRAGMENT)?\((\w+), m\) \{(.*?)^\}", source, re.MULTILINE | re.DOTALL):
        for literals in re.findall(r'm\.def\(\s*((?:"(?:[^"\\]|\\.)*"\s*)+)\)', library[2]):
            text = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', literals)).replace('\\"', '"')
            found.append(f"{library[1]}::{text}")
    return found


def test_ops_page_has_every_schema() -> None:
    page = (ROOT / "docs/ops.md").read_text()
    shown = {re.sub(r"\s+", " ", b.text).replace("( ", "(").strip() for b in blocks_of(ROOT / "docs/ops.md") if "::" in b.text}
    expected = schemas()
    assert len(expected) > 10
    for schema in expected:
        if "::_" in schema:  # internal: named only
            assert f"`{schema.split('(')[0]}`" in page, schema
        else:
            assert schema in shown, schema
    assert {s for s in shown if "->" in s} <= set(expected)


def test_traps_page_has_every_number_and_every_test() -> None:
    """A row for each of T1 to T100 and C1 to C50; the tests that are named after a number stand in its row, and no others."""
    page = (ROOT / "docs/traps.md").read_text()
    rows = {m[1]: m[0] for m in re.finditer(r"^\| ([TC]\d+) \|.*$", page, re.MULTILINE)}
    later = [int(number[1:]) for number in rows if number[0] == "T"][100:]
    assert list(rows) == [f"T{n}" for n in (*range(1, 101), *later)] + [f"C{n}" for n in range(1, 51)] and later == sorted(set(later))
    named: dict[str, set[str]] = {number: set() for number in rows}
    for path in (ROOT / "tests").rglob("test_*.py"):
        for test in re.findall(r"^def (test_[TC]\d+_\w+)", path.read_text(), re.MULTILINE):
            for number in re.findall(r"(?<=_)[TC]\d+(?=_)", test):
                named[number[0] + number[1:].lstrip("0")].add(test)
    for number, row in rows.items():
        assert set(re.findall(r"`(test_[TC]\d+_\w+)`", row)) == named[number], number


def test_tests_that_pages_name_exist() -> None:
    sources = {path: path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    for page in PAGES:
        for name in re.findall(r"`(?:\w+/)*(test_\w+(?:\.py)?)`", page.read_text()):
            found = any(path.name == name or f"def {name}(" in text for path, text in sources.items())
            assert found, f"{page.name} names {name}"


def public_functions() -> list[Any]:
    names = [getattr(moe_ext, name) for name in moe_ext.__all__]
    functions = [f for f in names if inspect.isfunction(f)]
    for module in (moe_ext.ops, moe_ext.reference, moe_ext.testing):
        functions += [f for name, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__ and name[0] != "_"]
    return functions


@pytest.mark.parametrize("function", [pytest.param(f, id=f"{f.__module__}.{f.__name__}") for f in public_functions()])
def test_docstrings_have_arguments_and_results(function: Any) -> None:
    text, signature = inspect.getdoc(function) or "", inspect.signature(function)
    for name in signature.parameters:
        assert re.search(rf"^    \**{name}: ", text, re.MULTILINE), f"no line for {name}"
    assert signature.return_annotation == "None" or "Returns:" in text or "Yields:" in text


# ------------------------------------------------------------------------------------------------------------------------------- links
def test_links_of_the_readme_lead_somewhere() -> None:
    for name in ("README.md", "CONTRIBUTING.md"):
        targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / name).read_text())
        assert targets
        for target in targets:
            assert target.startswith("https://") or (ROOT / target).exists(), f"{name} links to {target}"
