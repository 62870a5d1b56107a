"""Each token of a text, judged by engines and by their reference at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from inlay.backends.base import LoadedModel
from inlay.backends.step import StepRequest, build_step
from inlay.eval.reference import Reference, Rows
from inlay.eval.text import Window

ROW_BYTES = 64 << 20
"""Of one tensor of float32 logits; four such live at a time."""


@dataclass
class TokenScores:
    """What an engine and its reference said of each judged token, in the text's order.

    ours, theirs: negative log-likelihood in nats [n]; divergence: KL(reference || engine) in nats
    [n]; same: whether both like the same token best [n]; all float64 but the last. sizes: tokens
    of each window.
    """

    ours: list[torch.Tensor] = field(default_factory=list)
    theirs: list[torch.Tensor] = field(default_factory=list)
    divergence: list[torch.Tensor] = field(default_factory=list)
    same: list[torch.Tensor] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def add(self, log_p: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """log_p: the reference's log-probabilities [m, vocab] in float32; logits: the engine's."""
        log_q = logits.float().log_softmax(-1)
        places = targets[:, None]
        self.theirs.append(-log_p.gather(1, places)[:, 0].double())
        self.ours.append(-log_q.gather(1, places)[:, 0].double())
        self.same.append(log_p.argmax(-1) == log_q.argmax(-1))
        sums = (log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64)
        self.divergence.append(sums.clamp_min(0))


class PagedRows:
    """A loaded engine's logits of one window at a time, through its paged KV cache."""

    def __init__(self, model: LoadedModel, longest: int, kv_cache_dtype: str) -> None:
        """longest: tokens of the longest window."""
        self.model = model
        self._num_blocks = -(-longest // model.limits.block_size)
        model.allocate_kv_cache(self._num_blocks, kv_cache_dtype)

    def run(self, window: Window, begin: int, end: int, wanted: bool) -> torch.Tensor:
        """Run tokens [begin, end) of a window, those before having been run; their logits
        [end - begin, vocab] where they are wanted."""
        tables = [list(range(self._num_blocks))] * len(self.model.kv_groups)
        ids = window.token_ids[begin:end]
        request = StepRequest(ids, begin, tables, needs_logits=wanted, all_logits=wanted)
        step = build_step([request], self.model.limits.block_size)
        logits = self.model.forward(step.to(self.model.device))
        return logits[: step.num_logits].float().cpu()


def measure(
    engines: Sequence[PagedRows],
    reference: Reference,
    windows: Sequence[Window],
    progress: Callable[[int, int], None],
) -> list[TokenScores]:
    """Teacher-forced scores of all windows, for each engine; progress gets the windows done and
    their number. The reference is run once; a few rows of logits are in memory at a time."""
    scores = [TokenScores() for _ in engines]
    limits = [engine.model.limits for engine in engines]
    most = min(limit.max_num_tokens for limit in limits)
    most_rows = max(min(most, ROW_BYTES // (4 * max(x.vocab_size for x in limits))), 1)
    for done, (window, rows) in enumerate(zip(windows, reference.over(windows), strict=True)):
        _measure_window(engines, scores, window, rows, most, most_rows)
        progress(done + 1, len(windows))
    return scores


def _measure_window(
    engines: Sequence[PagedRows],
    scores: Sequence[TokenScores],
    window: Window,
    rows: Rows,
    most: int,
    most_rows: int,
) -> None:
    length, num = len(window.token_ids), window.num_judged
    targets = torch.tensor(list(window.targets))
    for engine in engines:
        for begin, end in pieces(0, length - num, most):
            engine.run(window, begin, end, wanted=False)
    for begin, end in pieces(0, num, most_rows):
        log_p = rows(begin, end).log_softmax(-1)
        for engine, score in zip(engines, scores, strict=True):
            logits = engine.run(window, length - num + begin, length - num + end, wanted=True)
            score.add(log_p, logits, targets[begin:end])
    for score in scores:
        score.sizes.append(num)


def pieces(begin: int, end: int, most: int) -> Iterator[tuple[int, int]]:
    """[begin, end) cut into the fewest parts of at most so many."""
    count = -(-(end - begin) // most)
    for i in range(count):
        size = end - begin
        yield begin + size * i // count, begin + size * (i + 1) // count
