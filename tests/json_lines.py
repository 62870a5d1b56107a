"""A pytest plugin: each test's outcome as a line of JSON as soon as it is done, for runs that may
be cut off. `-p tests.json_lines`, with JSON_LINES naming the file; SHARD=0/4 takes every fourth
test, from the first."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    part, count = map(int, os.environ.get("SHARD", "0/1").split("/"))
    items[:] = items[part::count]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.passed:
        return
    facts = {"test": report.nodeid, "outcome": report.outcome, "s": round(report.duration, 2)}
    if not report.passed:
        facts["why"] = str(report.longrepr)[-1500:]
    with Path(os.environ["JSON_LINES"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")
