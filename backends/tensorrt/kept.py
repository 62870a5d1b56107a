"""What is kept between loads in the user's cache. A cache that fails costs time alone."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)


def read(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            logger.warning("%s in the cache cannot be read: %s", file, error)
        return None


def write(file: Path, data: bytes) -> None:
    """Whole or not at all; a warning where it cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=file.parent)
    except OSError as error:
        logger.warning("%s is not kept in the cache: %s", file, error)
        return
    try:
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(data)
        os.replace(name, file)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        logger.warning("%s is not kept in the cache: %s", file, error)
