"""The guards: a captured graph and a finished engine are compared with Hugging Face.

Two requests of different lengths are packed into one batch and must give what Hugging Face's own
eager attention gives for each of them alone: masks that were lost, tokens of one request that
reach another, positions or windows that are off all show here.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from inlay.backends.base import LoadedModel
from inlay.backends.step import StepRequest, build_step
from inlay.errors import UnsupportedModelError, VerificationError
from inlay.lowering.capture import REFERENCE, build_shell
from inlay.lowering.diagnose import find_failing, find_mixing
from inlay.lowering.export import Captured, output_of
from inlay.lowering.support import NEEDED
from inlay.passes.check import Check, relative_rms
from inlay.passes.graph import bind, calls, fake

FLOAT32_TOLERANCE = 5e-5
"""Relative RMS error of float32 logits: sums are taken in another order, nothing else differs, and
right models stay below 5e-6. GELU by erf in place of tanh, the smallest known mistake, costs 8e-5
in one layer."""

NOISE_FACTOR = 2.0
"""In bfloat16 and float16 an error may be this many times what rounding costs Hugging Face itself,
measured on the same requests: two implementations round at different places, and 1.25 is usual.
Known mistakes (no RoPE, scale x 1.1, a lost mask) cost far more than rounding does."""

ROUNDING_SHARE = 0.5
"""Of the error that quantization makes, how much an engine may differ from the quantized graph run
as it is. Where the two sum in another order a number falls on the other side of a tie, and what
follows is rounded elsewhere; a wrong scale, zero point or layout costs more than rounding does."""

WORSE_THAN_ROUNDING = 1.25
"""Or how many times as far from Hugging Face as the quantized graph it may be. In bfloat16 inputs
are rounded to it before they are to int8, by some code and not by other, so that in a deep model
many fall to the other side: seen was an engine that was as far from the graph as that was from
Hugging Face. Two such errors differ by a few percent; a fault adds its own."""

MAX_WINDOW_TO_COVER = 256
"""Requests are made longer than the attention window up to this many tokens; beyond it a guard
run would cost more than the rest of the build."""


ROUTED_TOKENS, ROUTED_SHARE = 100, 0.75
"""Tokens of a request, and the share of rows that are judged, where there are experts in a narrow
dtype. A rounding may choose another expert for a token, in Hugging Face as here: a large error, but
in few rows. A mistake is in most of them. In float32 all rows are judged."""

LARGE_WEIGHT = 32 << 20
"""Elements of a weight that are widened to float32 at once."""


@dataclass(frozen=True)
class Reference:
    """One request and Hugging Face's float32 logits for it: token_ids [n], logits [n, vocab].

    Of an encoder: its hidden states [n, hidden] instead.
    """

    token_ids: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True)
class References:
    """The requests, and how far another implementation may be from their logits.

    noise: relative RMS error of Hugging Face in the engine's dtype; 0 in float32. share: of the
    rows that errors are taken over, those with the least. rounding: of a quantized graph, whose
    logits these are then, its error against Hugging Face, whose own logits are kept as exact.
    """

    requests: tuple[Reference, ...]
    noise: float
    share: float = 1.0
    rounding: float = 0.0
    exact: tuple[torch.Tensor, ...] = ()

    @property
    def tolerance(self) -> float:
        """Allowed relative RMS error against these logits."""
        return max(FLOAT32_TOLERANCE, NOISE_FACTOR * self.noise) + ROUNDING_SHARE * self.rounding

    def is_as_near(self, exact: torch.Tensor, got: torch.Tensor) -> bool:
        """Whether a quantized engine is hardly farther from Hugging Face than its graph is."""
        allowed = NOISE_FACTOR * self.noise + WORSE_THAN_ROUNDING * self.rounding
        return self.noise > 0 and self.error(exact, got) <= allowed

    def error(self, expected: torch.Tensor, got: torch.Tensor) -> float:
        """Relative RMS error of rows of logits."""
        return relative_rms(expected, got, self.share)


@torch.inference_mode()
def reference_logits(
    model: PreTrainedModel, captured: Captured, max_seq_len: int, seed: int = 0
) -> References:
    """Two random requests, each run alone through Hugging Face's eager attention.

    Raises VerificationError where the model's own logits are not finite.
    """
    windows = [reach for reach in _reaches(model, captured) if 0 < reach <= MAX_WINDOW_TO_COVER]
    lengths, share = [max(windows, default=12) + 11, 12], 1.0
    if model.dtype != torch.float32 and calls(captured.graph, torch.ops.inlay.experts.default):
        lengths, share = [max(length, ROUTED_TOKENS) for length in lengths], ROUTED_SHARE
    generator = torch.Generator().manual_seed(seed)
    native = build_shell(model, REFERENCE, max_seq_len=max_seq_len)
    exact = in_float32(build_shell(model, REFERENCE, max_seq_len=max_seq_len))
    vocab_size, reserved = model.config.get_text_config().vocab_size, _padding_token(model)
    requests, rounded = [], []
    for length in lengths:
        shape = (1, min(length, max_seq_len))
        token_ids = torch.randint(0, vocab_size, shape, generator=generator)
        token_ids[token_ids == reserved] = (reserved + 1) % vocab_size
        requests.append(Reference(token_ids[0], _run_reference(exact, token_ids)))
        rounded.append(run_alone(native, token_ids))
    noise = relative_rms(torch.cat([r.logits for r in requests]), torch.cat(rounded), share)
    if not math.isfinite(noise):
        raise VerificationError(
            f"Hugging Face's own logits in {model.dtype} are not finite: the checkpoint's weights "
            "hold NaN or infinity, or their products overflow this dtype; allowed are float32, "
            "bfloat16 and float16"
        )
    return References(tuple(requests), noise, share)


def _reaches(model: PreTrainedModel, captured: Captured) -> list[int]:
    """How far attention sees: by the graph, and by the config, of which the graph may have lost
    one. A number that is something else in the config costs a longer request, and nothing more."""
    attentions = calls(captured.graph, torch.ops.inlay.attention.default)
    seen = [bind(node)[name] for node in attentions for name in ("window", "chunk")]
    facts = vars(model.config.get_text_config()).items()
    said = [n for name, n in facts if type(n) is int and re.search("window|chunk|local_att", name)]
    return [*seen, *said]


def in_float32(shell: PreTrainedModel) -> PreTrainedModel:
    """Make a shell compute in float32, whatever its weights are stored in.

    Each module's parameters are cast when it is called and put back after it, so that the extra
    memory is one module's and not a second model's. Embeddings are looked up as they are, and
    large linear layers (LM heads) are cast by parts: they can be as large as all the rest.
    """
    narrow: dict[torch.nn.Module, dict[str, torch.nn.Parameter]] = {}

    def widen(module: torch.nn.Module, args: Any) -> None:
        narrow[module] = dict(module._parameters)
        for name, parameter in narrow[module].items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.float(), False)

    def restore(module: torch.nn.Module, args: Any, output: Any) -> None:
        module._parameters.update(narrow.pop(module))

    for module in shell.modules():
        if all(p is None or p.dtype == torch.float32 for p in module._parameters.values()):
            continue
        if type(module) is torch.nn.Embedding:
            module.register_forward_hook(lambda module, args, output: output.float())
        elif type(module) is torch.nn.Linear and module.weight.numel() > LARGE_WEIGHT:
            module.forward = partial(_linear_in_parts, module)
        else:
            module.register_forward_pre_hook(widen)
            module.register_forward_hook(restore)
    return shell


def _linear_in_parts(module: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    rows = max(LARGE_WEIGHT // module.in_features, 1)
    parts = [F.linear(x.float(), part.float()) for part in module.weight.split(rows)]
    out = torch.cat(parts, dim=-1)
    return out if module.bias is None else out + module.bias.float()


def _run_reference(model: PreTrainedModel, token_ids: torch.Tensor) -> torch.Tensor:
    """As run_alone; raises UnsupportedModelError where the model's own code fails."""
    try:
        return run_alone(model, token_ids)
    except Exception as error:  # whatever a model's code may raise
        raise UnsupportedModelError(
            f"transformers' own {type(model).__name__} fails on {token_ids.shape[1]} tokens, so "
            f"there is nothing to compare with: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}"
        ) from error


def run_alone(model: PreTrainedModel, token_ids: torch.Tensor) -> torch.Tensor:
    """What a model gives for one request [1, n]: logits [n, vocab] or hidden states [n, hidden]."""
    options = {"use_cache": False} if _takes(model, "use_cache") else {}
    return output_of(model(input_ids=token_ids, **options))[0]


def _takes(model: PreTrainedModel, name: str) -> bool:
    parameters = inspect.signature(model.forward).parameters.values()
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)


def _padding_token(model: PreTrainedModel) -> int:
    """A token that some models (RoBERTa) take for no token at all; -1 where there is none."""
    token = getattr(model.config.get_text_config(), "pad_token_id", None)
    return -1 if token is None else int(token)


def packed_check(captured: Captured, references: References, block_size: int) -> Check:
    """Numbers for every placeholder that the graph has or gets: all requests prefilled at once."""
    whole = references.requests
    num_blocks = max(-(-len(r.token_ids) // block_size) for r in whole)
    attentions = calls(captured.graph, torch.ops.inlay.attention.default)
    caches = {}  # taken now: passes erase the nodes that tell
    for node in attentions:
        for kind, value in (("k_cache", node.args[1]), ("v_cache", node.args[2])):
            _, num_heads, size = fake(value).shape
            shape = (num_blocks * len(whole), num_heads, block_size, size)
            caches[f"{kind}.{node.args[4]}"] = (shape, fake(value).dtype)
    # Each group has blocks of its own, and each layer may be one.
    tables = [range(i * num_blocks, (i + 1) * num_blocks) for i in range(len(whole))]
    requests = [
        StepRequest(r.token_ids.tolist(), 0, _by_group(tables, i, len(attentions)))
        for i, r in enumerate(whole)
    ]
    step = build_step(requests, block_size)

    def tensors(name: str) -> torch.Tensor:
        kind, _, group = name.partition(".")
        if name in caches:
            shape, dtype = caches[name]
            return torch.zeros(shape, dtype=dtype)
        if kind in ("input_ids", "position_ids"):
            return getattr(step, name)[None]
        if kind == "slot_mapping":
            return step.slot_mapping[int(group)]
        if kind == "block_table":
            return step.block_tables[int(group)]
        if hasattr(step, name):
            return getattr(step, name)
        return captured.sources[name]

    return Check(tensors, references.tolerance, references.share)


def every_row(check: Check, references: References) -> Check:
    """The same for all tokens' logits, where a graph gives those it is asked for only."""
    num_tokens = sum(len(request.token_ids) for request in references.requests)
    rows, tensors = torch.arange(num_tokens), check.tensors
    return replace(check, tensors=lambda name: rows if name == "logits_indices" else tensors(name))


def _by_group(tables: Sequence[Sequence[int]], index: int, groups: int) -> list[Sequence[int]]:
    """A request's block table in each KV group: another request's in the group before, so that
    one group's slots do not go with another's tables."""
    return [tables[(index + group) % len(tables)] for group in range(groups)]


@torch.inference_mode()
def check_capture(captured: Captured, references: References, check: Check) -> float:
    """The captured graph on the packed requests against Hugging Face's logits.

    Raises VerificationError beyond the tolerance; returns the relative RMS error.
    """
    try:
        logits = check.run(captured.graph)[0]
    except RuntimeError as failure:
        raise VerificationError(
            "the captured graph cannot be run on two packed requests, so some of its code holds "
            f"for the traced number of tokens only: {find_failing(captured.graph, check)}: "
            f"{str(failure).splitlines()[0]}; {NEEDED}"
        ) from failure
    error = references.error(torch.cat([r.logits for r in references.requests]), logits)
    mixing = "" if error <= references.tolerance else find_mixing(captured.graph, check)
    _judge(error, references, "the captured graph", mixing)
    return error


def check_engine(model: LoadedModel, references: References, what: str) -> float:
    """A loaded model through its paged cache: chunked prefill, a mixed step and decode steps.

    The first request is prefilled in two chunks, the second joins at the second chunk; then both
    decode. Every logits row that the engine gives is compared.
    """
    block_size, whole = model.limits.block_size, references.requests
    longest = max(len(r.token_ids) for r in whole)
    num_blocks = -(-longest // block_size) + 1
    model.allocate_kv_cache(num_blocks * len(whole))
    # Blocks interleaved between the requests: a wrong table reads the other's.
    tables = [range(i, num_blocks * len(whole), len(whole)) for i in range(len(whole))]
    every_row = model.is_encoder or references.share < 1.0
    got, expected = [], []
    exact: list[torch.Tensor] = []
    lengths = [len(r.token_ids) for r in whole]
    steps = _schedule(lengths, model.limits.max_num_tokens)
    if model.is_encoder:
        steps = [{index: (0, length) for index, length in enumerate(lengths)}]
    for cuts in steps:
        requests, rows = [], []
        for index, (begin, end) in cuts.items():
            ids = whole[index].token_ids[begin:end].tolist()
            groups = _by_group(tables, index, len(model.kv_groups))
            requests.append(StepRequest(ids, begin, groups))
            wanted = slice(begin if every_row else end - 1, end)
            rows.append(whole[index].logits[wanted])
            exact.extend(one[wanted] for one in references.exact[index : index + 1])
        step = build_step(requests, block_size)
        num_rows = step.num_tokens if every_row else step.num_logits
        if every_row:
            step = replace(step, logits_indices=torch.arange(len(step.input_ids)))
        got.append(model.forward(step)[:num_rows].float().cpu())
        expected.append(torch.cat(rows))
    error = references.error(torch.cat(expected), torch.cat(got))
    if not exact or not references.is_as_near(torch.cat(exact), torch.cat(got)):
        _judge(error, references, what)
    return error


def _schedule(lengths: Sequence[int], budget: int) -> list[dict[int, tuple[int, int]]]:
    """Steps as {request: (first, end)}: a chunk, a mixed step, then single tokens."""
    decode = 3
    done = [0] * len(lengths)
    steps: list[dict[int, tuple[int, int]]] = []
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        cuts, left = {}, max(budget, 2)
        for index, length in enumerate(lengths):
            prompt = max(length - decode, 1)
            if index > len(steps) or done[index] == length or left == 0:
                continue
            todo = prompt - done[index] if done[index] < prompt else 1
            if done[index] == 0 and index == 0:
                todo = max(todo // 2, 1)
            end = done[index] + min(todo, left)
            cuts[index], left = (done[index], end), left - (end - done[index])
            done[index] = end
        steps.append(cuts)
    return steps


def _judge(error: float, references: References, what: str, cause: str = "") -> None:
    if not error <= references.tolerance:  # NaN must not pass
        told = "the quantized graph computes" if references.rounding else "Hugging Face computes"
        raise VerificationError(
            f"{what} does not compute what {told}: on two packed requests the "
            f"logits are off by {error:.1e} of their RMS; allowed is {references.tolerance:.1e}, "
            f"Hugging Face in the same dtype is off by {references.noise:.1e}. Nothing was built; "
            + (cause or "`inlay verify` names the pass or segment, module and source line at fault")
        )
