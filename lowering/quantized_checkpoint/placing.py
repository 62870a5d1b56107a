"""Where a loaded model holds the numbers of a quantized checkpoint, and the plan that follows."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from inlay.errors import UnsupportedModelError
from inlay.lowering.quantized_checkpoint.layer import Layer
from inlay.lowering.quantized_checkpoint.reader import QuantizedFiles
from inlay.passes.quantize.config import NONE
from inlay.passes.quantize.plan import Plan

logger = logging.getLogger(__name__)

ROWS_COMPARED = slice(0, 16)

MERGED = (
    "the model holds them put together with others in another way than experts, one after the "
    "other and without an order of inputs of their own (act order)"
)


def plan_of(name: str, model: PreTrainedModel, files: QuantizedFiles) -> Plan:
    """The schemes and parts of the model's weights that came from quantized ones.

    transformers renames and merges weights as it loads them. A parameter is known by its memory,
    and believed by its numbers; experts by their numbers alone. What is not found, or what no op
    of ours takes, runs dequantized, and is told with the reason.

    Raises UnsupportedModelError where the numbers lie transposed in the model.
    """
    placed: dict[str, Layer] = {}
    unplaced = dict(files.layers)
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        source = files.addresses.get(parameter.data_ptr(), "")
        layer = files.layers.get(source)
        if isinstance(layer, Layer) and _holds(parameter, layer):
            _check_owner(model, parameter_name)
            placed[parameter_name] = layer
            unplaced.pop(source, None)
    placed |= _alike(_experts(model, unplaced, set(placed), files.notes), files.notes)
    _tell(name, files, unplaced)
    schemes = {weight: layer.scheme for weight, layer in placed.items()}
    given = {
        f"{weight}.{part}": tensor
        for weight, layer in placed.items()
        for part, tensor in layer.parts.items()
    }
    return Plan(schemes=schemes, given=given)


def _holds(parameter: Tensor, layer: Layer) -> bool:
    expected = layer.weight(parameter.dtype, ROWS_COMPARED)
    return torch.equal(parameter.detach()[ROWS_COMPARED], expected)


def _check_owner(model: PreTrainedModel, name: str) -> None:
    owner = model.get_submodule(name.rpartition(".")[0])
    if type(owner).__name__ == "Conv1D":
        raise UnsupportedModelError(
            f"module {name} is a Conv1D, whose weight lies transposed; quantized checkpoints of "
            f"{model.config.model_type!r} models are not supported, take an unquantized one and "
            "quantization="
        )


def _experts(
    model: PreTrainedModel,
    unplaced: dict[str, Layer | str],
    placed: set[str],
    notes: set[str],
) -> dict[str, Layer]:
    """Layers of experts [E, N, K], put together of those that are stored one by one.

    Takes those that it places out of unplaced.
    """
    sources: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for name in unplaced:
        if found := re.fullmatch(r"(.+)\.(\d+)\.(\w+)\.weight", name):
            sources[found[1], found[3]][int(found[2])] = name
    found_layers = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() != 3 or name in placed:
            continue
        joined: list[tuple[int, list[str]]] = []
        for (prefix, _), names in sources.items():
            if re.findall(r"\d+", prefix) != re.findall(r"\d+", name):
                continue
            offset = _offset(parameter, [unplaced.get(names.get(i, "")) for i in range(len(names))])
            if offset is not None:
                joined.append((offset, [names[i] for i in range(len(names))]))
        layer = _join(parameter, sorted(joined), unplaced, notes)
        if layer is not None:
            found_layers[name] = layer
            for _, members in joined:
                for member in members:
                    del unplaced[member]
    return found_layers


def _alike(experts: dict[str, Layer], notes: set[str]) -> dict[str, Layer]:
    """Both projections of a layer's experts with activations rounded, or neither: where groups of
    inputs share a weight scale our op does not round them."""
    modules: dict[str, list[Layer]] = defaultdict(list)
    for name, layer in experts.items():
        modules[name.rpartition(".")[0]].append(layer)
    for layers in modules.values():
        if any(layer.scheme.group_size for layer in layers):
            if any(layer.scheme.activation != NONE for layer in layers):
                notes.add("activations of experts with group scales are not rounded: more exact")
            for layer in layers:
                layer.scheme = replace(layer.scheme, activation=NONE)
    return experts


def _offset(parameter: Tensor, layers: list[Layer | str | None]) -> int | None:
    """The row of [E, N, K] from which on all experts' weights lie in it; None where they do not."""
    if len(layers) != len(parameter) or not all(isinstance(one, Layer) for one in layers):
        return None
    first: Tensor | None = None
    offset = 0
    for expert, layer in zip(parameter.detach(), layers, strict=True):
        assert isinstance(layer, Layer)
        weight = layer.weight(parameter.dtype)
        if weight.shape[1] != expert.shape[1] or "order" in layer.parts:
            return None
        if first is None:
            first = weight
            places = range(0, len(expert) - len(weight) + 1, len(weight))
            fits = [n for n in places if torch.equal(expert[n : n + len(weight)], weight)]
            if not fits:
                return None
            offset = fits[0]
        if not torch.equal(expert[offset : offset + len(weight)], weight):
            return None
    return offset


def _join(
    parameter: Tensor,
    joined: list[tuple[int, list[str]]],
    layers: Mapping[str, Layer | str],
    notes: set[str],
) -> Layer | None:
    """The experts' parts one after the other; None where they do not fill the parameter."""
    groups = [[layers[name] for name in names] for _, names in joined]
    flat = [layer for group in groups for layer in group if isinstance(layer, Layer)]
    row = 0
    for (offset, _), group in zip(joined, groups, strict=True):
        if offset != row or not isinstance(group[0], Layer):
            return None
        row += group[0].parts["scales"].shape[1]
    if row != parameter.shape[1] or len({layer.scheme for layer in flat}) != 1:
        return None
    scheme = flat[0].scheme
    if scheme.static or not scheme.activation_symmetric:
        notes.add("activations of experts have a symmetric scale for each row")
        scheme = replace(scheme, static=False, activation_symmetric=True)
    parts = {}
    for part, along in (("values", 0), ("scales", 1), ("zeros", 1)):
        if part in flat[0].parts:
            experts = zip(*groups, strict=True)
            parts[part] = torch.stack(
                [torch.cat([_part(one, part) for one in expert], along) for expert in experts]
            )
    return Layer(scheme, parts)


def _part(layer: Layer | str, part: str) -> Tensor:
    assert isinstance(layer, Layer)
    return layer.parts[part]


def _tell(name: str, files: QuantizedFiles, unplaced: Mapping[str, Layer | str]) -> None:
    """Say what is not as the checkpoint asks for."""
    for note in sorted(files.notes):
        logger.warning("checkpoint %s: %s", name, note)
    if files.cache_scales:
        logger.warning(
            "checkpoint %s has scales of a narrow KV cache (%s and %d more), which are not used: "
            "the cache holds the engine's dtype",
            name,
            files.cache_scales[0],
            len(files.cache_scales) - 1,
        )
    reasons: dict[str, list[str]] = defaultdict(list)
    for weight, layer in unplaced.items():
        why = layer if isinstance(layer, str) else MERGED
        reasons[why].append(weight)
    for why, weights in reasons.items():
        logger.warning(
            "checkpoint %s: %d weights run dequantized, in the engine's dtype, which takes two to "
            "four times the memory: %s; %s",
            name,
            len(weights),
            why,
            ", ".join(weights[:4]) + (" ..." if len(weights) > 4 else ""),
        )
