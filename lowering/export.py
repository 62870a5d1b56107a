"""One row of tokens of any number through `torch.export`, and the graph that comes of it."""

from __future__ import annotations

import copy
import inspect
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from transformers import PreTrainedModel

from inlay.errors import UnsupportedModelError
from inlay.lowering.attention import recording
from inlay.lowering.diagnose import explain_failure, explain_fixed_size
from inlay.lowering.support import FIXED_SIZES, NEEDED, NotCapturableError, describe_mixers
from inlay.passes.graph import last_source_line, module_of
from inlay.passes.pass_manager import PassReport

NUM_EXAMPLE_TOKENS = 24
MANY_TOKENS = 2048
"""A row that short code paths (`if seq_len <= n`) do not reach."""


@dataclass
class Captured:
    """A graph and where its weights come from.

    graph: placeholders only, see passes/graph.py; input_ids and position_ids [1, T] int64 to
        logits [1, T, vocab]. sources: weight name -> the model's own tensor, not copied.
    reports: of the passes that made the graph hold for rows of many requests.
    max_num_tokens: T for which the graph holds.
    """

    graph: GraphModule
    sources: dict[str, torch.Tensor]
    reports: list[PassReport] = field(default_factory=list)
    max_num_tokens: int = 0


def output_of(result: Any) -> torch.Tensor:
    """Logits [.., vocab], or the last hidden states of a model that has none."""
    return result["logits"] if "logits" in result else result["last_hidden_state"]


def padding_token(model: PreTrainedModel) -> int | None:
    """The token id that takes no position of its own, in a model that counts positions by token:
    RoBERTa and its kin; the first token's position id is the one behind it."""
    for module in model.modules():
        if hasattr(module, "create_position_ids_from_input_ids"):
            index = getattr(module, "padding_idx", None)
            return None if index is None else int(index)
    return None


def first_position(model: PreTrainedModel) -> int:
    """The position id of a first token."""
    token = padding_token(model)
    return 0 if token is None else token + 1


def max_positions(model: PreTrainedModel) -> int | None:
    """Tokens of the longest request that a model allows for; None where its config does not say."""
    text = model.config.get_text_config()
    names = ("max_position_embeddings", "max_seq_len", "seq_length")
    limits = [limit for name in names if isinstance(limit := getattr(text, name, None), int)]
    return limits[0] - first_position(model) if limits else None


class _Flat(torch.nn.Module):
    """The model as export sees it: one row of tokens with their positions, no cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.offset = first_position(model)
        parameters = inspect.signature(model.forward).parameters
        free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.takes_positions = free or "position_ids" in parameters
        self.options = {"use_cache": False} if free or "use_cache" in parameters else {}

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        torch._check(position_ids.shape[1] == input_ids.shape[1])
        positions = {}
        if self.takes_positions:
            shifted = position_ids + self.offset if self.offset else position_ids
            positions = {"position_ids": shifted}
        with recording(position_ids):
            return output_of(self.model(input_ids=input_ids, **positions, **self.options))


def export_row(shell: PreTrainedModel, max_num_tokens: int) -> Captured:
    """Trace a model as one row of any number of tokens.

    Raises NotCapturableError: it cannot be traced so; says which module, op and line.
    """
    row = torch.arange(NUM_EXAMPLE_TOKENS)[None]
    tokens = torch.export.Dim.AUTO(min=2, max=max(max_num_tokens, MANY_TOKENS))
    shapes = {1: tokens}, {1: tokens}

    def trace() -> torch.export.ExportedProgram:
        with torch.no_grad(), _quiet():
            example = torch.zeros_like(row), row
            return torch.export.export(_Flat(shell), example, dynamic_shapes=shapes, strict=False)

    try:
        program = trace()
    except UnsupportedModelError as error:
        raise NotCapturableError(str(error)) from error
    except Exception as error:  # whatever a model's code may raise under tracing
        raise NotCapturableError(explain_failure(error, shell)) from error
    if _row_size(program) is None:
        raise NotCapturableError(
            f"its code was traced for {NUM_EXAMPLE_TOKENS} tokens and holds for no other number: "
            f"{explain_fixed_size(shell, trace)}; {NEEDED}"
        )
    _refuse_data_dependent_sizes(program)
    captured = _unlift(program, shell)
    captured.max_num_tokens = _longest_row(program, shell)
    return captured


def _row_size(program: torch.export.ExportedProgram) -> torch.SymInt | None:
    """The symbolic number of tokens; None where it is a constant."""
    specs = program.graph_signature.input_specs
    name = next(spec.arg.name for spec in specs if spec.kind is InputKind.USER_INPUT)
    node = next(n for n in program.graph.find_nodes(op="placeholder") if n.name == name)
    size = node.meta["val"].shape[1]
    return None if isinstance(size, int) or size.node.expr.is_Integer else size


@contextmanager
def _quiet() -> Iterator[None]:
    """torch logs what it then raises, with tracebacks of its own; the exception says enough."""
    noisy = logging.getLogger("torch")
    level = noisy.level
    noisy.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        noisy.setLevel(level)


def _refuse_data_dependent_sizes(program: torch.export.ExportedProgram) -> None:
    """Raises NotCapturableError where tensors have sizes that only numbers of a run decide."""
    for node in program.graph.nodes:
        if free_unbacked_symbols(node.meta.get("val")):
            raise NotCapturableError(
                f"op {node.target} of module {module_of(node).removeprefix('model.')} gives a size "
                f"that depends on the numbers of a run{last_source_line(node)}; {FIXED_SIZES}"
            )


def _longest_row(program: torch.export.ExportedProgram, shell: PreTrainedModel) -> int:
    """Tokens for which the graph holds; raises NotCapturableError for fewer than a request."""
    size = _row_size(program)
    assert size is not None, "checked before"
    upper = program.range_constraints[size.node.expr].upper
    longest = int(upper) if upper.is_Integer else sys.maxsize
    positions = max_positions(shell)
    if positions is not None and longest < min(positions, MANY_TOKENS):
        raise NotCapturableError(
            f"its code takes another path from {longest + 1} tokens on ({describe_mixers(shell)}), "
            f"and requests may have {positions}; {NEEDED}"
        )
    return longest


def _unlift(program: torch.export.ExportedProgram, shell: PreTrainedModel) -> Captured:
    """The exported graph with each placeholder marked as a weight or a step input."""
    # Copied: export may leave a dead branch (a pooler's) that its sources do not know as a user.
    graph = copy.deepcopy(program.graph)
    gm = GraphModule(torch.nn.Module(), graph)
    tensors = {
        **dict(shell.named_parameters(remove_duplicate=False)),
        **dict(shell.named_buffers(remove_duplicate=False)),
    }
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    sources: dict[str, torch.Tensor] = {}
    modules: dict[str, str] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            if spec.kind is InputKind.USER_INPUT:
                node.meta["input"] = node.name
                continue
            name = spec.target.removeprefix("model.")
            node.meta["weight"] = name
            constant = spec.kind is InputKind.CONSTANT_TENSOR
            sources[name] = program.constants[spec.target] if constant else tensors[name].data
        _shorten_module_stack(node, modules)
    gm.meta["recipes"] = {}
    gm.meta["modules"] = modules
    for unused in [n for n in gm.graph.find_nodes(op="placeholder") if not n.users]:
        if "weight" in unused.meta:
            del sources[unused.meta["weight"]]
            gm.graph.erase_node(unused)
    gm.recompile()
    return Captured(gm, sources)


def _shorten_module_stack(node: Node, modules: dict[str, str]) -> None:
    """Names as the model's own (without our wrapper), and a note of every module's class."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return
    short = {}
    for key, (path, kind) in stack.items():
        kind_name = (kind if isinstance(kind, str) else kind.__name__).rsplit(".", 1)[-1]
        name = path.removeprefix("model").removeprefix(".")
        if kind_name != "_Flat" and not kind_name.startswith("_empty_nn_module_stack"):
            short[key] = (name, kind_name)
            modules[name] = kind_name
    node.meta["nn_module_stack"] = short
