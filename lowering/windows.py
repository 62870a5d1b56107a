"""The mask that transformers means, against the one that attention is called with.

Windows and chunks are longer than the requests that the guards can afford, and transformers says
them twice: to its attention function, which some implementations heed, and in the mask, which all
do. So every window of the config is made a few tokens, the model runs once, and the masks that it
makes are read.
"""

from __future__ import annotations

import copy
import re
import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import eager_mask

from inlay.lowering.support import NotCapturableError
from inlay.passes.attention_mask import HIDDEN, NotExpressible, visible_form
from inlay.passes.graph import bind, calls, module_of

PROBE = "inlay_probe"
"""The name under which transformers knows an attention function that only looks at its mask."""

SMALLEST, STEP = 16, 4
"""Windows are made this long, each distinct one STEP longer than the one before."""

NUM_TOKENS = 64

_seen = threading.local()


def register_probe() -> None:
    if PROBE not in AttentionInterface().valid_keys():
        AttentionInterface.register(PROBE, _probe_forward)
        AttentionMaskInterface.register(PROBE, eager_mask)


def _probe_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Keeps the mask [1, 1, T, T]; gives [1, T, Hq, Dv] as any attention does."""
    _seen.masks.append(None if attention_mask is None else attention_mask[0, 0])
    return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


def narrowed(config: PreTrainedConfig, longest: int) -> tuple[PreTrainedConfig, dict[int, int]]:
    """The config with short windows, and what became of each; 0 of what no request fills.

    longest: tokens of a request at most.
    """
    copied = copy.deepcopy(config)
    sizes: dict[int, int] = {}
    for part in {id(one): one for one in (copied, copied.get_text_config())}.values():
        for name, number in list(vars(part).items()):
            counts_tokens = re.search("window|chunk|local_att", name) and "layer" not in name
            if counts_tokens and type(number) is int and number >= SMALLEST:
                if number // 2 >= longest:
                    sizes[number] = 0
                else:
                    setattr(part, name, sizes.setdefault(number, SMALLEST + STEP * len(sizes)))
    return copied, sizes


class _WithoutProducts(TorchFunctionMode):
    """Linear layers give zeros: masks do not depend on them, and they are what takes time."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and len(args) >= 2:
            x, weight = args[:2]
            return x.new_zeros(*x.shape[:-1], weight.shape[0])
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def masks_of(model: PreTrainedModel, longest: int) -> list[torch.Tensor | None]:
    """The mask of each attention call of a model that was built with PROBE, for NUM_TOKENS tokens
    or longest; True is seen, None is no mask at all.

    Raises NotCapturableError where the model's code fails.
    """
    _seen.masks = []
    try:
        with _WithoutProducts():
            model(input_ids=torch.zeros(1, min(NUM_TOKENS, longest), dtype=torch.long))
    except Exception as error:  # whatever a model's code may raise
        raise NotCapturableError(
            f"its masks cannot be looked at: {type(error).__name__}: {error}"
        ) from error
    return [None if mask is None else mask > HIDDEN for mask in _seen.masks]


def check_windows(gm: GraphModule, masks: list[torch.Tensor | None], sizes: dict[int, int]) -> None:
    """Each attention op of the graph must have the form of the mask that transformers made.

    masks: of the same model with short windows, in the order of the calls; sizes: see narrowed.

    Raises NotCapturableError that names the module whose attention sees something else.
    """
    attentions = calls(gm, torch.ops.inlay.attention.default)
    if len(masks) != len(attentions):
        raise NotCapturableError(
            f"its attention is called {len(masks)} times by transformers and {len(attentions)} "
            "times in the captured graph"
        )
    for node, mask in zip(attentions, masks, strict=True):
        said = bind(node)
        ours = _narrow(said["window"], sizes), said["causal"], _narrow(said["chunk"], sizes)
        try:
            theirs = (0, False, 0) if mask is None else visible_form(mask)
        except NotExpressible as error:
            raise NotCapturableError(f"module {module_of(node)}: {error}") from error
        if ours != theirs:
            raise NotCapturableError(
                f"module {module_of(node)} calls attention with {_describe(ours)}, and its mask is "
                f"{_describe(theirs)} (windows made shorter to tell: {sizes})"
            )


def _narrow(size: int, sizes: dict[int, int]) -> int:
    """A window or chunk after its config's numbers were changed: one of them, or (ModernBERT) half
    of one and the token itself."""
    halves = {number // 2 + 1: short // 2 + 1 for number, short in sizes.items() if short}
    return {**halves, **sizes}.get(size, size)


def _describe(form: tuple[int, bool, int]) -> str:
    window, causal, chunk = form
    reach = (
        f"a window of {window} tokens" if window else f"chunks of {chunk}" if chunk else "no window"
    )
    return f"{reach}, {'causal' if causal else 'seeing what follows'}"
