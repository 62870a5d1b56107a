"""The user's faults. Everything else that goes wrong is ours and surfaces as itself.

This module is the foundation: every other module may import it and it imports none of them.
"""

from __future__ import annotations


class InlayError(Exception):
    """Base of every error a user can cause: names the thing, the allowed values and the fix."""


class OptionError(InlayError, ValueError):
    """An option has a value that is not allowed."""


class UnsupportedModelError(InlayError):
    """The model cannot be captured faithfully; the message says which part and why."""


class VerificationError(InlayError):
    """Numbers of a captured, rewritten or compiled model differ from the reference."""


class ArtifactError(InlayError):
    """An artifact is damaged, foreign, or was built for something else."""


class BuildError(InlayError):
    """A build could not finish: no compiler, no space, a tool failed."""


class RequestError(InlayError, ValueError):
    """A request is not admissible: its prompt, its ids or its sampling parameters."""


class ModelLoadError(InlayError):
    """A checkpoint cannot be found, reached or read."""


class EngineError(InlayError):
    """The engine's process is gone, closed, or cannot take more; the message says why."""
