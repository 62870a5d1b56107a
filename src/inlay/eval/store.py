"""Verdicts beside an artifact's manifest: `eval.json`, one entry for each text and setting.

It is no part of what was built, so the manifest does not list it; it names the manifest that it is
about by hash, and has a hash of its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from typing import Any

from inlay.backends.artifact import EVALUATIONS, SELF
from inlay.engine import Engine
from inlay.eval.evaluation import Evaluation

logger = logging.getLogger(__name__)

IDENTITY = (
    "backend", "kv_cache_dtype", "reference_sha256", "text_sha256", "window", "stride", "num_tokens"
)  # fmt: skip
"""A verdict takes the place of one in which these are the same."""


def store(engine: Engine, evaluation: Evaluation) -> None:
    """Note a verdict in the engine's artifact; one that cannot be written to is left as it is."""
    facts = evaluation.to_json()
    file = engine.path / EVALUATIONS
    try:
        folder = os.open(engine.path, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # one writer at a time: each adds to what is there
            others = [one for one in read(engine) if _identity(one) != _identity(facts)]
            content = {
                "manifest_sha256": engine.manifest[SELF],
                "evaluations": [*others, facts],
            }
            scratch = file.with_name(f"{EVALUATIONS}.{os.getpid()}")
            with scratch.open("w") as out:
                json.dump({**content, "sha256": _sha256(content)}, out, indent=1)
                out.flush()
                os.fsync(out.fileno())
            scratch.replace(file)
        finally:
            os.close(folder)
    except OSError as error:
        logger.warning("the verdict is not kept beside %s: %s", engine.path, error)


def read(engine: Engine) -> list[dict[str, Any]]:
    """The verdicts on this very artifact, oldest first; [] where there are none, and where they
    are damaged or of another artifact."""
    file = engine.path / EVALUATIONS
    try:
        data = json.loads(file.read_text())
        content = {name: data[name] for name in ("manifest_sha256", "evaluations")}
        if data["sha256"] != _sha256(content):
            raise ValueError("its sha256 differs")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%r): run `inlay eval` again", file, error)
        return []
    if content["manifest_sha256"] != engine.manifest[SELF]:
        logger.warning("%s is about another artifact: run `inlay eval` again", file)
        return []
    return list(content["evaluations"])


def _identity(facts: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(facts["setting"].get(name) for name in IDENTITY)


def _sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
