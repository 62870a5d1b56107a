"""`LLM`: generate text from prompts, embed them and score them, offline."""

from __future__ import annotations

import queue
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any

from tqdm import tqdm

from inlay.aliases import CALL, refuse_in_call
from inlay.batch_file import BatchSummary, run_batch
from inlay.control import EngineControl
from inlay.embedding import (
    EMBED_PARAMS,
    SCORE_PARAMS,
    Pooling,
    default_pooling,
    embedding_of,
    score_of,
)
from inlay.errors import RequestError, UnsupportedModelError
from inlay.frontend import Frontend
from inlay.handle import RequestHandle
from inlay.jobs import Job, JobMaker, Params
from inlay.model_source import default_sampling, llm_options, open_engine, pooling_config
from inlay.prompts import (
    EncodedPrompt,
    Prompt,
    as_conversations,
    as_prompt_list,
    encode_prompt,
    render_chat,
)
from inlay.runtime.output_state import OutputState
from inlay.runtime.outputs import EmbeddingRequestOutput, RequestOutput, ScoreOutput
from inlay.runtime.sampling_params import SamplingParams

Message = Mapping[str, Any]


class LLM(EngineControl):
    """A model that is ready to generate.

    >>> with LLM("demo") as llm:
    ...     outputs = llm.generate(["Hello, my name is"], SamplingParams(max_tokens=32))
    >>> print(outputs[0].outputs[0].text)

    Requests of all calls, streams and threads share one engine, which runs in a process of its
    own. Thread-safe. A request that fails does not raise and harms no other: its finish_reason is
    "error" and `RequestOutput.error` says why. EngineError is raised where the engine died or was
    shut down; `restart` starts it again.
    """

    def __init__(
        self,
        model: Any,
        *,
        tokenizer: Any = None,
        in_process: bool = False,
        num_threads: int | None = None,
        seed: int | None = None,
        max_queue_size: int | None = None,
        **options: Any,
    ) -> None:
        """Load a model, and compile it first where need be.

        model: an engine, an artifact's directory, or whatever `compile_model` takes.
        tokenizer: a tokenizer, or where to load one from; None takes the model's own.
        in_process: run the engine in a thread of this process, for debugging and for logits
            processors that are plain callables.
        num_threads: of the engine's process; None leaves it to OMP_NUM_THREADS, else to the
            physical cores that this process may use (affinity and CPU quota count).
        seed: requests without a seed get theirs from this one, in the order they come.
        max_queue_size: requests under way at once; beyond it `generate_async` and streams raise
            RequestError, while calls that wait for their outputs wait for room too.
        options: the fields of `ExecutorConfig`; for a model that is still to be compiled, those of
            them that are no sizes, and the options of `compile_model`. vLLM's and TensorRT-LLM's
            names are taken too, or refused with what to give instead: see `aliases.py`.

        Raises OptionError, and what `compile_model` and `Engine.load` raise.
        """
        chosen = llm_options(options, seed=seed, max_queue_size=max_queue_size)
        engine, self._tokenizer, config = open_engine(model, tokenizer, chosen)
        self._is_encoder = bool(getattr(engine, "is_encoder", False))
        self._model_type = engine.model_config.get("model_type")
        self._pooling_config = pooling_config(engine)
        self._maker = JobMaker(self._tokenizer, default_sampling(engine), seed)
        self._frontend = Frontend(
            engine,
            config,
            self._tokenizer,
            in_process=in_process,
            num_threads=num_threads,
            max_queue_size=max_queue_size,
        )
        weakref.finalize(self, self._frontend.close_soon).atexit = False

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
        priority: int | Sequence[int] = 0,
        timeout: float | Sequence[float | None] | None = None,
        cache_salt: str | Sequence[str | None] | None = None,
        cache_priority: int | Sequence[int] = 0,
        **others: Any,
    ) -> list[RequestOutput]:
        """Complete prompts; returns the outputs in the prompts' order.

        prompts: text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}, or a
            list of those. sampling_params: one for all, one for each, or None for the defaults of
            the model's generation config. use_tqdm: show a progress bar.
        priority, timeout, cache_salt, cache_priority: of `RequestOptions`, one for all or a list
            of one for each: lower priorities run first; after timeout seconds a request ends with
            what it has; prefixes are shared within a salt, and kept longer by cache_priority.

        Raises RequestError with the index of the first bad prompt, before anything is run. An
        exception on the way, Ctrl-C too, ends all of this call's requests; the LLM stays usable.
        """
        refuse_in_call(others, "generate")
        jobs = self._jobs(
            as_prompt_list(prompts),
            encode_prompt,
            sampling_params,
            priority=priority,
            timeout=timeout,
            cache_salt=cache_salt,
            cache_priority=cache_priority,
        )
        return [handle.result() for handle in self._finish(jobs, use_tqdm)]

    def generate_async(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        streaming: bool = False,
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str | None = None,
        cache_priority: int = 0,
        **others: Any,
    ) -> RequestHandle:
        """Queue one prompt and return at once: see `RequestHandle`; arguments as in `generate`.

        streaming: give an output whenever text has come, not only the last. Raises RequestError
        for a bad prompt, and where max_queue_size requests are under way.
        """
        refuse_in_call(others, "generate_async")
        (job,) = self._jobs(
            [prompt],
            encode_prompt,
            sampling_params,
            priority=priority,
            timeout=timeout,
            cache_salt=cache_salt,
            cache_priority=cache_priority,
        )
        return self._frontend.submit(job, self, streaming=streaming)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
        priority: int | Sequence[int] = 0,
        timeout: float | Sequence[float | None] | None = None,
        cache_salt: str | Sequence[str | None] | None = None,
        cache_priority: int | Sequence[int] = 0,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of a list of them; otherwise as `generate`.

        messages: [{"role": "user", "content": "..."}, ...].
        template_options: go to the tokenizer's apply_chat_template (tools=, chat_template=, ...).
        """
        jobs = self._jobs(
            as_conversations(messages),
            self._renderer(template_options, "chat"),
            sampling_params,
            priority=priority,
            timeout=timeout,
            cache_salt=cache_salt,
            cache_priority=cache_priority,
        )
        return [handle.result() for handle in self._finish(jobs, use_tqdm)]

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, **options: Any
    ) -> Iterator[RequestOutput]:
        """Complete one prompt, giving an output whenever text has come.

        Each output holds everything so far; `outputs[0].delta` is the text that is new, in whole
        characters, and empty in the last output only. The prompt is checked and queued now;
        closing or dropping the iterator ends the request. options: as in `generate_async`, which
        this is short for.
        """
        return _pieces(self.generate_async(prompt, sampling_params, streaming=True, **options))

    def stream_chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str | None = None,
        cache_priority: int = 0,
        **template_options: Any,
    ) -> Iterator[RequestOutput]:
        """Answer one conversation, as `stream` does; arguments as in `chat`."""
        (job,) = self._jobs(
            [messages],
            self._renderer(template_options, "stream_chat"),
            sampling_params,
            priority=priority,
            timeout=timeout,
            cache_salt=cache_salt,
            cache_priority=cache_priority,
        )
        return _pieces(self._frontend.submit(job, self, streaming=True))

    def batch(
        self,
        input_path: str | PathLike[str],
        output_path: str | PathLike[str],
        sampling_params: SamplingParams | None = None,
        *,
        use_tqdm: bool = True,
    ) -> BatchSummary:
        """Complete the prompts of a JSONL file into another; run again, it does what is left.

        A line is {"prompt" | "messages" | "prompt_token_ids": ..., "id": text or integer, if any,
        and fields of SamplingParams}; sampling_params: what those fields change. Each output is
        a line with the "id" and the number of its "line", written as soon as it is finished, not
        in the order of the input; see `batch_file.py`. A line that is wrong, or whose request
        fails, gives a line with an "error", and is tried again the next time.

        Raises OptionError where a file cannot be read or written, EngineError as `generate`.
        """
        self._require_decoder("batch")
        most = self._frontend.processor.max_queue_size
        limit = 4 * self._frontend.client.admission.limits.max_num_seqs
        return run_batch(
            input_path,
            output_path,
            self._submit_line,
            sampling_params or self._maker.default_params,
            min(limit, most or limit),
            use_tqdm,
        )

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: Pooling | None = None,
        normalize: bool = True,
        use_tqdm: bool = True,
        priority: int | Sequence[int] = 0,
        timeout: float | Sequence[float | None] | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """Pooled final hidden states of prompts, by a decoder or an encoder.

        pooling: "mean", "cls" (the first token) or "last"; None takes what the checkpoint's
            1_Pooling/config.json says, else "mean" for encoders and "last" for decoders.
        normalize: divide each by its length.
        """
        if pooling is None:
            pooling = default_pooling(self._pooling_config, self._is_encoder)
        jobs = self._maker.make(
            as_prompt_list(prompts),
            encode_prompt,
            self._frontend.client.admission,
            EMBED_PARAMS,
            pooling=pooling,
            normalize=normalize,
            priority=priority,
            timeout=timeout,
        )
        return [embedding_of(h.finished_state()) for h in self._finish(jobs, use_tqdm, "Embedding")]

    def score(
        self, prompts: Prompt | Sequence[Prompt], *, use_tqdm: bool = True
    ) -> list[ScoreOutput]:
        """Log probabilities of each token of given texts, or token ids, behind the first.

        A tokenizer that begins texts with a token of its own, as Llama's does, has all of a text
        scored; else the text's first token has nothing before it.
        """
        jobs = self._jobs(as_prompt_list(prompts), encode_prompt, SCORE_PARAMS)
        for index, job in enumerate(jobs):
            if len(job.token_ids) < 2:
                raise RequestError(
                    f"prompt {index}: a score needs two tokens, since the first has nothing before"
                    f" it; given {job.token_ids}: put the beginning-of-sequence token before it"
                )
        return [score_of(h.finished_state()) for h in self._finish(jobs, use_tqdm, "Scoring")]

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation config recommends: what None stands for."""
        return self._maker.default_params

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, as `generate` takes it."""
        return self._maker.tokenize(text, add_special_tokens)

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of token ids."""
        return self._maker.detokenize(token_ids, skip_special_tokens)

    def _jobs(
        self,
        items: Sequence[Any],
        encode: Callable[..., EncodedPrompt],
        params: Params,
        **options: Any,
    ) -> list[Job]:
        self._require_decoder("generate")
        return self._maker.make(items, encode, self._frontend.client.admission, params, **options)

    def _require_decoder(self, method: str) -> None:
        if self._is_encoder:
            raise UnsupportedModelError(
                f"this {self._model_type} is an encoder: it does not {method}, it embeds: use"
                " embed(). Where the checkpoint is a decoder's, set is_decoder=True in its config"
            )

    def _renderer(
        self, template_options: dict[str, Any], method: str
    ) -> Callable[..., EncodedPrompt]:
        given = {name: value for name, value in template_options.items() if name in CALL}
        refuse_in_call(given, method)
        rest = {name: value for name, value in template_options.items() if name not in CALL}
        more = rest.pop("chat_template_kwargs", None) or {}  # vLLM's way to give them
        if not isinstance(more, Mapping):
            raise RequestError(f"chat_template_kwargs must be None or a dict; given {more!r}")
        rest |= more
        return partial(render_chat, **rest)

    def _submit_line(
        self, item: Any, is_chat: bool, params: SamplingParams, on_finish: Callable[[Any], None]
    ) -> RequestHandle:
        (job,) = self._jobs([item], render_chat if is_chat else encode_prompt, params)
        return self._frontend.submit(job, self, wait=True, on_finish=on_finish)

    def _finish(
        self, jobs: Sequence[Job], use_tqdm: bool, what: str = "Generating"
    ) -> list[RequestHandle]:
        """Run jobs and wait for them; whatever interrupts this aborts those left."""
        finished: queue.SimpleQueue[OutputState] = queue.SimpleQueue()
        handles: list[RequestHandle] = []
        with tqdm(total=len(jobs), desc=what, disable=not use_tqdm or not jobs) as bar:
            try:
                progress = _Progress(bar)
                for job in jobs:
                    handles.append(
                        self._frontend.submit(job, self, wait=True, on_finish=finished.put)
                    )
                    while not finished.empty():
                        progress.show(finished.get())
                while progress.num_finished < len(jobs):
                    progress.show(finished.get())
            finally:
                for handle in handles:
                    if not handle.done:
                        handle.abort()
        return handles


class _Progress:
    """Shows finished requests, and output tokens per second, on a bar."""

    def __init__(self, bar: tqdm) -> None:
        self.num_finished = self._num_tokens = 0
        self._bar, self._start = bar, time.perf_counter()

    def show(self, state: OutputState) -> None:
        self.num_finished += 1
        self._num_tokens += sum(len(one.token_ids) for one in state.sequences)
        rate = self._num_tokens / (time.perf_counter() - self._start)
        self._bar.set_postfix_str(f"{rate:.1f} output tok/s", refresh=False)
        self._bar.update()


def _pieces(handle: RequestHandle) -> Iterator[RequestOutput]:
    try:
        yield from handle
    finally:
        handle.abort()
