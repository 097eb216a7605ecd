"""One set of experts on its way through `enable`: found, proven, switched over, and back. All kinds obey one protocol, `Block`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn

from . import prove as proofs
from .integrations.find.modules import DecoratedExperts, Found, LinearExperts, ListedExperts, RoutedExperts, Unsupported, find_experts
from .integrations.run import bitsandbytes, decorated, patch
from .integrations.run.listed import ListedReader
from .integrations.run.patch import MethodReplacement, Replacement
from .integrations.usable import NotNow, Refused
from .report import BlockReport


@dataclass
class Options:
    """Those of `enable`, and what was proven of other blocks by their class: it is tried first on the next of that class."""

    prove: bool = True
    quantized: str = "recompute"
    recompute: bool = False
    known: dict[type, Sequence[MethodReplacement]] = field(default_factory=dict)


class Block(ABC):
    """One set of experts and its row of the report, whose reason is None as long as it is or can be enabled."""

    def __init__(self, found: Found) -> None:
        self.found, self.module = found, found.module
        self.report = BlockReport(found.name, type(found.module).__name__, found.layout)

        #: Whether it is skipped for a reason that may pass.
        self.may_pass = False

    def refuse_for(self, refused: Refused) -> None:
        """`refuse` for what was raised."""
        self.refuse(str(refused))
        self.may_pass = isinstance(refused, NotNow)

    def refuse(self, reason: str | None) -> None:
        """Whatever else is known of it, it is left to its own code; None changes nothing."""
        if reason is not None:
            self.report.reason, self.report.path, self.report.enabled = reason, "original", False

    @abstractmethod
    def prove(self, options: Options) -> None:
        """Decides what will run, and proves it; writes path, figures and reason into the report and leaves the module as it is."""

    @abstractmethod
    def apply(self) -> None:
        """Switches the module to what was decided: ours, or its own code where there is a reason."""

    @abstractmethod
    def is_enabled(self) -> bool:
        """Whether ours runs now."""

    def note(self, model: nn.Module) -> str | None:
        """What a user of a 4-bit model should know about these weights."""
        return None if isinstance(self.found, ListedExperts) else bitsandbytes.stacked_note(model, self.module)


class DecoratedBlock(Block):
    """Experts behind transformers' decorator: switched by a plan on the module and the implementation in its config.

    A config may steer several modules. All of them are then switched, and those that are skipped run what they ran before.
    """

    def __init__(self, found: DecoratedExperts) -> None:
        super().__init__(found)
        self.formula = found.formula
        self.previous = decorated.previous_implementation(found.module)
        self.shares_config: list[DecoratedBlock] = [self]
        if isinstance(found.formula, Refused):
            self.refuse_for(found.formula)
        else:
            self.report.path = "composed" if found.adapted else found.formula.path
            self.report.enabled = self.is_enabled()

    def prove(self, options: Options) -> None:
        if isinstance(self.formula, Refused) or self.report.reason is not None:
            return
        self.formula = self.formula.with_recompute(options.recompute)
        if options.prove:
            proof = proofs.attempt(proofs.prove_decorated, self.module, self.formula)
            self.report.figures = proof.figures
            self.refuse(proof.reason)

    def apply(self) -> None:
        decorated.revert(self.module)
        if all(block.report.reason is not None for block in self.shares_config):
            return
        if isinstance(self.formula, Refused) or self.report.reason is not None:
            decorated.apply(self.module, decorated.Skipped(self.previous, self.report.reason or ""))
        else:
            decorated.apply(self.module, decorated.plan_for(self.module, self.formula, self.previous))

    def is_enabled(self) -> bool:
        return decorated.is_enabled(self.module)


class ReplacedBlock(Block):
    """Experts of all other kinds: methods of the module, or of its children, are replaced on the instance."""

    def __init__(self, found: Found) -> None:
        super().__init__(found)
        self.replacements: Sequence[Replacement] = []
        self.report.path = "composed" if isinstance(found, LinearExperts) or found.adapted else "fused"
        self.report.enabled = self.is_enabled()
        if isinstance(found, Unsupported):
            self.refuse_for(found.refused)

    def prove(self, options: Options) -> None:
        if self.report.reason is not None:
            return
        if isinstance(self.found, RoutedExperts):
            self.replacements, proof = proofs.search_and_prove(self.found, options.known.get(type(self.module), ()))
        else:
            self.replacements, proof = proofs.prove_linears(self.found)
        routed = [r for r in self.replacements if isinstance(r, MethodReplacement)]
        if routed:
            options.known[type(self.module)] = routed
        if self.replacements:
            composed = any(r.path == "composed" for r in self.replacements) or not all(_reads_plain_tensors(r, self.module) for r in routed)
            self.report.path = "composed" if composed else "fused"
        for replacement in routed:
            replacement.formula = replacement.formula.with_recompute(options.recompute)
            if options.quantized == "cache" and isinstance(replacement.reader, ListedReader):
                replacement.reader.cache = bitsandbytes.DenseCache()
        self.report.figures = proof.figures
        self.refuse(proof.reason)

    def apply(self) -> None:
        wanted = [] if self.report.reason is not None else self.replacements
        keys = {(r.child, r.attribute) for r in wanted}
        for name, child in [("", self.module), *self.module.named_children()]:
            if not {(name, attribute) for attribute in patch.patches_of(child)} <= keys:
                patch.revert(child)
        for replacement in wanted:
            patch.apply(self.module, replacement)

    def is_enabled(self) -> bool:
        return any(map(patch.is_enabled, (self.module, *self.module.children())))


def _reads_plain_tensors(replacement: MethodReplacement, module: nn.Module) -> bool:
    try:
        return replacement.reader.read(module).fusable
    except Refused:
        return False


def find_blocks(model: nn.Module) -> list[Block]:
    """Every set of experts in `model`, in the order of `named_modules`."""
    blocks = [DecoratedBlock(found) if isinstance(found, DecoratedExperts) else ReplacedBlock(found) for found in find_experts(model)]
    _connect_shared_configs([block for block in blocks if isinstance(block, DecoratedBlock)])
    return list(blocks)


def _connect_shared_configs(blocks: Iterable[DecoratedBlock]) -> None:
    by_config: dict[int, list[DecoratedBlock]] = {}
    for block in blocks:
        by_config.setdefault(id(block.module.config), []).append(block)
    for together in by_config.values():
        # One with a registry of its own does not know our name: then none of them can be switched.
        foreign = next((block for block in together if not decorated.can_share_config(block.module)), None)
        for block in together:
            block.shares_config = together
            if foreign is not None and block.report.reason is None:
                block.refuse(f"its config also steers {foreign.report.module}, which cannot be switched to moe_ext")
