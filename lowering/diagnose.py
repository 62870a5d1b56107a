"""Why a model cannot be captured, in its own terms: the module, the op, the source line."""

from __future__ import annotations

import linecache
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from inlay.lowering.attention import num_tokens
from inlay.lowering.support import FIXED_SIZES, NEEDED
from inlay.passes.check import Check
from inlay.passes.graph import fake, last_source_line, module_of

NOTICEABLE = 1e-4
"""Change of another token's numbers, relative to the largest: libraries may take sums in another
order for other numbers."""

CHANGED = 3
"""The token at a third of the row is changed: the middle one stays in its place in a reversal."""


def explain_failure(error: BaseException, model: torch.nn.Module) -> str:
    """A failed export: the innermost module of the model's that was running, with its line."""
    frames = ((frame, line) for frame, line in traceback.walk_tb(error.__traceback__))
    where = [place for frame, line in frames if (place := _place(frame, line, model))]
    text = next((one.strip() for one in str(error).splitlines() if one.strip()), "no message")
    hints = [line.strip(" -") for line in str(error).splitlines() if line.lstrip()[:2] == "- "]
    what = " ".join([f"{type(error).__name__}: {text}", *hints[:1]])
    needed = FIXED_SIZES if "data-dependent" in what else NEEDED
    return f"it cannot be exported: {': '.join([*where[-1:], what])}; {needed}"


def explain_fixed_size(model: torch.nn.Module, export: Callable[[], Any]) -> str:
    """Where the number of tokens, which was traced as any number, became one number.

    export: traces the model once more.
    """
    watch = _SizeWatch(model)
    with watch, suppress(Exception):
        export()
    return watch.found or "some of its code counts them in Python"


class _SizeWatch(TorchFunctionMode):
    """Notes the first op of the model's code after which the row's size is a constant."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.found = ""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        size = None if self.found else num_tokens()
        if isinstance(size, torch.SymInt) and size.node.expr.is_Integer:
            frame: FrameType | None = sys._getframe(1)
            while frame is not None and not self.found:
                place = _place(frame, frame.f_lineno, self.model)
                name = str(getattr(func, "__name__", func))
                op = "" if name.startswith("__") else f"op {name} of "
                self.found = f"{op}{place}" if place else ""
                frame = frame.f_back
        return result


def _place(frame: FrameType, line: int, model: torch.nn.Module) -> str:
    """Module, file, line and code of a frame that runs a module of this model; else ""."""
    names = {id(module): name for name, module in model.named_modules()}
    owner, file = frame.f_locals.get("self"), frame.f_code.co_filename
    if id(owner) not in names or "/torch/" in file:
        return ""
    source = linecache.getline(file, line).strip()
    short = file.rpartition("site-packages/")[2]
    name = names[id(owner)] or "(root)"
    return f"module {name} ({type(owner).__name__}) at {short}:{line}, `{source}`"


def find_mixing(gm: GraphModule, check: Check) -> str:
    """The first op that moves numbers from one token to another, other than attention.

    Each op that has the tokens as one of its dimensions is run twice, the second time with one
    token's numbers changed in all its inputs: other tokens' results must not change. Returns ""
    where every op keeps tokens apart.
    """
    finder = _MixingFinder(gm)
    with torch.no_grad():
        finder.run(*check.inputs(gm))
    node = finder.found
    if node is None:
        return ""
    return (
        f"op {node.target} of module {module_of(node) or '(root)'} mixes tokens"
        f"{last_source_line(node)}; {NEEDED}"
    )


def find_failing(gm: GraphModule, check: Check) -> str:
    """The op that cannot be run with these inputs, with its module and source line."""
    runner = _Progress(gm)
    with torch.no_grad(), suppress(RuntimeError):
        runner.run(*check.inputs(gm))
    assert runner.node is not None, "it failed before any op"
    return (
        f"op {runner.node.target} of module {module_of(runner.node)}{last_source_line(runner.node)}"
    )


class _Progress(Interpreter):
    """Notes the node that it runs."""

    node: Node | None = None

    def run_node(self, n: Node) -> Any:
        self.node = n
        return super().run_node(n)


class _MixingFinder(Interpreter):
    """See find_mixing; stops looking after the first find."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        tokens = next(n for n in gm.graph.find_nodes(op="placeholder") if "input" in n.meta)
        self.size = str(fake(tokens).shape[1])
        self.found: Node | None = None

    def run_node(self, n: Node) -> Any:
        if self.found is not None or n.op != "call_function":
            return super().run_node(n)
        schema = getattr(n.target, "_schema", None)
        values = {node: self.env[node] for node in n.all_input_nodes}
        if schema is not None and schema.is_mutable:  # what it writes to is kept as it was
            values = {k: v.clone() if torch.is_tensor(v) else v for k, v in values.items()}
        result = super().run_node(n)
        if self._mixes(n, values, result):
            self.found = n
        return result

    def _mixes(self, n: Node, values: dict[Node, Any], result: Any) -> bool:
        if str(n.target).startswith(("inlay.attention", "inlay.paged_attention")):
            return False
        dims = {a: self._token_dim(a.meta.get("val")) for a in n.all_input_nodes}
        changed = {a: _perturbed(values[a], d) for a, d in dims.items() if d is not None}
        if not changed:
            return False
        args, kwargs = torch.fx.map_arg((n.args, dict(n.kwargs)), {**values, **changed}.__getitem__)
        try:
            other = self.call_function(n.target, args, kwargs)
        except (RuntimeError, IndexError):
            return False  # a perturbed index is out of its range: nothing can be said
        triples = zip(*map(tree_leaves, (n.meta["val"], result, other)), strict=True)
        return any(
            self._differs(*triple)
            for triple in triples
            if torch.is_tensor(triple[1]) and triple[1].numel()
        )

    def _differs(self, val: torch.Tensor, result: torch.Tensor, other: torch.Tensor) -> bool:
        """Whether any token's result but that of the changed one is another."""
        largest = torch.nan_to_num(_wide(result).abs(), posinf=0.0).max()
        difference = (_wide(other) - _wide(result)).abs() > NOTICEABLE * largest
        dim = self._token_dim(val)
        if dim is None:
            return bool(difference.any())
        rows = difference.movedim(dim, 0)
        changed = rows.shape[0] // CHANGED
        return bool(rows[:changed].any() or rows[changed + 1 :].any())

    def _token_dim(self, value: Any) -> int | None:
        """The dimension that counts tokens, where there is exactly one."""
        if not isinstance(value, torch.Tensor):
            return None
        dims = [d for d, size in enumerate(value.shape) if str(size) == self.size]
        return dims[0] if len(dims) == 1 else None


def _wide(value: torch.Tensor) -> torch.Tensor:
    return value if value.dtype.is_complex else value.double()


def _perturbed(value: torch.Tensor, dim: Any) -> torch.Tensor:
    """One token's numbers changed."""
    copy = value.clone()
    row = copy.select(dim, value.shape[dim] // CHANGED)
    if value.dtype == torch.bool:
        row.logical_not_()
    elif value.dtype.is_floating_point or value.dtype.is_complex:
        row.mul_(1.5).add_(1.0)
    else:
        row.add_(1).clamp_(max=int(value.max()))
    return copy
