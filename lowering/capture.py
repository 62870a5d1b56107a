"""Hugging Face model -> one exported graph over a ragged row of tokens.

transformers calls attention and experts through registries; the model is built with our own
functions there, which emit one opaque `inlay.attention` or `inlay.experts` for each call. Models
that compute attention by themselves are exported as they are, and `fuse_attention` finds it in the
graph. The graph takes `input_ids` and `position_ids` [1, T] for all requests of a step flattened
into one row, and gives logits [1, T, vocab], or an encoder's hidden states [1, T, hidden].
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Collection
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from inlay.errors import UnsupportedModelError
from inlay.lowering.attention import ATTENTION, register_attention
from inlay.lowering.diagnose import find_mixing
from inlay.lowering.experts import EXPERTS, read_experts, register_experts
from inlay.lowering.export import Captured, export_row, max_positions
from inlay.lowering.options import DEFAULT_MAX_SEQ_LEN
from inlay.lowering.rope import fix_rope
from inlay.lowering.support import (
    NotCapturableError,
    check_calls,
    check_structure,
    check_supported,
)
from inlay.lowering.windows import PROBE, check_windows, masks_of, narrowed, register_probe
from inlay.passes.check import Check
from inlay.passes.pass_manager import CAPTURE_PASSES, run_passes

logger = logging.getLogger(__name__)

REFERENCE = None
"""The attention that transformers itself chooses for a class, which is what its users get: of
most classes every implementation gives the same, of some only this one what the model means."""
EAGER_EXPERTS = "eager"


def build_shell(
    model: PreTrainedModel,
    attention: str | None,
    dtype: torch.dtype | None = None,
    max_seq_len: int | None = None,
    experts: str = EAGER_EXPERTS,
) -> PreTrainedModel:
    """A second model over the same tensors, with other attention and experts implementations.

    The user's model and config are never changed. max_seq_len: for this length RoPE is fixed, see
    rope.py; None for the config's own.

    Raises UnsupportedModelError where the model is not what its config describes.
    """
    shell = share_tensors(model, attention, dtype, experts)
    fix_rope(shell, max_seq_len or max_positions(shell) or DEFAULT_MAX_SEQ_LEN)
    return shell.eval()


def share_tensors(
    model: PreTrainedModel,
    attention: str | None,
    dtype: torch.dtype | None = None,
    experts: str = EAGER_EXPERTS,
    other: PreTrainedConfig | None = None,
) -> PreTrainedModel:
    """The second model as transformers builds it: on the meta device from a deep copy of the
    config, then given the model's own tensors. other: a config to be taken instead.

    Raises UnsupportedModelError where the model is not what its config describes.
    """
    config = copy.deepcopy(other or model.config)
    config.return_dict = config.get_text_config().return_dict = True
    options = {} if getattr(model, "pooler", None) else without_pooler(type(model))
    with torch.device("meta"):
        shell = type(model)._from_config(
            config,
            attn_implementation=attention,
            experts_implementation=experts,
            dtype=dtype or model.dtype,
            **options,
        )
    if other is None:
        check_structure(model, shell)
    for name, module in shell.named_modules():
        original = model.get_submodule(name)
        for key in module._parameters:
            module._parameters[key] = original._parameters[key]
        for key in module._buffers:
            module._buffers[key] = original._buffers[key]
        for key, value in vars(original).items():
            if isinstance(value, torch.Tensor):
                setattr(module, key, value)
    return shell


def without_pooler(kind: Any) -> dict[str, bool]:
    """Arguments that leave an encoder's pooler away: hidden states do not need it, and checkpoints
    of masked language models have none."""
    name = "add_pooling_layer"
    return {name: False} if name in inspect.signature(kind.__init__).parameters else {}


def capture(
    model: PreTrainedModel, max_num_tokens: int, max_seq_len: int | None = None
) -> Captured:
    """Export the model as one ragged batch, with its attention and expert calls counted.

    Raises:
        UnsupportedModelError: the model is refused (see support.py), cannot be exported, or some
            of its layers mix tokens in a way that the graph does not show. The message names the
            module and its source line.
    """
    check_supported(model)
    register_attention()
    register_experts()
    register_probe()
    try:
        return _capture(model, ATTENTION, max_num_tokens, max_seq_len)
    except NotCapturableError as error:
        by_registry = str(error)
    except (KeyError, ValueError) as error:
        by_registry = f"its attention is not open to transformers' registry ({error})"
    logger.info("attention is looked for in the plain graph: %s", by_registry)
    try:
        return _capture(model, REFERENCE, max_num_tokens, max_seq_len)
    except NotCapturableError as error:
        reasons = f"{by_registry}; without the registry: {error}"
        if str(error) == by_registry:
            reasons = by_registry
        raise UnsupportedModelError(
            f"architecture {model.config.model_type!r} cannot be captured: {reasons}"
        ) from error


def _capture(
    model: PreTrainedModel, attention: str | None, max_num_tokens: int, max_seq_len: int | None
) -> Captured:
    shell = build_shell(model, attention, None, max_seq_len, EXPERTS)
    experts = read_experts(shell)
    captured = export_row(shell, max_num_tokens)
    # Under our name there are no masks: attention that goes around the registry has lost its own.
    skip = ("canonicalise", "fuse_attention") if attention == ATTENTION else ()
    longest = max_seq_len or max_positions(model) or DEFAULT_MAX_SEQ_LEN
    make_ragged(captured, longest, skip)
    try:
        check_calls(model, captured.graph, experts)
    except NotCapturableError as error:
        try:
            mixing = find_mixing(captured.graph, _few_tokens(captured, model))
        except RuntimeError:  # the refused graph holds for the traced number of tokens only
            mixing = ""
        raise NotCapturableError("; ".join(filter(None, (str(error), mixing)))) from error
    if attention == ATTENTION:
        config, sizes = narrowed(model.config, longest)
        probed = share_tensors(model, PROBE, other=config).eval()
        check_windows(captured.graph, masks_of(probed, longest), sizes)
    return captured


def _few_tokens(captured: Captured, model: PreTrainedModel) -> Check:
    """Numbers for the graph's placeholders: one request of a few tokens."""
    tokens = torch.randint(0, model.config.get_text_config().vocab_size, (1, 12))
    inputs = {"input_ids": tokens, "position_ids": torch.arange(12)[None]}
    return Check(lambda name: inputs[name] if name in inputs else captured.sources[name], 0.0)


def make_ragged(captured: Captured, max_seq_len: int, skip: Collection[str] = ()) -> None:
    """Replace what holds for a row of one request only: attention and positions of its own.

    max_seq_len: tokens of a request at most; tables of positions may hold no more. skip: names of
    passes to leave out.
    """
    meta = captured.graph.meta
    meta["constants"], meta["max_seq_len"] = captured.sources.__getitem__, max_seq_len
    meta["max_num_tokens"] = min(captured.max_num_tokens, max_seq_len)
    try:
        reports = run_passes(captured.graph, CAPTURE_PASSES, skip=skip)
        captured.reports = [report for report in reports if report.matches or report.expected]
    finally:
        del meta["constants"], meta["max_seq_len"], meta["max_num_tokens"]
    if misses := [miss for report in captured.reports for miss in report.misses]:
        raise NotCapturableError("attention is not understood: " + "; ".join(misses[:3]))
