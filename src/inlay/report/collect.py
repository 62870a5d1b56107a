"""Collect a report's facts: of a model, by lowering it without compiling; of an artifact."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
import transformers
from torch.fx import GraphModule

import inlay
from inlay.backends.base import BACKEND_OPTIONS, ModelLimits
from inlay.backends.graph_json import graph_from_json, graph_to_json
from inlay.backends.program import AttentionStep, Program
from inlay.engine import Engine
from inlay.errors import InlayError
from inlay.lowering.capture import capture
from inlay.lowering.export import Captured, max_positions
from inlay.lowering.guards import check_capture, packed_check, reference_logits
from inlay.lowering.loading import load_source
from inlay.lowering.options import CompileOptions, check_against_model
from inlay.lowering.partition import partition
from inlay.passes.pass_manager import PASSES, PassError, PassReport, run_passes
from inlay.report.cost import step_cost, weight_bytes, workloads
from inlay.report.facts import AttentionFacts, Failure, PassFacts, Report, SegmentFacts
from inlay.report.fake_run import Graphs, weights_of
from inlay.report.layer import decoder_layer, layer_of_graph, layer_of_program, op_name

Progress = Callable[[str], None]


def of_model(name: str, options: CompileOptions, progress: Progress) -> Report:
    """Capture a model and run the passes, each checked; compiles nothing.

    A pass that fails, and a captured graph that is not the model, are facts like others: see
    Report.failure.

    Raises:
        ModelLoadError, UnsupportedModelError, OptionError: there is nothing to report on.
    """
    progress(f"load {name}")
    hf = load_source(name, options.dtype, None, options.trust_remote_code).model
    max_seq_len = check_against_model(options, max_positions(hf))
    progress("capture, and compare with Hugging Face")
    captured = capture(hf, options.max_num_tokens, max_seq_len)
    max_num_tokens = min(options.max_num_tokens, captured.max_num_tokens)
    limits = ModelLimits(
        vocab_size=hf.config.get_text_config().vocab_size,
        max_seq_len=max_seq_len,
        max_num_tokens=max_num_tokens,
        max_num_seqs=min(options.max_num_seqs, max_num_tokens),
        block_size=options.block_size,
    )
    report = Report(
        name=name,
        artifact=False,
        architecture=hf.config.model_type,
        dtype=str(hf.dtype).removeprefix("torch."),
        backend="",
        versions={"inlay": inlay.__version__, **_packages()},
        limits=asdict(limits),
        options={key: value for key, value in options.to_json().items() if key not in UNUSED},
        target={},
        errors={},
        phases={},
        passes=tuple(PassFacts.of(one) for one in captured.reports),
    )
    return _lower(report, captured, hf, progress)


UNUSED = ("backend", "optimization_level", "verify", "quantization", *BACKEND_OPTIONS)
"""Options that have no part in a lowering that neither compiles nor rounds and checks each pass."""


def _lower(report: Report, captured: Captured, hf: Any, progress: Progress) -> Report:
    """Check the capture, run the passes, cut the graph: as far as it goes."""
    gm, limits = captured.graph, report.limits
    module = decoder_layer(gm)
    report = replace(report, before=layer_of_graph(gm, module, "as captured"))
    passes: list[PassFacts] = []
    counts = [op_counts(gm)]

    def observe(done: PassReport) -> None:
        counts.append(op_counts(gm))
        passes.append(PassFacts.of(done, counts[-2], counts[-1]))
        progress(f"pass {done.name}: {done.matches} matches in {done.seconds:.3f} s")

    def so_far() -> Report:
        layer = layer_of_graph(gm, module, f"after {len(passes)} passes")
        return replace(report, passes=(*report.passes, *passes), errors=errors, after=layer)

    errors: dict[str, float] = {}
    stage = "capture"
    try:
        references = reference_logits(hf, captured, limits["max_seq_len"])
        check = packed_check(captured, references, limits["block_size"])
        errors["hugging_face"] = references.noise
        errors["capture"] = check_capture(captured, references, check)
        stage = "passes"
        run_passes(gm, PASSES, check, observe=observe)
        stage = "partition"
        program, segments = partition(gm, hf.dtype)
    except (InlayError, PassError) as error:
        left = tuple(one.name for one in PASSES[len(passes) :])
        stage = f"pass {left[0]}" if stage == "passes" else stage
        failure = Failure(stage, type(error).__name__, str(error))
        return replace(so_far(), failure=failure, skipped=left)
    graphs = {key: graph_from_json(graph_to_json(segment)) for key, segment in segments.items()}
    return _with_program(so_far(), program, graphs, _memory_of(captured))


def of_artifact(name: str, engine: Engine) -> Report:
    """What an artifact's manifest, program and graphs tell."""
    manifest, artifact = engine.manifest, engine.artifact
    program = artifact.program
    graphs = {
        key: graph_from_json(json.loads(artifact.segment_file(key, "graph.json").read_text()))
        for key in program.segment_keys
    }
    index = artifact.json("weights/index.json")
    report = Report(
        name=name,
        artifact=True,
        architecture=manifest["architecture"],
        dtype=manifest["dtype"],
        backend=manifest["backend"],
        versions={"inlay": manifest["inlay"], **manifest["packages"]},
        limits=manifest["limits"],
        options=manifest["options"],
        target=manifest["target"],
        errors=manifest["errors"],
        phases=manifest["phases"],
        passes=tuple(PassFacts.of(one) for one in manifest["passes"]),
        after=layer_of_program(program, graphs),
    )
    return _with_program(report, program, graphs, lambda weight: index[weight]["tensor"])


def _with_program(
    report: Report, program: Program, graphs: Graphs, memory_of: Callable[[str], str]
) -> Report:
    """The report with what its finished program tells."""
    loads = workloads(report.limits["max_seq_len"], program.is_encoder)
    sizes = {
        memory_of(name): weight_bytes(node)
        for step in program.segment_steps
        for name, node in zip(step.weights, weights_of(graphs[step.segment]), strict=True)
    }
    ops: Counter[str] = Counter()
    for step in program.segment_steps:
        ops.update(op_counts(graphs[step.segment]))
    ops["inlay.paged_attention"] += len(program.attention_steps)
    return replace(
        report,
        segments=_segments(program, graphs),
        attentions=_attentions(program),
        ops=dict(ops.most_common()),
        weight_bytes=sum(sizes.values()),
        costs=tuple(step_cost(program, graphs, load, memory_of) for load in loads),
    )


def _segments(program: Program, graphs: Graphs) -> tuple[SegmentFacts, ...]:
    """The distinct segments; a role by where a segment stands first."""
    order = [step.segment for step in program.segment_steps]
    facts = []
    for key in program.segment_keys:
        gm, place = graphs[key], order.index(key)
        role = "middle"
        if place == 0:
            role = "first"
        elif place >= len(order) - 2 and not program.is_encoder:
            role = ("tail", "LM head")[place - len(order) + 2]
        facts.append(
            SegmentFacts(
                role=role,
                key=key,
                num_calls=order.count(key),
                num_ops=sum(op_counts(gm).values()),
                weight_bytes=sum(weight_bytes(node) for node in weights_of(gm)),
            )
        )
    return tuple(facts)


def _attentions(program: Program) -> tuple[AttentionFacts, ...]:
    alike: dict[tuple[Any, ...], list[AttentionStep]] = {}
    for step in program.attention_steps:
        facts = {name: value for name, value in vars(step).items() if name not in PLACES}
        facts |= {"sinks": step.sinks is None, "slopes": step.slopes is None}
        alike.setdefault(tuple(facts.values()), []).append(step)
    return tuple(
        AttentionFacts(tuple(step.layer for step in steps), steps[0]) for steps in alike.values()
    )


PLACES = ("layer", "cache", "query", "key", "value", "output")
"""Fields of an attention call that say where it stands, not what it does."""


def op_counts(gm: GraphModule) -> dict[str, int]:
    """How often each op is called, most frequent first."""
    nodes = [node for node in gm.graph.nodes if node.op == "call_function"]
    return dict(Counter(op_name(node.target) for node in nodes).most_common())


def _memory_of(captured: Captured) -> Callable[[str], str]:
    """Weights that share memory (tied embeddings) get one name."""
    first: dict[Any, str] = {}

    def memory_of(name: str) -> str:
        tensor = captured.sources.get(name)
        if tensor is None:  # made by a recipe
            return name
        place = tensor.data_ptr(), tensor.shape, tensor.stride()
        return first.setdefault(place, name)

    return memory_of


def _packages() -> Mapping[str, str]:
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
