"""Choose each request's next token: vectorised over requests with different parameters.

Parameters live in tensors by slot (a running request's place), and the chosen token is written to
`last_tokens[slot]` on the device, where the next step's input is gathered from.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from inlay.runtime.draws import draw_row, sample_plain, sample_truncated, typical_mask
from inlay.runtime.noise import row_keys
from inlay.runtime.sampling_params import SamplingParams

NO_TOKEN = -1
"""Sampled where there is nothing to choose: the logits are NaN, or -inf all of them."""

GREEDY, PLAIN, TRUNCATED = 0, 1, 2
"""How a slot samples: argmax; the whole vocabulary; a top-k / top-p set."""


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy on the device, on CUDA without waiting for it: from pinned memory, in stream order."""
    host = torch.from_numpy(array)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class SlotValues:
    """Parameters of M new requests on their way to the device.

    integers: int64 [4, M], the slot, then, as floats (float64 [4, M]), in the order of `Sampler`.
    """

    integers: np.ndarray
    floats: np.ndarray


@dataclass(frozen=True)
class DrawGroup:
    """Rows that are sampled alike. typical: which of them have typical_p. has_top_k: any has it."""

    kind: int
    rows: np.ndarray
    has_min_p: bool
    typical: np.ndarray
    has_top_k: bool


@dataclass(frozen=True)
class Draws:
    """One step's sampling of N rows: their slots, the positions of their tokens, their groups."""

    slots: np.ndarray
    positions: np.ndarray
    groups: tuple[DrawGroup, ...]

    @property
    def is_typical(self) -> bool:
        """Whether any row has typical_p, which the kernels do not know."""
        return any(len(group.typical) for group in self.groups)


def _find_op(device: torch.device) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    """One call for all rows: on a CPU where a backend has brought it along, on CUDA with Triton."""
    if device.type == "cpu":
        return getattr(torch.ops.inlay_cpu, "draw_tokens", None)
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        from inlay.backends.kernels.triton.sampling import draw_tokens

        return draw_tokens
    return None


class Sampler:
    """The sampling state of all slots.

    `plan` and `plan_slots` use only the host's part of it, the launches only the device's, so that
    a step may be planned while the one before it runs.
    """

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self.device = device
        self.padding_slot = count = max_num_seqs  # of rows that belong to no request
        self._newest = torch.zeros(count + 1, dtype=torch.int64, device=device)
        self.last_tokens = self._newest[:count]
        # Of the device: seed, top_k, is_greedy; temperature, top_p, log(min_p), typical_p.
        self._integers = torch.zeros(3, count + 1, dtype=torch.int64, device=device)
        self._integers[2, count] = 1
        self._floats = torch.ones(4, count + 1, dtype=torch.float64, device=device)
        self._floats[2] = -math.inf  # a slot may be launched whose set-up failed with its step
        # Of the host, which decides the path that a row takes.
        self._kind = np.zeros(max_num_seqs, dtype=np.int8)
        self._has_top_k = np.zeros(max_num_seqs, dtype=bool)
        self._has_min_p = np.zeros(max_num_seqs, dtype=bool)
        self._is_typical = np.zeros(max_num_seqs, dtype=bool)
        self._op = _find_op(device)

    def set_slot(self, slot: int, params: SamplingParams, seed: int) -> None:
        """Take over a new request's parameters; seed is any integer of 64 bits."""
        self.launch_slots(self.plan_slots([(slot, params, seed)]))

    def plan_slots(self, new: Sequence[tuple[int, SamplingParams, int]]) -> SlotValues:
        """The host's half of set_slot, for several (slot, params, seed)."""
        integers, floats = [], []
        for slot, params, seed in new:
            truncated = params.top_k > 0 or params.top_p < 1
            kind = GREEDY if params.is_greedy else TRUNCATED if truncated else PLAIN
            top_k = max(params.top_k, 0)
            self._kind[slot], self._has_top_k[slot] = kind, top_k > 0
            self._has_min_p[slot], self._is_typical[slot] = params.min_p > 0, params.typical_p < 1
            log_min_p = math.log(params.min_p) if params.min_p > 0 else -math.inf
            signed = seed - 2**64 if seed >= 2**63 else seed
            integers.append((slot, signed, top_k, kind == GREEDY))
            # A greedy row's temperature is not used, and must not be zero.
            temperature = 1.0 if kind == GREEDY else params.temperature
            floats.append((temperature, params.top_p, log_min_p, params.typical_p))
        return SlotValues(
            np.array(integers, dtype=np.int64).reshape(-1, 4).T.copy(),
            np.array(floats, dtype=np.float64).reshape(-1, 4).T.copy(),
        )

    def launch_slots(self, values: SlotValues) -> None:
        """The device's half of set_slot."""
        if values.integers.size:
            integers = to_device(values.integers, self.device)
            self._integers[:, integers[0]] = integers[1:]
            self._floats[:, integers[0]] = to_device(values.floats, self.device)

    def sample(
        self, logits: torch.Tensor, slots: np.ndarray, positions: np.ndarray
    ) -> torch.Tensor:
        """One token per row, also written to last_tokens[slots].

        logits: [>= N, vocab], any float dtype; rows beyond N are padding.
        slots, positions: int64 [N], the row's slot and the position its token will take.
        Returns int64 [N] on the device; -1 where the logits are NaN, or -inf all of them.
        """
        return self.launch(self.plan(slots, positions), logits)

    def plan(self, slots: np.ndarray, positions: np.ndarray) -> Draws:
        """The host's half of sample."""
        kinds, groups = self._kind[slots], []
        for kind in sorted(set(kinds.tolist())):
            rows = np.flatnonzero(kinds == kind)
            sampled = kind != GREEDY
            groups.append(
                DrawGroup(
                    kind=kind,
                    rows=rows,
                    has_min_p=sampled and bool(self._has_min_p[slots[rows]].any()),
                    typical=np.flatnonzero(self._is_typical[slots[rows]] & sampled),
                    has_top_k=bool(self._has_top_k[slots[rows]].any()),
                )
            )
        return Draws(slots, positions, tuple(groups))

    def launch(self, draws: Draws, logits: torch.Tensor) -> torch.Tensor:
        """The device's half of sample."""
        count = len(draws.slots)
        logits = logits[:count]
        slots, positions = to_device(np.stack((draws.slots, draws.positions)), self.device)
        if self.is_one_call and not draws.is_typical:
            return self.launch_all(logits, slots, positions)
        if len(draws.groups) == 1:
            tokens, peak = self._draw(draws.groups[0], logits, slots, positions)
        else:
            tokens = torch.empty(count, dtype=torch.int64, device=self.device)
            peak = torch.empty(count, device=self.device)
            for group in draws.groups:
                index = to_device(group.rows, self.device)
                tokens[index], peak[index] = self._draw(
                    group, logits[index], slots[index], positions[index]
                )
        return self._keep(slots, tokens, peak)

    @property
    def is_one_call(self) -> bool:
        """Whether there is a kernel for all rows, which needs nothing from the host."""
        return self._op is not None

    def launch_all(
        self, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """`launch` by that kernel; slots and positions [N] lie on the device, so that a CUDA graph
        can hold it. Rows of padding have the slot `padding_slot`."""
        assert self._op is not None
        rows = logits if logits.stride(1) == 1 else logits.contiguous()
        tokens, peak = self._op(rows, slots, positions, self._integers, self._floats)
        return self._keep(slots, tokens, peak)

    def _keep(self, slots: torch.Tensor, tokens: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
        self._newest[slots] = tokens
        return torch.where(peak.isfinite(), tokens, NO_TOKEN)

    def _draw(
        self,
        group: DrawGroup,
        logits: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens, and the rows' largest logits, which are NaN where any of a row is."""
        if group.kind == GREEDY:
            tokens = logits.argmax(-1)
            return tokens, logits.gather(1, tokens[:, None]).squeeze(1).float()
        seeds, top_k, _ = self._integers[:, slots]
        temperature, top_p, log_min_p, typical_p = self._floats[:, slots]
        if self.device.type == "cpu":
            parameters = zip(*self._floats[:, slots].tolist(), top_k.tolist(), strict=True)
            rows = zip(logits.float().numpy(), row_keys(seeds, positions).tolist(), strict=True)
            pairs = zip(rows, parameters, strict=True)
            drawn = [draw_row(*row, *values) for row, values in pairs]
            picked, peaks = zip(*drawn, strict=True)
            return torch.tensor(picked), torch.tensor(peaks)
        peak = logits.amax(-1).float()
        # Relative to the maximum, low temperatures keep their precision.
        scaled = (logits.float() - peak[:, None]).div_(temperature.float()[:, None])
        keys = row_keys(seeds, positions)
        if group.has_min_p:
            scaled.masked_fill_(scaled < log_min_p.float()[:, None], -torch.inf)
        if len(group.typical):
            rows = to_device(group.typical, self.device)
            typical = typical_mask(scaled[rows], typical_p[rows])
            scaled[rows] = scaled[rows].masked_fill_(~typical, -torch.inf)
            # top_k and top_p count from the likeliest that is left.
            scaled -= scaled.amax(-1, keepdim=True)
        if group.kind == PLAIN:
            return sample_plain(scaled, keys), peak
        tokens = sample_truncated(scaled, keys, top_k, top_p, has_top_k=group.has_top_k)
        return tokens, peak
