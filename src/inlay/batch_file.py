"""`LLM.batch`: prompts from a JSONL file, outputs into another, as often as it takes.

An output line is {"id": the input's or null, "line": its number from 1, "prompt_tokens": count,
"outputs": [{"text", "num_tokens", "finish_reason", "stop_reason"}, ...], "error": null}, or
{"id", "line", "error": why}. It is appended and flushed when its request finishes, so that a run
that is killed loses only what was under way. The next run drops a last line that was torn and lines
with errors, and does what has no line yet.
"""

from __future__ import annotations

import json
import os
import queue
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from inlay.errors import OptionError, RequestError
from inlay.handle import RequestHandle
from inlay.runtime.outputs import RequestOutput
from inlay.runtime.sampling_params import SamplingParams

PROMPTS = ("prompt", "messages", "prompt_token_ids")
SAMPLING = frozenset(field.name for field in fields(SamplingParams)) - {"logits_processors"}
"""What a line may say. Logits processors are code, which comes from the caller, not from data."""

Submit = Callable[[Any, bool, SamplingParams, Callable[[Any], None]], RequestHandle]
"""(prompt or messages, whether messages, parameters, what to call when finished)."""

_START = b'{"id": '
"""What an output line begins with."""

Key = tuple[str, Any]
"""("id", text or integer), or ("line", number) of a line without an id."""


@dataclass(frozen=True)
class BatchSummary:
    """num_done: outputs written. num_failed: lines with an error. num_skipped: done before."""

    num_done: int
    num_failed: int
    num_skipped: int


@dataclass(frozen=True)
class Line:
    """An input line; item, is_chat and params of one that is right."""

    number: int
    id: str | int | None
    item: Any
    is_chat: bool
    params: SamplingParams

    @property
    def key(self) -> Key:
        return key_of(self.id, self.number)


def run_batch(
    input_path: str | PathLike[str],
    output_path: str | PathLike[str],
    submit: Submit,
    params: SamplingParams,
    max_in_flight: int,
    use_tqdm: bool,
) -> BatchSummary:
    """See `LLM.batch`; at most max_in_flight requests are held at once."""
    source, target = Path(input_path), Path(output_path)
    try:
        # The input is opened first: where it cannot be, the output is left as it is.
        with (
            source.open(encoding="utf-8-sig", errors="surrogateescape") as lines,
            _bar(source, use_tqdm) as bar,
        ):
            if target.exists() and target.samefile(source):
                raise OptionError(f"batch would write over its input {source}: give another output")
            done = clean(target)
            with target.open("a", encoding="utf-8") as out:
                return _Run(out, bar, submit, params, max_in_flight, done).all(lines)
    except OSError as error:
        raise OptionError(f"batch cannot use {source} and {target}: {error}") from error


class _Run:
    """One pass over the input."""

    def __init__(
        self,
        out: TextIO,
        bar: tqdm,
        submit: Submit,
        params: SamplingParams,
        max_in_flight: int,
        done: set[Key],
    ) -> None:
        self._out, self._bar, self._submit, self._params = out, bar, submit, params
        self._max_in_flight, self._done = max_in_flight, done
        self._finished: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._under_way: dict[str, tuple[Line, RequestHandle]] = {}
        self._seen: set[Key] = set()
        self._num_done = self._num_failed = self._num_skipped = 0

    def all(self, lines: TextIO) -> BatchSummary:
        """Submit line after line, and write what finishes; whatever raises ends what is left."""
        try:
            for number, text in enumerate(lines, 1):
                if text.strip():
                    self._take(number, text)
                else:
                    self._bar.update()
                while len(self._under_way) >= self._max_in_flight or not self._finished.empty():
                    self._write_next()
            while self._under_way:
                self._write_next()
        finally:
            for _, handle in self._under_way.values():
                handle.abort()
        return BatchSummary(self._num_done, self._num_failed, self._num_skipped)

    def _take(self, number: int, text: str) -> None:
        given = id_of(text)
        key = key_of(given, number)
        try:
            if key in self._seen:
                raise RequestError(f"id {given!r} was given to a line before: give each its own")
            self._seen.add(key)
            if key in self._done:
                self._num_skipped += 1
                self._bar.update()
                return
            line = parse(number, text, self._params)
            handle = self._submit(
                line.item,
                line.is_chat,
                line.params,
                lambda state: self._finished.put(state.request_id),
            )
        except RequestError as error:
            self._write_error(given, number, str(error).removeprefix("prompt 0: "))
        else:
            self._under_way[handle.request_id] = line, handle

    def _write_next(self) -> None:
        line, handle = self._under_way.pop(self._finished.get(), (None, None))
        if line is None or handle is None:  # refused on its way, and told so
            return
        output = handle.result()
        if output.error is not None:
            name = type(output.error).__name__
            self._write_error(line.id, line.number, f"{name}: {output.error}")
            return
        self._num_done += 1
        self._write({"id": line.id, "line": line.number, **as_json(output), "error": None})

    def _write_error(self, given: str | int | None, number: int, error: str) -> None:
        self._num_failed += 1
        self._write({"id": given, "line": number, "error": error})

    def _write(self, content: dict[str, Any]) -> None:
        self._out.write(json.dumps(content) + "\n")
        self._out.flush()
        self._bar.update()


def clean(path: Path) -> set[Key]:
    """What an output file has done; lines with errors, and one that was torn, are dropped.

    OptionError, and the file is left as it is, where it holds anything else than outputs.
    """
    done: set[Key] = set()
    if not path.exists():
        return done
    kept, is_clean = path.with_name(path.name + ".tmp"), True
    with path.open("rb") as old, kept.open("wb") as new:
        for number, text in enumerate(old, 1):
            begins = text.startswith(_START) or _START.startswith(text)
            is_torn = begins and not text.endswith(b"\n")
            content = {} if is_torn else _object(text.decode(errors="replace")) or {}
            if not is_torn and not {"line", "error"} <= content.keys():
                os.remove(kept)
                raise OptionError(
                    f"line {number} of {path} is no output of batch, which would be lost: given"
                    f" {text[:80]!r}; give another output, or remove that file"
                )
            if content.get("error", "none") is not None:
                is_clean = False
                continue
            done.add(key_of(content.get("id"), content.get("line")))
            new.write(text)
    os.remove(kept) if is_clean else os.replace(kept, path)
    return done


def parse(number: int, text: str, params: SamplingParams) -> Line:
    """An input line; RequestError that says what is wrong with it."""
    content = _object(text)
    if content is None:
        raise RequestError(f"a line must be a JSON object; given {text.strip()[:200]!r}")
    given = content.pop("id", None)
    if given is not None and id_of(text) is None:
        raise RequestError(f"id must be a text or an integer; given {given!r}")
    names = [name for name in PROMPTS if name in content]
    if len(names) != 1:
        raise RequestError(
            f"a line must have one of {', '.join(PROMPTS)}; given {', '.join(names) or 'none'}"
        )
    item = content.pop(names[0])
    if unknown := sorted(set(content) - SAMPLING):
        raise RequestError(
            f"unknown field {unknown[0]!r}; allowed: id, {', '.join([*PROMPTS, *sorted(SAMPLING)])}"
        )
    if isinstance(content.get("logit_bias"), dict):  # JSON's keys are texts
        content["logit_bias"] = {_integer(key): v for key, v in content["logit_bias"].items()}
    if names[0] != "messages":
        item = {names[0]: item}
    return Line(number, given, item, names[0] == "messages", replace(params, **content))


def id_of(text: str) -> str | int | None:
    """A line's id; None where there is none, or none that can be one."""
    given = (_object(text) or {}).get("id")
    is_good = isinstance(given, str | int) and not isinstance(given, bool)
    return given if is_good else None


def key_of(given: str | int | None, number: Any) -> Key:
    """What a line is known by, in both files."""
    return ("line", number) if given is None else ("id", given)


def as_json(output: RequestOutput) -> dict[str, Any]:
    """A finished output, as a line holds it."""
    outputs = [
        {
            "text": one.text,
            "num_tokens": len(one.token_ids),
            "finish_reason": one.finish_reason,
            "stop_reason": one.stop_reason,
        }
        for one in output.outputs
    ]
    return {"prompt_tokens": len(output.prompt_token_ids), "outputs": outputs}


def _object(text: str) -> dict[str, Any] | None:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _integer(key: str) -> Any:
    return int(key) if key.lstrip("-").isdigit() else key


def _bar(source: Path, use_tqdm: bool) -> tqdm:
    """The lines are counted, so that the bar knows how far it is to go."""
    return tqdm(total=_count(source), desc="Batch", unit="line") if use_tqdm else tqdm(disable=True)


def _count(source: Path) -> int:
    with source.open("rb") as lines:
        return sum(1 for _ in lines)
