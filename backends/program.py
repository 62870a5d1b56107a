"""A compiled model as data: an ordered list of segment calls and attention calls.

Lowering cuts the graph at its attention ops. What lies between is a segment; structurally equal
segments (the middle layers) share one key, so they are compiled once and called with different
weights. Every backend and the eager reference interpret the same program.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class SegmentStep:
    """Call the segment of this key: weights first, then inputs; binds its outputs to names."""

    segment: str
    weights: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class AttentionStep:
    """Paged attention of one layer; query [T, Hq, D], key [T, Hk, D], value [T, Hk, Dv].

    layer: the number of this call, from 0. cache: the layer whose KV cache it uses, another one's
    where layers share keys and values. The rest are the arguments of `inlay::attention`; sinks
    and slopes are names of weights.
    """

    layer: int
    group: int
    cache: int
    query: str
    key: str
    value: str
    output: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: str | None = None
    causal: bool = True
    chunk: int = 0
    slopes: str | None = None

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the weights that this call takes."""
        return tuple(name for name in (self.sinks, self.slopes) if name is not None)


@dataclass(frozen=True)
class Program:
    """steps in order; hidden and logits name the values that hold the final hidden states
    [1, T, hidden] and the logits [1, R, vocab]. dtype is that of weights, cache and activations.
    An encoder has no logits: its hidden states are what a step gives, and logits names them too.
    """

    steps: tuple[SegmentStep | AttentionStep, ...]
    hidden: str
    logits: str
    dtype: str
    vocab_size: int

    @property
    def is_encoder(self) -> bool:
        """Whether tokens see those after them, so that requests must come whole."""
        return any(not step.causal for step in self.attention_steps)

    @property
    def attention_steps(self) -> tuple[AttentionStep, ...]:
        return tuple(step for step in self.steps if isinstance(step, AttentionStep))

    @property
    def segment_steps(self) -> tuple[SegmentStep, ...]:
        return tuple(step for step in self.steps if isinstance(step, SegmentStep))

    @property
    def segment_keys(self) -> tuple[str, ...]:
        """The distinct segments, in order of first use."""
        return tuple(dict.fromkeys(step.segment for step in self.segment_steps))

    @property
    def attention_weight_names(self) -> tuple[str, ...]:
        """Weights that attention takes rather than a segment, in order of first use."""
        return tuple(dict.fromkeys(n for step in self.attention_steps for n in step.weights))

    @property
    def weight_names(self) -> tuple[str, ...]:
        """All weights that the steps use, in order of first use."""
        names: dict[str, None] = {}
        for step in self.steps:
            if isinstance(step, SegmentStep):
                names.update(dict.fromkeys(step.weights))
            else:
                names.update(dict.fromkeys(step.weights))
        return tuple(names)

    def to_json(self) -> dict[str, Any]:
        steps = [
            {"kind": "segment" if isinstance(step, SegmentStep) else "attention", **asdict(step)}
            for step in self.steps
        ]
        return {**asdict(self), "steps": steps}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Program:
        steps: list[SegmentStep | AttentionStep] = []
        for entry in data["steps"]:
            fields = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
            kind = str(fields.pop("kind"))
            steps.append({"segment": SegmentStep, "attention": AttentionStep}[kind](**fields))
        return Program(**{**data, "steps": tuple(steps)})
