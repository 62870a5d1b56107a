"""Weight transforms as recipes: how a rewritten graph's weights come from the checkpoint's.

A recipe is plain data, `{"op": ..., "inputs": [names], ...}`, so that it is recorded in the
artifact and replayed on new weights without tracing the model again.

A quantized weight's values, scales and zeros are made anew by the recipe "quantize". The recipe
"given" says that there is none; what new weights then need depends on its origin:
- "checkpoint": the parts come with the new checkpoint, quantized like the old one.
- "calibration", W.smooth, W.input_scale and W.input_zero: measured on texts. The engine's own hold
  for weights that differ little (a fine-tuned model): they are kept, and "smooth" and "quantize"
  round the new weight by them.
- "calibration", W.values, W.scales and W.zeros: GPTQ's, made of the old weight and what its layer
  was given. They are true of no other weight: calibration is to be done again, for which the
  artifact has the token ids (calibration.jsonl) and the settings (options.quantization in its
  manifest). Doing so is right for the parts above too, and needed where weights differ much.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from inlay.errors import ModelLoadError
from inlay.passes.quantize.config import Scheme
from inlay.passes.quantize.rounding import quantize_weight

Recipe = Mapping[str, Any]


def _cat(tensors: list[torch.Tensor], recipe: Recipe) -> torch.Tensor:
    return torch.cat(tensors, dim=recipe["dim"])


def _transpose(tensors: list[torch.Tensor], recipe: Recipe) -> torch.Tensor:
    return tensors[0].t().contiguous()


def _zeros(tensors: list[torch.Tensor], recipe: Recipe) -> torch.Tensor:
    """A bias of zeros for the rows of a weight whose linear layer has none."""
    return tensors[0].new_zeros(tensors[0].shape[0])


def _constant(tensors: list[torch.Tensor], recipe: Recipe) -> torch.Tensor:
    """Numbers that a pass read off the graph, of the recipe's dtype."""
    return torch.tensor(recipe["values"], dtype=getattr(torch, recipe["dtype"]))


def _maximum(tensors: list[torch.Tensor], recipe: Recipe) -> torch.Tensor:
    return functools.reduce(torch.maximum, tensors)


def _same(tensors: list[torch.Tensor], recipe: Recipe) -> torch.Tensor:
    """One tensor that several weights have alike; what was fused must agree on it."""
    first, *rest = tensors
    if not all(torch.equal(first, other) for other in rest):
        raise ModelLoadError(f"{', '.join(recipe['inputs'])} must be equal, since they are fused")
    return first


def _smooth(tensors: list[torch.Tensor], recipe: Recipe) -> torch.Tensor:
    """A weight [N, K] whose columns take over what its input [.., K] is divided by."""
    weight, factors = tensors
    return weight.float() * factors


def _calls(tensors: list[torch.Tensor], recipe: Recipe) -> torch.Tensor:
    """What a few calls of PyTorch's own ops make of the inputs: the last one's result.

    Values are numbered, the inputs first.
    """
    values = list(tensors)
    for call in recipe["calls"]:
        name, _, overload = call["op"].partition(".")
        op = getattr(getattr(torch.ops.aten, name), overload)
        args = [_decode_argument(value, values) for value in call["args"]]
        kwargs = {key: _decode_argument(value, values) for key, value in call["kwargs"].items()}
        values.append(op(*args, **kwargs))
    return values[-1].contiguous()


TRANSFORMS: dict[str, Callable[[list[torch.Tensor], Recipe], torch.Tensor]] = {
    "cat": _cat,
    "transpose": _transpose,
    "zeros": _zeros,
    "constant": _constant,
    "calls": _calls,
    "maximum": _maximum,
    "same": _same,
    "smooth": _smooth,
}


def encode_argument(value: Any, numbers: Mapping[Node, int]) -> Any:
    """An op's argument as JSON for the recipe "calls"; tensors by their number."""
    if isinstance(value, Node):
        return {"value": numbers[value]}
    if isinstance(value, list | tuple):
        return [encode_argument(item, numbers) for item in value]
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def _decode_argument(value: Any, values: list[torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode_argument(item, values) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    decoders: dict[str, Callable[[Any], Any]] = {
        "value": values.__getitem__,
        "torch": functools.partial(getattr, torch),
        "device": torch.device,
        "float": float,
    }
    return decoders[kind](content)


class WeightMaker:
    """Makes weights by their recipes; source gives what has none, the checkpoint's own, and what
    calibration or a quantized checkpoint gave."""

    def __init__(
        self, recipes: Mapping[str, Recipe], source: Callable[[str], torch.Tensor]
    ) -> None:
        self._recipes, self._source = recipes, source
        self._rounded: tuple[Any, tuple[torch.Tensor | None, ...]] = (None, ())

    def __call__(self, name: str) -> torch.Tensor:
        recipe = self._recipes.get(name)
        if recipe is None or recipe["op"] == "given":
            return self._source(name)
        if recipe["op"] == "quantize":
            return self._round(recipe)
        inputs = [self(part) for part in recipe["inputs"]]
        return TRANSFORMS[recipe["op"]](inputs, recipe)

    def _round(self, recipe: Recipe) -> torch.Tensor:
        """One of the parts of a weight that is rounded to nearest: all are made at once, and those
        of the last weight are kept, since they are asked for one after the other."""
        key = {**recipe, "part": None}
        if self._rounded[0] != key:
            weight = self(recipe["inputs"][0])
            weight = weight.mT if recipe["transposed"] else weight
            self._rounded = key, quantize_weight(weight, Scheme(**recipe["scheme"]))
        part = self._rounded[1][("values", "scales", "zeros").index(recipe["part"])]
        assert part is not None, f"{recipe['part']} of a scheme that has none"
        return part


def make_weight(
    name: str, recipes: Mapping[str, Recipe], source: Callable[[str], torch.Tensor]
) -> torch.Tensor:
    """The tensor of this name: made by its recipe, or the checkpoint's own where it has none."""
    return WeightMaker(recipes, source)(name)


def leaves(name: str, recipes: Mapping[str, Recipe]) -> list[str]:
    """The checkpoint's weights that this weight is made of."""
    recipe = recipes.get(name)
    if recipe is None:
        return [name]
    return [leaf for part in recipe["inputs"] for leaf in leaves(part, recipes)]


def rows_of(name: str, recipes: Mapping[str, Recipe]) -> dict[str, range]:
    """Which rows of a weight come from which weight of the checkpoint: where a LoRA delta goes.

    A weight that the checkpoint has itself, or has transposed, takes all its rows: an empty dict,
    for nothing was put together.
    """
    recipe = recipes.get(name, {})
    if recipe.get("op") != "cat":
        return {}
    ends = list(itertools.accumulate(recipe["sizes"], initial=0))
    parts = zip(recipe["inputs"], itertools.pairwise(ends), strict=True)
    return {leaves(part, recipes)[0]: range(*rows) for part, rows in parts}
