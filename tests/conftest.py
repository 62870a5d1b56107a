"""Shared by all tests: one compile cache, no network, no more threads than cores."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests import models_table as table

os.environ["HF_HUB_OFFLINE"] = "1"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:  # idle threads of one worker spin on another's core
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled code of a test run is shared by its tests and, where CI sets one, by its parts."""
    if "INLAY_CACHE_DIR" not in os.environ:
        os.environ["INLAY_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    return Path(os.environ["INLAY_CACHE_DIR"])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def few_objects() -> Iterator[None]:
    """Each build collects garbage, which looks through all that was ever imported or kept."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


ROWS = pytest.StashKey[table.Rows]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--models-table", type=Path, help="write what was seen of each architecture to this file"
    )


@pytest.fixture
def models_table(pytestconfig: pytest.Config) -> Callable[[str, str], Any]:
    """(configuration, column) -> a context with the row that the test fills."""
    rows = pytestconfig.stash.setdefault(ROWS, {})
    return lambda name, column: table.recording(rows, name, column)


def pytest_sessionfinish(session: pytest.Session) -> None:
    path, rows = session.config.getoption("--models-table"), session.config.stash.get(ROWS, {})
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["rows"] = json.dumps(list(rows.items()))
    elif path is not None and rows:
        table.write(rows, path)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker of pytest-xdist has ended: what it saw joins the others' rows."""
    rows = node.config.stash.setdefault(ROWS, {})
    for (name, column), row in json.loads(getattr(node, "workeroutput", {}).get("rows", "[]")):
        rows[name, column] = row
