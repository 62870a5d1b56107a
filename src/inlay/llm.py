"""`LLM`: generate text from prompts, offline."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from inlay.errors import RequestError, UnsupportedModelError
from inlay.model_source import default_sampling, open_engine
from inlay.prompts import (
    EncodedPrompt,
    Prompt,
    as_conversations,
    as_prompt_list,
    encode_bad_words,
    encode_prompt,
    render_chat,
)
from inlay.runtime.executor import Executor
from inlay.runtime.output_processor import OutputProcessor, OutputState
from inlay.runtime.outputs import RequestOutput
from inlay.runtime.request import NewRequest
from inlay.runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Params = SamplingParams | Sequence[SamplingParams] | None
Message = Mapping[str, Any]


@dataclass(frozen=True)
class _Job:
    """A prompt that has passed every check."""

    text: str | None
    token_ids: list[int]
    params: SamplingParams


class LLM:
    """A model that is ready to generate.

    >>> llm = LLM("demo")
    >>> outputs = llm.generate(["Hello, my name is"], SamplingParams(max_tokens=32))
    >>> print(outputs[0].outputs[0].text)

    Requests of all calls and streams share one executor, step by step. Not thread-safe.
    """

    def __init__(self, model: Any, *, tokenizer: Any = None, **options: Any) -> None:
        """Load a model, and compile it first where need be.

        model: an engine, an artifact's directory, or whatever `compile_model` takes.
        tokenizer: a tokenizer, or where to load one from; None takes the model's own.
        options: the fields of `ExecutorConfig`; for a model that is still to be compiled,
            kv_cache_tokens, kv_cache_memory, debug, and the options of `compile_model`.

        Raises OptionError, and what `compile_model` and `Engine.load` raise.
        """
        engine, self._tokenizer, config = open_engine(model, tokenizer, options)
        if getattr(engine, "is_encoder", False):
            raise UnsupportedModelError(
                f"this {engine.model_config['model_type']} is an encoder: it does not generate; "
                "its hidden states are what compile_model(...).load_model().forward gives. Where "
                "the checkpoint is a decoder's, set is_decoder=True in its config"
            )
        self._default_params = default_sampling(engine)
        self._executor = Executor(engine.load_model(), config)
        self._processor = OutputProcessor(self._tokenizer)
        self._request_ids = map(str, itertools.count())

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts; returns the outputs in the prompts' order.

        prompts: text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}, or a
            list of those. sampling_params: one for all, one for each, or None for the defaults of
            the model's generation config. use_tqdm: show a progress bar.

        Raises RequestError with the index of the first bad prompt, before anything is run. An
        exception on the way, Ctrl-C too, ends all of this call's requests; the LLM stays usable.
        """
        encode = partial(encode_prompt, tokenizer=self._tokenizer)
        return self._run(self._jobs(as_prompt_list(prompts), encode, sampling_params), use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of a list of them; otherwise as `generate`.

        messages: [{"role": "user", "content": "..."}, ...].
        template_options: go to the tokenizer's apply_chat_template (tools=, chat_template=, ...).
        """
        encode = partial(render_chat, tokenizer=self._tokenizer, **template_options)
        return self._run(self._jobs(as_conversations(messages), encode, sampling_params), use_tqdm)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Complete one prompt, giving an output whenever tokens have come.

        Each output holds everything so far; `outputs[0].delta` is the text that is new, in whole
        characters. The prompt is checked now and runs while the iterator is read; closing the
        iterator ends the request. Raises RequestError as `generate` does.
        """
        encode = partial(encode_prompt, tokenizer=self._tokenizer)
        return self._stream(self._jobs([prompt], encode, sampling_params)[0])

    def stream_chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        **template_options: Any,
    ) -> Iterator[RequestOutput]:
        """Answer one conversation, as `stream` does."""
        encode = partial(render_chat, tokenizer=self._tokenizer, **template_options)
        return self._stream(self._jobs([messages], encode, sampling_params)[0])

    def get_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer that turns prompts into ids and ids into text; None without one."""
        return self._tokenizer

    def _jobs(
        self, items: Sequence[Any], encode: Callable[[Any], EncodedPrompt], params: Params
    ) -> list[_Job]:
        jobs = []
        for index, one in enumerate(self._params_for_each(params, len(items))):
            try:
                prompt = encode(items[index])
                self._processor.check_params(one)
                params_in_ids = encode_bad_words(one, self._tokenizer)
                token_ids = self._executor.admission.check(prompt.token_ids, params_in_ids)
            except RequestError as error:
                raise RequestError(f"prompt {index}: {error}") from error
            jobs.append(_Job(prompt.text, token_ids, params_in_ids))
        return jobs

    def _params_for_each(self, params: Params, count: int) -> Sequence[SamplingParams]:
        if params is None:
            return [self._default_params] * count
        if isinstance(params, SamplingParams):
            return [params] * count
        if (
            not isinstance(params, list | tuple)
            or len(params) != count
            or not all(isinstance(one, SamplingParams) for one in params)
        ):
            raise RequestError(
                f"sampling_params must be a SamplingParams, or a list of {count} of them, one for"
                f" each prompt; given {params!r}"
            )
        return params

    def _run(self, jobs: Sequence[_Job], use_tqdm: bool) -> list[RequestOutput]:
        if not jobs:
            return []
        states: list[OutputState] = []
        try:
            for job in jobs:
                self._submit(job, states)
            with tqdm(total=len(jobs), desc="Generating", disable=not use_tqdm) as bar:
                self._finish_all(states, bar)
        finally:
            for state in states:
                self._abort(state)
        return [state.snapshot() for state in states]

    def _finish_all(self, states: Sequence[OutputState], bar: tqdm) -> None:
        unfinished = {state.request_id for state in states}
        start, num_tokens = time.perf_counter(), 0
        while unfinished:
            for state in self._step():
                if not state.finished or state.request_id not in unfinished:
                    continue
                if state.error is not None:
                    raise state.error
                unfinished.remove(state.request_id)
                num_tokens += len(state.token_ids)
                rate = num_tokens / (time.perf_counter() - start)
                bar.set_postfix_str(f"{rate:.1f} output tok/s", refresh=False)
                bar.update()

    def _stream(self, job: _Job) -> Iterator[RequestOutput]:
        states: list[OutputState] = []
        try:
            self._submit(job, states)
            state, num_seen = states[0], 0
            while True:
                if state.error is not None:
                    raise state.error
                if len(state.token_ids) > num_seen or state.finished:
                    num_seen = len(state.token_ids)
                    output = state.snapshot()
                    yield output
                    if output.finished:
                        return
                else:
                    self._step()
        finally:
            for state in states:
                self._abort(state)

    def _submit(self, job: _Job, states: list[OutputState]) -> None:
        """Queue a job; its state is listed first, so that no interrupt can lose it."""
        request_id = next(self._request_ids)
        states.append(self._processor.add(request_id, job.text, job.token_ids, job.params))
        self._executor.add_request(NewRequest(request_id, job.token_ids, job.params))

    def _step(self) -> list[OutputState]:
        assert self._executor.has_unfinished, "a request is awaited that the executor lost"
        changed = self._processor.process(self._executor.step())
        for state in changed:
            if state.finished:
                self._executor.abort(state.request_id)
        return changed

    def _abort(self, state: OutputState) -> None:
        """End a request wherever it still is; nothing happens if it is finished."""
        self._executor.abort(state.request_id)
        self._processor.abort(state.request_id)
