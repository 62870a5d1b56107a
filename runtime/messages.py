"""What the API's side and the executor's tell each other, and how it crosses a process border.

On the wire a message is one byte that says its kind and msgpack behind it (msgspec, imported when
first used: nothing here is needed `in_process`). There is no pickle, and tensors do not cross.
Errors cross as class name, message and traceback; see `rebuild_error`.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import inlay.errors
from inlay.errors import EngineError, InlayError, RequestError
from inlay.runtime.outputs import StepOutput
from inlay.runtime.request import NewRequest, RequestOptions
from inlay.runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from inlay.runtime.admission import Admission


@dataclass(frozen=True)
class Init:
    """The first message to a worker: which artifact to load, and the executor's options."""

    path: str
    backend: str
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Add:
    """Run a request."""

    request: NewRequest


@dataclass(frozen=True)
class Abort:
    """End a request, or one of its sequences; nobody waits for an answer."""

    request_id: str
    index: int | None = None


@dataclass(frozen=True)
class Call:
    """Call a control method of the executor; the Reply has the same number."""

    number: int
    method: str
    args: Sequence[Any] = ()


@dataclass(frozen=True)
class Stop:
    """End the loop; what is unfinished is dropped."""


@dataclass(frozen=True)
class Ready:
    """The worker has loaded its model."""

    admission: Admission


@dataclass(frozen=True)
class Failed:
    """The worker could not load its model, or cannot go on; it ends."""

    error: BaseException


@dataclass(frozen=True)
class Outputs:
    """What a step gave."""

    outputs: list[StepOutput]


@dataclass(frozen=True)
class Reply:
    """What a Call returned or raised."""

    number: int
    value: Any = None
    error: BaseException | None = None


Message = Init | Add | Abort | Call | Stop | Ready | Failed | Outputs | Reply
KINDS: tuple[type[Message], ...] = (
    Init, Add, Abort, Call, Stop, Ready, Failed, Outputs, Reply,
)  # fmt: skip


class WorkerError(Exception):
    """The cause of an error that came from a worker: its text is the traceback there."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def encode(message: Message) -> bytes:
    """One frame; RequestError where the message holds something that is no plain data."""
    try:
        return bytes([KINDS.index(type(message))]) + _encoder().encode(message)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise RequestError(
            f"this cannot be sent to the engine's process: {error}. Plain data can (numbers up to"
            " 64 bits, text, lists, dicts); with in_process=True everything can"
        ) from error


def decode(frame: bytes) -> Message:
    """The message of a frame; lists of requests come back as the tuples that they were."""
    return _decoder(frame[0])(memoryview(frame)[1:])


def rebuild_error(name: str, message: str, trace: str) -> InlayError:
    """The error of that class of inlay.errors, else an EngineError that names the class."""
    cls = getattr(inlay.errors, name, None)
    if not (isinstance(cls, type) and issubclass(cls, InlayError)):
        cls, message = EngineError, f"{name}: {message}" if message else name
    error = cls(message)
    error.__cause__ = WorkerError(trace)
    return error


@cache
def _encoder() -> Any:
    import msgspec

    return msgspec.msgpack.Encoder(enc_hook=_encode_other)


@cache
def _decoder(number: int) -> Callable[[memoryview], Message]:
    """How the bytes behind a kind's number become a message of it."""
    import msgspec

    kind = KINDS[number]
    if kind is Add:
        # Untyped: which types parameters may have is theirs to check, in one place.
        plain = msgspec.msgpack.Decoder()
        return lambda data: Add(_new_request(plain.decode(data)["request"]))
    if kind is Ready:
        # Late: the limits' module imports torch, which a worker does only once it listens.
        from inlay.runtime.admission import Admission

        ready = msgspec.msgpack.Decoder(dict[str, Admission])
        return lambda data: Ready(**ready.decode(data))
    return msgspec.msgpack.Decoder(kind, dec_hook=_decode_error).decode


def _new_request(data: dict[str, Any]) -> NewRequest:
    params = {name: _tuples(value) for name, value in data.pop("params").items()}
    options = RequestOptions(**data.pop("options"))
    return NewRequest(params=SamplingParams(**params), options=options, **data)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _encode_other(value: Any) -> Any:
    """What msgspec does not know: errors; all else is refused."""
    if isinstance(value, BaseException):
        shown = traceback.TracebackException.from_exception(value)
        texts = type(value).__name__, str(shown), "".join(shown.format())
        # File names and the user's messages may hold surrogates, which are no UTF-8.
        return [text.encode(errors="backslashreplace").decode() for text in texts]
    raise TypeError(f"{value!r} is a {type(value).__name__}")


def _decode_error(kind: type, data: Any) -> Any:
    assert kind is BaseException, f"no decoder for {kind}"
    return rebuild_error(*data)
