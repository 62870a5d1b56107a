"""Where the device's part of a step is called.

On a CPU, and on CUDA, where kernels are queued and the call returns at once, it is called inline;
results are waited for when they are read. Anything else that runs calls in order will do too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Pending(Protocol[T_co]):
    """A call's result, perhaps not there yet."""

    def result(self) -> T_co:
        """Wait for it; raises what the call raised."""


class Launcher(Protocol):
    """Runs calls one after the other, in the order of `launch`."""

    def launch(self, call: Callable[[], T]) -> Pending[T]:
        """Begin, or queue, a call."""

    def close(self) -> None:
        """No more calls will come."""


@dataclass(frozen=True)
class _Done(Generic[T]):
    value: T | None
    error: Exception | None

    def result(self) -> T:
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]


class InlineLauncher:
    """Calls at once; an exception is raised where the result is read."""

    def launch(self, call: Callable[[], T]) -> Pending[T]:
        try:
            return _Done(call(), None)
        except Exception as error:
            return _Done(None, error)

    def close(self) -> None:
        """Nothing is held."""
