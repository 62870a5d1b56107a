"""Notices kernels that Triton compiles, or loads, after they should all have been warmed up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triton import knobs


@contextmanager
def compilations() -> Iterator[list[str]]:
    """A list that grows by each kernel that is not yet in this process: its name and arguments.

    One that Triton's cache on disk holds counts too: it still has to be loaded, which serving a
    request must not wait for. For tests; not to be nested.
    """
    seen: list[str] = []

    def note(*_: Any, repr: str, **__: Any) -> None:
        seen.append(repr)

    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = note
    try:
        yield seen
    finally:
        knobs.runtime.jit_post_compile_hook = before
