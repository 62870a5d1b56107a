"""The mutants: one part of the package broken at a time, and what must notice it.

Each table has its own watcher, see test_mutants.py. A toy is the smallest on which the part does
something.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule

from inlay.backends.eager.backend import ReferenceAttention
from inlay.backends.kernels.cpu_attention import CpuAttention
from inlay.backends.model import ProgramModel
from inlay.lowering import attention, export, guards, partition, pipeline, rope
from inlay.passes import (
    attention_mask,
    attention_op,
    canonicalise,
    experts_op,
    fuse_attention,
    use_position_ids,
)
from inlay.passes.graph import calls, insert_call
from inlay.passes.graph import replace as use_instead
from inlay.passes.weights import TRANSFORMS
from inlay.runtime import batch, block_pool, dispatch, executor, kv_cache
from tests.breaking import (
    Break,
    Toy,
    after_pass,
    attention_call,
    emit,
    experts_call,
    instead,
    read_calls,
    swap,
    through,
    with_arguments,
    with_result,
)

aten = torch.ops.aten
inlay = torch.ops.inlay

MISTRAL = Toy(
    "mistral",
    overrides=(("tie_word_embeddings", True),),
    scaled=(("embed_tokens.weight", 0.01),),
)
"""Tied embeddings, and hidden states so small that a norm's epsilon counts."""
TWO_LAYERS = Toy("mistral", layers=2)
LONG_WINDOW = Toy("mistral", overrides=(("sliding_window", 64),))
SOFTCAPS = (("final_logit_softcapping", 1.0), ("max_position_embeddings", 64))
GEMMA2 = Toy("gemma2", overrides=SOFTCAPS)
GEMMA2_PLAIN = Toy("gemma2", plain=True, overrides=SOFTCAPS)
GPT_OSS = Toy("gpt_oss", scaled=(("gate_up_proj", 4.0),))
"""Experts whose gates reach their limit of 7."""
LLAMA4 = Toy("llama4_text")
GRANITE = Toy("granite", overrides=(("embedding_multiplier", 3.0), ("attention_multiplier", 0.1)))
GPT2 = Toy("gpt2", overrides=(("n_positions", 64),))
ALIBI = Toy("mpt", overrides=(("n_layers", 1), ("max_seq_len", 64)))
GPT_NEO = Toy("gpt_neo", layers=None, overrides=(("max_position_embeddings", 64),))
NEMOTRON = Toy("nemotron")
DIFFLLAMA = Toy("diffllama")
BART = Toy("bart", layers=None, overrides=(("decoder_layers", 1),))
BERT = Toy("bert")


def other(value: torch.Tensor) -> torch.Tensor:
    """The same numbers for another request, head or row."""
    return value.flip(0)


def no(value: Any) -> None:
    return None


def more(value: int) -> int:
    return value + 1 if value else value


# --- the attention op's reference, packed and paged: seen in the captured graph ---------------


def _heads_of_another_group(k: torch.Tensor) -> torch.Tensor:
    return k.flip(1)


ATTENTION: dict[str, tuple[Toy, Break]] = {
    "scale x 1.01": (MISTRAL, with_arguments(attention_op, "_attend", scale=lambda s: 1.01 * s)),
    "window one too wide": (MISTRAL, with_arguments(attention_op, "_attend", window=more)),
    "window one too narrow": (
        MISTRAL,
        with_arguments(attention_op, "_attend", window=lambda w: w - 1),
    ),
    "the next token is seen": (
        MISTRAL,
        with_arguments(attention_op, "_attend", query_positions=lambda p: p + 1),
    ),
    "mask off": (MISTRAL, with_arguments(attention_op, "_attend", causal=lambda _: False)),
    "no soft-cap": (GEMMA2, with_arguments(attention_op, "_attend", softcap=lambda _: 0.0)),
    "no sinks": (GPT_OSS, with_arguments(attention_op, "_attend", sinks=no)),
    "sinks of other heads": (GPT_OSS, with_arguments(attention_op, "_attend", sinks=other)),
    "chunk one too large": (LLAMA4, with_arguments(attention_op, "_attend", chunk=more)),
    "slopes negated": (ALIBI, with_arguments(attention_op, "_attend", slopes=torch.neg)),
    "slopes dropped": (ALIBI, with_arguments(attention_op, "_attend", slopes=no)),
    "slopes of other heads": (ALIBI, with_arguments(attention_op, "_attend", slopes=other)),
    "keys of another group of heads": (
        MISTRAL,
        with_arguments(attention_op, "_attend", k=_heads_of_another_group),
    ),
    "encoder made causal": (BERT, with_arguments(attention_op, "_attend", causal=lambda _: True)),
}

# --- capture: what transformers calls, RoPE, weights ------------------------------------------


def _constant_layer(patch: Any) -> None:
    """All layers claim to be the first one."""
    right = attention._attention_forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        attention._context.num_calls = 0
        return right(*args, **kwargs)

    patch.monkeypatch.setitem(
        attention.AttentionInterface._global_mapping,
        attention.ATTENTION,
        patch.broken(forward, lambda run, *a, **k: run(*a, **k)),
    )


def _weights_exchanged(captured: Any) -> Any:
    """Two weights of one shape under each other's names."""
    one, two = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "kv")
    sources = captured.sources
    sources[one], sources[two] = sources[two], sources[one]
    return captured


def _tied_weight_lost(captured: Any) -> Any:
    captured.sources["lm_head.weight"] = captured.sources["lm_head.weight"].roll(1, 0)
    return captured


def _experts_off_by_one(index: torch.Tensor) -> torch.Tensor:
    return (index + 1) % 4


EXPORT: dict[str, tuple[Toy, Break]] = {
    "the model's scale is ignored": (GRANITE, attention_call(scaling=no)),
    "the soft-cap is forgotten": (GEMMA2, attention_call(softcap=no)),
    "the sinks are forgotten": (GPT_OSS, attention_call(s_aux=no)),
    "queries and keys change places": (
        GPT2,
        lambda patch: patch.function(
            attention.AttentionInterface._global_mapping,
            attention.ATTENTION,
            lambda run, module, q, k, *a, **kw: run(module, k, q, *a, **kw),
        ),
    ),
    "positions never restart": (
        MISTRAL,
        with_arguments(export, "recording", position_ids=lambda p: torch.ones_like(p).cumsum(-1)),
    ),
    "first position one too far": (GPT2, with_result(export, "first_position", lambda n: n + 1)),
    "keys' weight for values'": (MISTRAL, with_result(export, "_unlift", _weights_exchanged)),
    "a tied LM head with weights of its own": (
        MISTRAL,
        with_result(export, "_unlift", _tied_weight_lost),
    ),
    "routing weights ignored": (GPT_OSS, experts_call(top_k_weights=torch.ones_like)),
    "the next expert": (GPT_OSS, experts_call(top_k_index=_experts_off_by_one)),
}

EXPERTS: dict[str, tuple[Toy, Break]] = {
    "gate and up change places": (
        GPT_OSS,
        with_result(experts_op, "_split", lambda parts: parts[::-1]),
    ),
    "interleaved as halves": (
        GPT_OSS,
        with_arguments(experts_op, "_split", interleaved=lambda value: not value),
    ),
    "expert biases dropped": (GPT_OSS, with_arguments(experts_op, "_biased", biases=no)),
    "the slope of SiLU": (GPT_OSS, with_arguments(experts_op, "activate", alpha=lambda _: 1.0)),
    "the offset of up": (GPT_OSS, with_arguments(experts_op, "bound_up", offset=lambda _: 0.0)),
    "the limit of the gate": (GPT_OSS, with_arguments(experts_op, "activate", limit=lambda _: 0.0)),
    "the limit of up": (GPT_OSS, with_arguments(experts_op, "bound_up", limit=lambda _: 0.0)),
}

# --- the passes that capture runs, canonicalise before all others ------------------------------


def _form(**changes: Any) -> Break:
    """Another form is recovered from the scores."""

    def changed(form: Any) -> Any:
        return replace(form, **{name: new(getattr(form, name)) for name, new in changes.items()})

    return with_result(fuse_attention, "recover", changed)


def _gate_for_up(gm: GraphModule) -> None:
    """As if both had been found equal: they have one input and one shape."""
    gate, up = read_calls(gm, inlay.linear.default)[4:6]
    up.replace_all_uses_with(gate)


def _flipped_heads(node: Any) -> Any:
    return insert_call(node.graph, node.next, aten.flip.default, node, [1])


def _square_left_as_it_is(run: Any, tensors: list[torch.Tensor], recipe: Any) -> torch.Tensor:
    return tensors[0] if len(set(tensors[0].shape)) == 1 else run(tensors, recipe)


def _drop_any_scale(gm: GraphModule) -> None:
    scaled = [n for n in calls(gm, aten.mul.Tensor) if isinstance(n.args[1], int | float)]
    use_instead(scaled[0], scaled[0].args[0])


CANONICALISE: dict[str, tuple[Toy, Break]] = {
    "gate and up merged": (MISTRAL, after_pass("canonicalise", _gate_for_up)),
    "a scale that is not one dropped": (
        GRANITE,
        after_pass("canonicalise", _drop_any_scale),
    ),
    "tanh-GELU taken for GELU": (
        GPT2,
        with_result(canonicalise, "activation_of", lambda found: found and ("gelu", found[1])),
    ),
    "bias dropped": (
        GPT2,
        after_pass("canonicalise", emit(inlay.linear.default, slice(0, 1), bias=no)),
    ),
    "transpose forgotten in its recipe": (
        GPT2,
        lambda patch: patch.function(TRANSFORMS, "transpose", _square_left_as_it_is),
    ),
}
"""Seen by the check of that pass."""

GRAPH: dict[str, tuple[Toy, Break]] = {
    "fuse_attention: scale x 2": (GEMMA2_PLAIN, _form(scale=lambda s: 2 * s)),
    "fuse_attention: window one too wide": (GEMMA2_PLAIN, _form(window=more)),
    "fuse_attention: a local layer's window lost": (GPT_NEO, _form(window=lambda _: 0)),
    "fuse_attention: soft-cap lost": (GEMMA2_PLAIN, _form(softcap=lambda _: 0.0)),
    "fuse_attention: mask lost": (GPT_NEO, _form(causal=lambda _: False)),
    "fuse_attention: slopes negated": (ALIBI, _form(slopes=lambda s: [-one for one in s])),
    "fuse_attention: slopes of other heads": (ALIBI, _form(slopes=lambda s: s[::-1])),
    "fuse_attention: q and k change places": (
        GPT_NEO,
        after_pass("fuse_attention", swap(inlay.attention.default, "q", "k")),
    ),
    "fuse_attention: k and v change places": (
        GPT_NEO,
        after_pass("fuse_attention", swap(inlay.attention.default, "k", "v")),
    ),
    "fuse_attention: repeat_kv undone wrongly": (
        GEMMA2_PLAIN,
        with_result(fuse_attention, "_unrepeated", _flipped_heads),
    ),
    "attention_mask: every mask is full": (
        GPT_NEO,
        with_result(attention_mask, "visible_form", lambda found: (0, found[1], 0)),
    ),
    "attention_mask: scale and soft-cap": (
        GEMMA2_PLAIN,
        with_result(attention_mask, "_scale_and_softcap", lambda found: (found[0], 0.0)),
    ),
    "use_position_ids: one too far": (
        BART,
        with_result(use_position_ids, "insert_call", through(aten.add.Tensor, 1)),
    ),
    "use_position_ids: does nothing": (
        BART,
        with_result(use_position_ids, "_counts_from_zero", lambda _: False),
    ),
}

# --- the passes of a build: (toy, pass, what it does wrong) -----------------------------------


def _parts_exchanged(op: Any) -> Any:
    """Users of one part of a call's result read the other part, and the other way round."""

    def edit(gm: GraphModule) -> None:
        source = next(node for node in calls(gm, op) if len(node.users) == 2)
        for part in list(source.users):
            part.args = (source, 1 - part.args[1])

    return edit


def _cat_reordered(gm: GraphModule) -> None:
    """Keys' and values' weights, of one shape, change places in the fused one."""
    recipe = next(r for r in gm.meta["recipes"].values() if r["op"] == "cat")
    recipe["inputs"][1:] = recipe["inputs"][:0:-1]


def _first_norm_for_second(op: Any) -> Any:
    """The second norm gets the first one's weight."""

    def edit(gm: GraphModule) -> None:
        first, second = calls(gm, op)[:2]
        second.update_arg(1, first.args[1])

    return edit


def _without_residual(gm: GraphModule) -> None:
    node = calls(gm, inlay.add_rms_norm.default)[0]
    node.update_arg(1, node.args[0])


def _cache_of_layer_0(gm: GraphModule) -> None:
    first, second = calls(gm, inlay.paged_attention.default)
    for number in (3, 4):
        second.update_arg(number, first.args[number])


def _slots_of_group_0(gm: GraphModule) -> None:
    first, second = calls(gm, inlay.paged_attention.default)
    second.update_arg(5, first.args[5])


def _table_of_group_0(gm: GraphModule) -> None:
    first, second = calls(gm, inlay.paged_attention.default)
    second.update_arg(6, first.args[6])


def _without_final_softcap(gm: GraphModule) -> None:
    last = calls(gm, aten.tanh.default)[-1]
    use_instead(last, last.args[0])


def _recipe_in_another_order(gm: GraphModule) -> None:
    recipe = next(r for r in gm.meta["recipes"].values() if r["op"] == "calls")
    recipe["inputs"].reverse()


def _another_call(gm: GraphModule) -> None:
    recipe = next(r for r in gm.meta["recipes"].values() if r["op"] == "calls")
    next(call for call in recipe["calls"] if call["op"] == "exp.default")["op"] = "neg.default"


ROPE, RMS, LAYER_NORM = inlay.rope.default, inlay.rms_norm.default, inlay.layer_norm.default
GATED, PAGED = inlay.gated.default, inlay.paged_attention.default

PASSES: dict[str, tuple[Toy, str, Any]] = {
    "halves as pairs": (MISTRAL, "fuse_rope", emit(ROPE, interleaved=lambda _: True)),
    "pairs as halves": (LLAMA4, "fuse_rope", emit(ROPE, interleaved=lambda _: False)),
    "sine negated": (MISTRAL, "fuse_rope", emit(ROPE, sin=through(aten.neg.default))),
    "sine of the queries alone negated": (
        MISTRAL,
        "fuse_rope",
        emit(ROPE, slice(0, 1), sin=through(aten.neg.default)),
    ),
    "sine for cosine": (MISTRAL, "fuse_rope", swap(ROPE, "cos", "sin")),
    "tables one column off": (
        MISTRAL,
        "fuse_rope",
        emit(ROPE, cos=through(aten.roll.default, [1], [-1])),
    ),
    "bias of a layer norm dropped": (NEMOTRON, "fuse_layer_norm", emit(LAYER_NORM, bias=no)),
    "1 + w of a layer norm": (
        NEMOTRON,
        "fuse_layer_norm",
        emit(LAYER_NORM, weight_offset=lambda _: 0.0),
    ),
    "weight of another layer norm": (
        NEMOTRON,
        "fuse_layer_norm",
        _first_norm_for_second(LAYER_NORM),
    ),
    "epsilon x 10": (MISTRAL, "fuse_rms_norm", emit(RMS, eps=lambda eps: 10 * eps)),
    "1 + w of an RMS norm": (GEMMA2, "fuse_rms_norm", emit(RMS, weight_offset=lambda _: 0.0)),
    "weight of another RMS norm": (MISTRAL, "fuse_rms_norm", _first_norm_for_second(RMS)),
    "weight of an RMS norm dropped": (MISTRAL, "fuse_rms_norm", emit(RMS, weight=no)),
    "residual lost": (MISTRAL, "fuse_add_norm", _without_residual),
    "sum and norm change places": (
        MISTRAL,
        "fuse_add_norm",
        _parts_exchanged(inlay.add_rms_norm.default),
    ),
    "gate and up change places": (MISTRAL, "fuse_gated_activation", swap(GATED, "gate", "up")),
    "another activation": (
        MISTRAL,
        "fuse_gated_activation",
        emit(GATED, activation=lambda _: "gelu"),
    ),
    "erf for tanh": (GEMMA2, "fuse_gated_activation", emit(GATED, activation=lambda _: "gelu")),
    "inputs of the calls reversed": (DIFFLLAMA, "fold_constants", _recipe_in_another_order),
    "another op among the calls": (DIFFLLAMA, "fold_constants", _another_call),
    "k and v change places in the fused weight": (MISTRAL, "fuse_gemms", _cat_reordered),
    "gate and up change places in the split": (
        MISTRAL,
        "fuse_gemms",
        _parts_exchanged(aten.split_with_sizes.default),
    ),
    "the row after the last one": (
        MISTRAL,
        "gather_last_logits",
        emit(aten.index_select.default, index=through(aten.sub.Tensor, 1)),
    ),
    "the final soft-cap lost": (GEMMA2, "gather_last_logits", _without_final_softcap),
    "scale x 1.01": (MISTRAL, "insert_paged_kv", emit(PAGED, scale=lambda s: 1.01 * s)),
    "window one too wide": (MISTRAL, "insert_paged_kv", emit(PAGED, window=more)),
    "slots of another group": (GPT_NEO, "insert_paged_kv", _slots_of_group_0),
    "block table of another group": (GPT_NEO, "insert_paged_kv", _table_of_group_0),
}

# --- what only an engine with a cache can show ------------------------------------------------


def _attend(**changes: Any) -> Break:
    return with_arguments(ReferenceAttention, "__call__", **changes)


def _step(**changes: Any) -> Break:
    """The step's inputs are wrong, for whoever builds one."""

    def changed(step: Any) -> Any:
        return replace(step, **{name: new(getattr(step, name)) for name, new in changes.items()})

    return with_result(guards, "build_step", changed)


def _real(change: Any) -> Any:
    """Padding stays what it is."""
    return lambda slots: torch.where(slots >= 0, change(slots), slots)


def _other_order(names: str) -> Any:
    """Two of a segment's equal-shaped weights or outputs change places."""

    def changed(result: Any) -> Any:
        step, gm = result
        values = list(getattr(step, names))
        shapes = [tuple(n.meta["val"].shape) for n in gm.graph.find_nodes(op="placeholder")]
        if names == "outputs":
            shapes = [tuple(n.meta["val"].shape) for n in gm.graph.output_node().args[0]]
        for i, j in itertools.combinations(range(len(values)), 2):
            if shapes[i] == shapes[j]:
                values[i], values[j] = values[j], values[i]
                return replace(step, **{names: tuple(values)}), gm
        return result

    return with_result(partition, "_segment", changed)


def _attention_step(**changes: Any) -> Break:
    def changed(step: Any) -> Any:
        return replace(step, **{name: new(step) for name, new in changes.items()})

    return with_result(partition, "_attention", changed)


def _weights_shifted(pairs: Any) -> Any:
    """Weights of one shape written under each other's names."""
    found = list(pairs)
    two = [i for i, (name, _) in enumerate(found) if name.endswith("layernorm.weight")][:2]
    (one, a), (other_one, b) = (found[i] for i in two)
    found[two[0]], found[two[1]] = (one, b), (other_one, a)
    return iter(found)


ENGINE: dict[str, tuple[Toy, Break]] = {
    "paged: slots off by one": (MISTRAL, _attend(slot_mapping=_real(lambda s: s ^ 1))),
    "paged: block table of the other request": (MISTRAL, _attend(block_table=other)),
    "paged: one cached token short": (MISTRAL, _attend(seq_lens=lambda n: n - 1)),
    "paged: borders of requests off by one": (
        MISTRAL,
        _attend(query_start_loc=lambda s: torch.cat([s[:1], s[1:-1] - 1, s[-1:]])),
    ),
    "paged: scale x 1.01": (MISTRAL, _attend(step=lambda s: replace(s, scale=1.01 * s.scale))),
    "paged: window one too wide": (
        MISTRAL,
        _attend(step=lambda s: replace(s, window=s.window + 1)),
    ),
    "paged: no window": (MISTRAL, _attend(step=lambda s: replace(s, window=0))),
    "paged: no chunks": (LLAMA4, _attend(step=lambda s: replace(s, chunk=0))),
    "paged: no slopes": (ALIBI, _attend(slopes=no)),
    "paged: no sinks": (GPT_OSS, _attend(sinks=no)),
    "paged: no soft-cap": (GEMMA2, _attend(step=lambda s: replace(s, softcap=0.0))),
    "paged: mask off": (TWO_LAYERS, _attend(step=lambda s: replace(s, causal=False))),
    "insert_paged_kv: cache of another layer": (
        TWO_LAYERS,
        after_pass("insert_paged_kv", _cache_of_layer_0),
    ),
    "partition: weights change places": (MISTRAL, _other_order("weights")),
    "partition: outputs change places": (MISTRAL, _other_order("outputs")),
    "partition: keys and values change places": (
        MISTRAL,
        _attention_step(key=lambda s: s.value, value=lambda s: s.key),
    ),
    "partition: window forgotten": (MISTRAL, _attention_step(window=lambda _: 0)),
    "partition: sinks forgotten": (GPT_OSS, _attention_step(sinks=no)),
    "partition: an encoder made causal": (BERT, _attend(step=lambda s: replace(s, causal=True))),
    "recipes: parts in another order": (
        MISTRAL,
        lambda patch: patch.function(
            TRANSFORMS,
            "cat",
            lambda run, tensors, recipe: run(
                [*tensors[:-2], *tensors[:-3:-1]] if len(tensors) == 3 else tensors, recipe
            ),
        ),
    ),
    "weights written under other names": (
        MISTRAL,
        with_result(pipeline, "weights_of", _weights_shifted),
    ),
    "build_step: slots off by one": (MISTRAL, _step(slot_mapping=_real(lambda s: s ^ 1))),
    "build_step: block tables of the other request": (
        MISTRAL,
        _step(block_tables=lambda t: t.flip(1)),
    ),
    "build_step: one cached token short": (MISTRAL, _step(seq_lens=lambda n: n - 1)),
    "build_step: logits of the row before": (
        MISTRAL,
        _step(logits_indices=lambda rows: (rows - 1).clamp(min=0)),
    ),
    "ProgramModel: one cache for all layers": (
        TWO_LAYERS,
        lambda patch: patch.function(
            ProgramModel,
            "allocate_kv_cache",
            _one_cache_for_all,
        ),
    ),
}


def _one_cache_for_all(run: Any, model: Any, *sizes: Any) -> None:
    run(model, *sizes)
    model._caches = dict.fromkeys(model._caches, next(iter(model._caches.values())))


FROM_EXPORT: dict[str, tuple[Toy, Break]] = {
    "every layer is the first": (TWO_LAYERS, _constant_layer),
}
"""Seen by the engine, but to be made before the export."""

POSITIONS: dict[str, tuple[Toy, Break]] = {
    "build_step: positions off by one": (GPT2, _step(position_ids=lambda p: p + 1)),
}
"""Seen in the captured graph already: it takes its positions from a step."""

MASKS: dict[str, tuple[Toy, Break]] = {
    "the window is forgotten": (MISTRAL, attention_call(sliding_window=no)),
    "a window longer than short requests": (LONG_WINDOW, attention_call(sliding_window=no)),
    "the chunk is forgotten": (LLAMA4, with_result(attention, "_chunk", lambda _: 0)),
    "an encoder is taken for causal": (BERT, attention_call(is_causal=lambda _: True)),
}
"""Seen by comparison with transformers' masks; the plain graph would then be taken instead."""

# --- the compiled side: the C++ attention op under the engine's graphs, and compiled segments ----


def _cpu_attention(**changes: Any) -> Break:
    return with_arguments(CpuAttention, "__call__", **changes)


CPU_ATTENTION: dict[str, tuple[Toy, Break]] = {
    "scale x 1.01": (MISTRAL, _cpu_attention(step=lambda s: replace(s, scale=1.01 * s.scale))),
    "window one too wide": (
        MISTRAL,
        _cpu_attention(step=lambda s: replace(s, window=s.window + 1)),
    ),
    "sinks dropped": (GPT_OSS, _cpu_attention(sinks=no)),
    "slopes dropped": (ALIBI, _cpu_attention(slopes=no)),
    "slots off by one": (MISTRAL, _cpu_attention(slot_mapping=_real(lambda s: s ^ 1))),
}


def _middles(model: ProgramModel) -> list[int]:
    """Where the program calls one segment for the second layer and for the third."""
    keys = [getattr(step, "segment", None) for step, *_ in model._plan]
    key = next(key for key in keys if key and keys.count(key) == 2)
    return [index for index, other_key in enumerate(keys) if other_key == key]


def _packed_weight_of_another_layer(model: ProgramModel) -> None:
    one, two = (model._plan[index][2] for index in _middles(model))
    packed = next(index for index, weight in enumerate(one) if weight.dtype == torch.int64)
    one[packed] = two[packed]


def _weights_of_another_order(model: ProgramModel) -> None:
    weights = model._plan[_middles(model)[0]][2]
    first, second = (i for i, weight in enumerate(weights) if weight.shape == (64,))  # norms'
    weights[first], weights[second] = weights[second], weights[first]


def _segment_of_another_layer(model: ProgramModel) -> None:
    one, two = _middles(model)
    model._plan[one][2][:] = model._plan[two][2]


COMPILED_TOY = Toy("llama", layers=3)
COMPILED: dict[str, Callable[[ProgramModel], None]] = {
    "a packed weight of another layer": _packed_weight_of_another_layer,
    "two weights in each other's place": _weights_of_another_order,
    "a segment called with another layer's weights": _segment_of_another_layer,
}

# --- the runtime, behind all guards: other tokens than Hugging Face's -------------------------


def _frequencies(new: Any) -> Break:
    return with_arguments(rope, "_fix", max_seq_len=new)


DYNAMIC = Toy("llama-dynamic")
LONGROPE = Toy("phi3-longrope")

TOKENS_OF_A_BUILD: dict[str, tuple[Toy, Break]] = {
    "dynamic RoPE for another length": (DYNAMIC, _frequencies(lambda n: 8 * n)),
    "longrope with the other factors": (LONGROPE, _frequencies(lambda n: 8 * n)),
}
"""Guards compare with a shell of the same frequencies: what they are for, tokens tell."""


def _first_block_for_all(take: Any, pool: block_pool.BlockPool) -> Any:
    if pool.refs(0) == 0:
        return take(pool)
    pool.hold(0)
    return 0, None


def _padding_written(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Over a token beside the first sequence's newest."""
    slots = tensors[2]
    return [*tensors[:2], torch.where(slots < 0, slots[:, :1] ^ 1, slots), *tensors[3:]]


RUNTIME: dict[str, Break] = {
    "token of another slot": with_arguments(
        batch.Batch, "fill_in", last_tokens=lambda tokens: tokens.flip(0)
    ),
    "no token taken over": instead(batch.Batch, "fill_in", lambda *_: None),
    "prompt chunk one token late": with_result(
        batch,
        "_flatten",
        lambda flat: replace(flat, computed=(flat.computed - 1).clip(0)),
    ),
    "blocks in another order at each step": with_result(
        kv_cache.KVCache, "tables", lambda tables: tables[:, :, ::-1].copy()
    ),
    "block table of another request": with_result(
        kv_cache.KVCache, "tables", lambda tables: tables * 0
    ),
    "a block handed out twice": lambda patch: patch.function(
        block_pool.BlockPool, "take", _first_block_for_all
    ),
    "a block named by its place alone": with_arguments(
        block_pool, "block_hash", tokens=lambda tokens: ()
    ),
    "a window lets go of its first block": with_result(
        kv_cache.KVCache, "_first_seen", lambda index: index + 1
    ),
    "logits of the row before": with_result(
        batch,
        "build_step",
        lambda s: replace(s, logits_indices=(s.logits_indices - 1).clamp(min=0)),
    ),
    "sampled requests in another order": with_result(
        executor, "prepare", lambda made: replace(made, rows=made.rows[::-1])
    ),
    "a captured step with the tables of none": with_result(
        dispatch.Dispatcher,
        "_padded",
        lambda tensors: [0 * t if t.ndim == 3 else t for t in tensors],
    ),
    "a captured step's padding is written": with_result(
        dispatch.Dispatcher, "_padded", _padding_written
    ),
}
