"""What an LLM does with its engine rather than with prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inlay.errors import OptionError, RequestError
from inlay.frontend import Frontend
from inlay.jobs import JobMaker
from inlay.prompts import Prompt, encode_prompt
from inlay.runtime.request import RequestOptions, check_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from typing_extensions import Self


class EngineControl:
    """Statistics, caches, traces, and the engine's end. All of it raises EngineError where the
    engine is dead or shut down."""

    _frontend: Frontend
    _maker: JobMaker
    _tokenizer: PreTrainedTokenizerBase | None

    def get_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer that turns prompts into ids and ids into text; None without one."""
        return self._tokenizer

    def abort(self, request_id: str | Sequence[str]) -> None:
        """End requests, of whatever call or thread; what came is kept, finish_reason is "abort".
        Nothing happens to those that are finished or unknown."""
        ids = [request_id] if isinstance(request_id, str) else request_id
        if not isinstance(ids, list | tuple) or not all(isinstance(one, str) for one in ids):
            raise RequestError(
                "request_id must be a text, as RequestHandle.request_id is, or a list of them;"
                f" given {request_id!r}"
            )
        for one in ids:
            self._frontend.abort(one)

    def get_stats(self) -> dict[str, Any]:
        """The executor's statistics since it started, and under "api" this side's: requests under
        way, and finished by reason."""
        processor = self._frontend.processor
        api = {
            "num_unfinished": processor.num_unfinished,
            "num_finished": dict(processor.num_finished),
        }
        return {**self._frontend.call("get_stats"), "api": api}

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes, pinned ones too; requests that run go on. Always True."""
        return self._frontend.call("reset_prefix_cache")

    def pin_prefix(self, prompt: Prompt, *, cache_salt: str | None = None) -> int:
        """Keep a prefix in the cache once a request has put it there; how many of its tokens are
        pinned, in whole blocks."""
        return self._frontend.call("pin_prefix", self._ids_of(prompt), _checked(cache_salt))

    def unpin_prefix(self, prompt: Prompt, *, cache_salt: str | None = None) -> int:
        """The opposite: how many tokens are no longer pinned."""
        return self._frontend.call("unpin_prefix", self._ids_of(prompt), _checked(cache_salt))

    def get_kv_events(self) -> list[dict[str, Any]]:
        """What happened to cached blocks since the last call; needs kv_events=True."""
        return self._frontend.call("get_kv_events")

    @contextmanager
    def trace(self, path: str | PathLike[str]) -> Iterator[None]:
        """Write what the engine does meanwhile as a Chrome trace, for ui.perfetto.dev.

        >>> with llm.trace("steps.json"): llm.generate(prompts)

        Raises OptionError where the file cannot be written, before anything is run.
        """
        try:
            Path(path).open("a").close()  # touch() is content with a directory
        except (OSError, TypeError) as error:
            raise OptionError(f"path {path} cannot be written: {error}") from error
        self._frontend.call("start_trace")
        try:
            yield
        finally:
            trace = self._frontend.call("stop_trace")
            Path(path).write_text(json.dumps(trace), encoding="utf-8")

    def restart(self) -> None:
        """Start the engine anew, also after its death; what is under way ends with an error.
        Raises what the constructor does."""
        self._frontend.restart()

    def shutdown(self) -> None:
        """End the engine and free its memory; what is under way ends with an error. Again:
        nothing happens."""
        self._frontend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()

    def _ids_of(self, prompt: Prompt) -> list[int]:
        token_ids = self._maker.encode(prompt, encode_prompt).token_ids
        check_vocabulary("token ids", token_ids, self._frontend.client.admission.limits.vocab_size)
        return [int(i) for i in token_ids]


def _checked(cache_salt: str | None) -> str | None:
    """Raises RequestError where that can be no salt."""
    return RequestOptions(cache_salt=cache_salt).cache_salt
