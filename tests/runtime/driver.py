"""An executor with a real model: requests in, all that came out, and the logits behind it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from inlay.backends.base import LoadedModel
from inlay.runtime.config import ExecutorConfig
from inlay.runtime.executor import Executor
from inlay.runtime.launcher import Launcher
from inlay.runtime.outputs import StepOutput
from inlay.runtime.request import NewRequest, Request, RequestOptions
from inlay.runtime.sampling import Sampled, SamplingPlan
from inlay.runtime.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
OPTIONS = RequestOptions()


class Driver:
    """One executor and what it did; a model has one at a time, whose cache it holds.

    prompts, outputs: of each request. logits: (request, sequence) -> number of tokens before the
    sampled one -> a copy of the row that it was sampled from.
    """

    def __init__(
        self, model: LoadedModel, launcher: Launcher | None = None, **options: Any
    ) -> None:
        small = {"max_num_seqs": 8, "kv_cache_tokens": 2048, "debug": True}
        config = ExecutorConfig(**{**small, **options})
        self.executor = Executor(model, config, launcher)
        self.prompts: dict[str, list[int]] = {}
        self.outputs: dict[str, list[StepOutput]] = defaultdict(list)
        self.logits: dict[tuple[str, int], dict[int, torch.Tensor]] = defaultdict(dict)
        self._record(self.executor)

    def _record(self, executor: Executor) -> None:
        stage = executor.sampling
        plan, launch = stage.plan, stage.launch
        planned: dict[int, list[tuple[str, int, int, int]]] = {}

        def planning(
            rows: Sequence[tuple[Request, int]], new: Sequence[Request] = ()
        ) -> SamplingPlan:
            made = plan(rows, new)
            planned[id(made)] = [(r.request_id, r.index, len(r.token_ids), row) for r, row in rows]
            return made

        def launching(
            made: SamplingPlan, logits: torch.Tensor, tokens: torch.Tensor | None = None
        ) -> Sampled:
            for name, index, position, row in planned.pop(id(made)):
                self.logits[name, index][position] = logits[row].clone()
            return launch(made, logits, tokens)

        stage.plan, stage.launch = planning, launching  # type: ignore[method-assign]

    def add(
        self,
        name: str,
        prompt: Sequence[int],
        params: SamplingParams = GREEDY,
        options: RequestOptions = OPTIONS,
        **changes: Any,
    ) -> None:
        """Queue a request; changes to params."""
        self.prompts[name] = list(prompt)
        request = NewRequest(name, list(prompt), replace(params, **changes), options)
        self.executor.add_request(request)

    def step(self) -> None:
        for output in self.executor.step():
            assert output.error is None, output.error
            self.outputs[output.request_id].append(output)

    def run(self) -> None:
        """Step until nothing is left."""
        while self.executor.has_unfinished:
            self.step()

    def tokens(self, name: str, index: int = 0) -> list[int]:
        mine = [output for output in self.outputs[name] if output.index == index]
        return [token for output in mine for token in output.token_ids]

    def num_cached_tokens(self, name: str) -> int:
        return self.outputs[name][0].num_cached_tokens

    def rows(self, name: str, index: int = 0) -> torch.Tensor:
        """All logits that a sequence's tokens were sampled from, in order: [tokens, vocab]."""
        rows = self.logits[name, index]
        return torch.stack([rows[position] for position in sorted(rows)])

    def close(self) -> None:
        self.executor.shutdown()
