"""The weights of a quantized layer: given ones, or recipes that make them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch.fx import GraphModule, Node

from inlay.passes.graph import add_weight, fake
from inlay.passes.quantize.config import Scheme
from inlay.passes.quantize.plan import Plan
from inlay.passes.quantize.rounding import quantize_weight
from inlay.passes.weights import leaves

ALONG = {"values": -2, "scales": -1, "zeros": -1}
"""The dimension of N, in which a fused weight's parts lie one after the other."""


class Parts:
    """What belongs to one quantized weight W, as placeholders "W.values", "W.scales" ...

    transposed: the checkpoint's last two dimensions are swapped. suffix: put behind W's name where
    the same weight is quantized in two ways (tied embeddings).
    """

    def __init__(
        self,
        gm: GraphModule,
        weight: Node,
        scheme: Scheme,
        plan: Plan,
        transposed: bool = False,
        suffix: str = "",
    ) -> None:
        self._gm, self._weight, self._scheme, self._plan = gm, weight, scheme, plan
        self._name = weight.meta["weight"]
        self._prefix = self._name + suffix
        self._transposed = transposed
        self._leaves = leaves(self._name, gm.meta["recipes"])
        self.values = self._part("values")
        self.scales = self._part("scales")
        self.zeros = self.optional("zeros") if self._is_given() else self._own_zeros()

    def optional(self, part: str) -> Node | None:
        """A part that is there only where it was given; None where it was not."""
        if f"{self._prefix}.{part}" in self._plan.given:
            return self._given(part)
        names = [f"{leaf}.{part}" for leaf in self._leaves]
        return self._given(part) if all(name in self._plan.given for name in names) else None

    def required(self, part: str) -> Node:
        """A part that somebody must have given."""
        found = self.optional(part)
        assert found is not None, f"nobody gave {self._prefix}.{part}"
        return found

    def _is_given(self) -> bool:
        return self.optional("values") is not None

    def _own_zeros(self) -> Node | None:
        return None if self._scheme.symmetric else self._made("zeros")

    def _part(self, part: str) -> Node:
        return self.optional(part) or self._made(part)

    def _given(self, part: str) -> Node:
        name = f"{self._prefix}.{part}"
        given = self._plan.given
        if name in given:
            return self._add_given(name)
        names = [f"{leaf}.{part}" for leaf in self._leaves]
        if len(names) == 1:
            return self._add_given(names[0])
        for one in names:
            self._gm.meta["recipes"][one] = self._from()
        tensors = [given[one] for one in names]
        if part in ALONG:
            sizes = [tensor.shape[ALONG[part]] for tensor in tensors]
            recipe = {"op": "cat", "inputs": names, "dim": ALONG[part], "sizes": sizes}
            joined = torch.cat([self._fake(tensor) for tensor in tensors], ALONG[part])
            return add_weight(self._gm, name, recipe, joined)
        # One input, one scale: the largest holds for all parts. Orders and the like must be equal.
        op = "maximum" if part == "input_scale" else "same"
        recipe = {"op": op, "inputs": names}
        return add_weight(self._gm, name, recipe, self._fake(tensors[0]))

    def _add_given(self, name: str) -> Node:
        return add_weight(self._gm, name, self._from(), self._fake(self._plan.given[name]))

    def _from(self) -> dict[str, Any]:
        origin = "checkpoint" if self._plan.schemes else "calibration"
        return {"op": "given", "inputs": [], "origin": origin}

    def _made(self, part: str) -> Node:
        """Rounded to nearest, after smoothing where there is any."""
        name, recipes = self._name, self._gm.meta["recipes"]
        if self.optional("smooth") is not None:
            name = f"{self._prefix}.smoothed"
            recipes[name] = {"op": "smooth", "inputs": [self._name, f"{self._prefix}.smooth"]}
        recipe: dict[str, Any] = {
            "op": "quantize",
            "inputs": [name],
            "part": part,
            "transposed": self._transposed,
            "scheme": asdict(self._scheme),
        }
        wide = fake(self._weight)
        with wide.fake_mode:
            made = quantize_weight(wide.mT if self._transposed else wide, self._scheme)
        val = made[("values", "scales", "zeros").index(part)]
        assert val is not None, f"{part} of a scheme that has none"
        return add_weight(self._gm, f"{self._prefix}.{part}", recipe, val)

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        with fake(self._weight).fake_mode:
            return torch.empty_like(tensor, device="cpu")
