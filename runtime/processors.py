"""Logits processors of the user's own: of one request, or of the whole engine.

One request's (`SamplingParams.logits_processors`) is made once for each of its sequences and called

    processor(prompt_token_ids: list[int], output_token_ids: list[int], logits [vocab]) -> [vocab]

for every token, with float32 logits that it may change in place. The engine's are made once, with
(vocab_size, device, **arguments), and called for all rows of a step:

    processor.apply(logits [N, vocab], rows: Sequence[Request]) -> [N, vocab]

They run after penalties, biases and bans, and before temperature and truncation: the engine's
first. One that raises, or gives something that cannot be sampled from, fails its own requests only.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from inlay.errors import OptionError, RequestError
from inlay.runtime.request import Request
from inlay.runtime.sampling_params import Processor, SamplingParams


def check_processors(params: SamplingParams, in_process: bool) -> None:
    """RequestError where a request's processors cannot be found, or are callables elsewhere.

    in_process: whether the executor runs in this process; a callable cannot go to another one.
    """
    for entry in params.processors:
        if isinstance(entry, str):
            _resolve(entry)
        elif not in_process:
            raise RequestError(
                f"logits_processors: the executor runs in another process, where {entry!r} cannot "
                'go: name a class as "module:Class", or use in_process=True'
            )


def _resolve(entry: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The class of "module:Class" or "module:Class:{JSON}" and its arguments; or RequestError."""
    module, _, rest = entry.partition(":")
    name, _, arguments = rest.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        keywords = json.loads(arguments or "{}")
    # Importing runs the user's code, which may raise anything.
    except Exception as error:
        raise RequestError(
            f"logits processor {entry!r} cannot be had ({type(error).__name__}: {error}): give "
            '"module:Class" or "module:Class:{JSON arguments}" of a module on the Python path'
        ) from error
    if not isinstance(found, type) or not isinstance(keywords, dict):
        raise RequestError(f"logits processor {entry!r} is not a class with keyword arguments")
    return found, keywords


def make_processors(params: SamplingParams) -> tuple[tuple[str, Processor], ...]:
    """A sequence's own, with their names; RequestError where one cannot be made."""
    return tuple((_name(entry), _make(entry)) for entry in params.processors)


def _make(entry: str | Processor) -> Processor:
    if not isinstance(entry, str):
        return entry
    found, keywords = _resolve(entry)
    try:
        return found(**keywords)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit() too is the fault of this request alone
        raise failure(entry, f"could not be made, {type(error).__name__}: {error}") from error


def _name(entry: object) -> str:
    return entry if isinstance(entry, str) else getattr(entry, "__qualname__", repr(entry))


def failure(name: str, what: str) -> RequestError:
    """The error of a request whose processor did not do its work."""
    return RequestError(f"logits processor {name!r} {what}")


def checked_call(
    name: str, call: Callable[[torch.Tensor], Any], logits: torch.Tensor
) -> torch.Tensor:
    """What a processor makes of a copy of logits; RequestError where that is no such tensor."""
    try:
        result = call(logits.clone())
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit() too is the fault of this request alone
        raise failure(name, f"raised {type(error).__name__}: {error}") from error
    if not isinstance(result, torch.Tensor):
        raise failure(name, f"returned {type(result).__name__}, not a tensor")
    right = result.shape == logits.shape and result.dtype.is_floating_point
    if not right or result.device != logits.device or result.layout != logits.layout:
        wanted = f"{list(logits.shape)} {logits.dtype} {logits.layout} on {logits.device}"
        given = f"{list(result.shape)} {result.dtype} {result.layout} on {result.device}"
        raise failure(name, f"returned {given}; must be {wanted}")
    return result.to(logits.dtype)


def can_be_sampled(logits: torch.Tensor) -> torch.Tensor:
    """Whether rows hold neither NaN nor +inf, and not -inf alone: [..., vocab] -> bool [...]."""
    return logits.amax(-1).isfinite()


def _apply(member: Any, rows: Sequence[Request], logits: torch.Tensor) -> Any:
    return member.apply(logits, rows)


@dataclass(frozen=True)
class BatchedProcessors:
    """The engine's processors."""

    members: tuple[tuple[str, Any], ...]

    @classmethod
    def make(
        cls, entries: Sequence[str], vocab_size: int, device: torch.device
    ) -> BatchedProcessors:
        """OptionError where one cannot be made."""
        members = []
        for entry in entries:
            try:
                found, keywords = _resolve(entry)
                member = found(vocab_size, device, **keywords)
                if not callable(getattr(member, "apply", None)):
                    raise TypeError("it has no method apply(logits, rows)")
            except Exception as error:
                raise OptionError(f"processors: {entry!r} cannot be made: {error}") from error
            members.append((entry, member))
        return cls(tuple(members))

    def apply(
        self, logits: torch.Tensor, rows: Sequence[Request]
    ) -> tuple[torch.Tensor, list[tuple[str, torch.Tensor]]]:
        """Logits [N, vocab], and after each processor, by name, which rows can be sampled.

        RequestError where one raises or gives no such tensor.
        """
        sound = []
        for name, member in self.members:
            before = logits
            logits = checked_call(name, partial(_apply, member, rows), before)
            # Rows that were wrong already are not this one's fault.
            sound.append((name, can_be_sampled(logits) | ~can_be_sampled(before)))
        return logits, sound
