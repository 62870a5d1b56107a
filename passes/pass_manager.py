"""The passes in order, and the driver that runs, times, checks and reports them."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule

from inlay.errors import InlayError, OptionError, VerificationError
from inlay.passes import expect
from inlay.passes.canonicalise import canonicalise
from inlay.passes.check import Check
from inlay.passes.fold_constants import fold_constants
from inlay.passes.fuse_add_norm import fuse_add_norm
from inlay.passes.fuse_attention import fuse_attention
from inlay.passes.fuse_gated_activation import fuse_gated_activation
from inlay.passes.fuse_gemms import fuse_gemms
from inlay.passes.fuse_layer_norm import fuse_layer_norm
from inlay.passes.fuse_rms_norm import fuse_rms_norm
from inlay.passes.fuse_rope import fuse_rope
from inlay.passes.gather_last_logits import gather_last_logits
from inlay.passes.graph import calls, copy_graph, erase_unused_weights, is_within, module_of
from inlay.passes.insert_paged_kv import insert_paged_kv
from inlay.passes.quantize.plan import Plan
from inlay.passes.quantize.rewrite import expected, quantize
from inlay.passes.use_position_ids import use_position_ids

aten = torch.ops.aten
ops = torch.ops.inlay

logger = logging.getLogger("inlay.passes")

Places = list[str]
"""Names of the captured modules where a match is due, one entry for each match."""


@dataclass(frozen=True)
class Pass:
    """One rewrite.

    run: makes the rewrites and returns how many. expect: asked before it runs, where matches are
    due; None where the graph alone can tell. emits: the ops it puts in, by which the driver sees
    which places were served. rounds: it changes the numbers by intent; the error is reported only.
    """

    name: str
    run: Callable[[GraphModule], int]
    expect: Callable[[GraphModule], Places] | None = None
    emits: tuple[Any, ...] = ()
    rounds: bool = False


@dataclass(frozen=True)
class PassReport:
    """What one pass did.

    matches: rewrites made. expected: rewrites due, None where unknown. seconds: its time without
    the check. misses: "module: reason" where a match was due and not made. error: relative RMS
    error of the outputs against those before the pass, None where unchecked.
    """

    name: str
    matches: int
    expected: int | None
    seconds: float
    num_nodes_before: int
    num_nodes_after: int
    misses: tuple[str, ...] = ()
    error: float | None = None


class PassError(RuntimeError):
    """A pass failed for a reason of its own: a fault of this package."""


CAPTURE_PASSES: tuple[Pass, ...] = (
    Pass("canonicalise", canonicalise),
    Pass("fuse_attention", fuse_attention, expect.plain_attentions, (ops.attention.default,)),
    Pass("use_position_ids", use_position_ids),
)
"""What capture runs, for the graph to be what it promises: one row of tokens of many requests."""

PASSES: tuple[Pass, ...] = (
    Pass("canonicalise", canonicalise),
    Pass("fuse_rope", fuse_rope, expect.rotated, (ops.rope.default,)),
    Pass("fuse_layer_norm", fuse_layer_norm, expect.layer_norms, (ops.layer_norm.default,)),
    Pass("fuse_rms_norm", fuse_rms_norm, expect.rms_norms, (ops.rms_norm.default,)),
    Pass("fuse_add_norm", fuse_add_norm),
    Pass("fuse_gated_activation", fuse_gated_activation, expect.gates, (ops.gated.default,)),
    Pass("fold_constants", fold_constants),
    Pass("fuse_gemms", fuse_gemms, expect.fusible_gemms, (ops.linear.default,)),
    Pass("gather_last_logits", gather_last_logits, expect.lm_head, (aten.index_select.default,)),
    Pass("insert_paged_kv", insert_paged_kv, expect.attentions, (ops.paged_attention.default,)),
)
"""The order is the documentation: each pass finds what those before it have left. Quantization,
where it is asked for, comes before the KV cache."""

BEFORE_QUANTIZATION, AFTER_QUANTIZATION = PASSES[:-1], PASSES[-1:]


def quantization(plan: Plan) -> Pass:
    """The pass that rounds weights and activations by this plan."""
    emits = (
        ops.int8_linear.default,
        ops.fp8_linear.default,
        ops.weight_only_linear.default,
        ops.quantized_experts.default,
        ops.quantized_embedding.default,
    )
    run, places = partial(quantize, plan=plan), partial(expected, plan=plan)
    return Pass("quantize", run, places, emits, rounds=True)


def run_passes(
    gm: GraphModule,
    passes: Sequence[Pass] = PASSES,
    check: Check | None = None,
    skip: Collection[str] = (),
    observe: Callable[[PassReport], None] = lambda report: None,
) -> list[PassReport]:
    """Rewrite the graph in place, pass by pass.

    check: compare the outputs before and after each pass (see check.py). skip: names of passes
    to leave out. observe: told each pass's report as soon as it is done.

    Raises:
        OptionError: skip names a pass that does not exist.
        VerificationError: a pass changed the numbers beyond the tolerance; the message names the
            pass and the first node.
        PassError: a pass raised; the message names it.
    """
    names = [one.name for one in passes]
    for name in skip:
        if name not in names:
            raise OptionError(f"skip must name passes out of {', '.join(names)}, got {name!r}")
    numbers = torch.empty(0) if check is None else check.run(gm)
    reports = []
    for one in passes:
        if one.name in skip:
            logger.info("%s: skipped on request", one.name)
            continue
        before = gm if check is None else copy_graph(gm)
        report = _run_pass(gm, one)
        if check is not None:
            old, numbers = numbers, check.run(gm)
            report = replace(report, error=_verify(one, check, before, gm, old, numbers))
        _log(report)
        reports.append(report)
        observe(report)
    return reports


def _run_pass(gm: GraphModule, one: Pass) -> PassReport:
    """Run, clean up, and see what came of it."""
    gm.meta["refusals"] = []
    due = None if one.expect is None else one.expect(gm)
    old = set(gm.graph.nodes)
    start = time.perf_counter()
    try:
        matches = one.run(gm)
        gm.graph.eliminate_dead_code()
        erase_unused_weights(gm)
        gm.graph.lint()
        gm.recompile()
    except InlayError as error:
        raise type(error)(f"pass {one.name}: {error}") from error
    except Exception as error:
        raise PassError(f"pass {one.name} failed: {str(error).splitlines()[0]}") from error
    seconds = time.perf_counter() - start
    made = [module_of(node) for node in calls(gm, *one.emits) if node not in old]
    return PassReport(
        name=one.name,
        matches=matches,
        expected=None if due is None else len(due),
        seconds=seconds,
        num_nodes_before=len(old),
        num_nodes_after=len(gm.graph.nodes),
        misses=_misses(due or [], made, gm.meta.pop("refusals")),
    )


def _misses(due: Places, made: list[str], refusals: list[tuple[str, str]]) -> tuple[str, ...]:
    """The places that no new node serves, each with the reason that a pass gave there."""
    missing = Counter(due)
    for module in made:
        missing.subtract(place for place in missing if is_within(module, place))
    misses = []
    for place, number in missing.items():
        reasons = [reason for module, reason in refusals if is_within(module, place)]
        reason = "; ".join(dict.fromkeys(reasons)) or "the pattern does not occur"
        misses.extend([f"{place or '(root)'}: {reason}"] * number)
    return tuple(misses)


def _verify(
    one: Pass,
    check: Check,
    before: GraphModule,
    after: GraphModule,
    old: torch.Tensor,
    new: torch.Tensor,
) -> float:
    error = check.error(old, new)
    if not error <= (math.inf if one.rounds else check.tolerance):
        raise VerificationError(
            f"pass {one.name} changed the outputs: relative RMS error {error:.3g}, allowed "
            f"{check.tolerance:.3g}; {check.first_difference(before, after)}"
        )
    return error


def _log(report: PassReport) -> None:
    expected = "" if report.expected is None else f" of {report.expected}"
    error = "" if report.error is None else f", error {report.error:.2g}"
    logger.info(
        "%s: %d%s matches, %d -> %d nodes, %.3f s%s",
        report.name,
        report.matches,
        expected,
        report.num_nodes_before,
        report.num_nodes_after,
        report.seconds,
        error,
    )
    for miss in report.misses:
        logger.warning("%s: no match at %s", report.name, miss)
