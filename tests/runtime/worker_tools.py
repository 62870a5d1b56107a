"""For the tests of the executor's process, and for the scripts that they run: quick to import."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import torch

from inlay.runtime.config import ExecutorConfig
from inlay.runtime.sampling_params import SamplingParams

CONFIG = ExecutorConfig(max_num_seqs=4, kv_cache_tokens=4096)
LONG = SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=8)
PROMPT = [11, 12, 13, 14]

ROOT = Path(__file__).parents[2]

SCRIPT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
"""
SCRIPT += """
import os, signal, sys, threading, time
from types import SimpleNamespace
from inlay.runtime.client import connect
from inlay.runtime.request import NewRequest
from tests.runtime.recorder import Recorder
from tests.runtime.worker_tools import CONFIG, LONG, PROMPT, SHORT, workers_of

ENGINE = SimpleNamespace(path=sys.argv[1], backend="eager")
seen = Recorder()

def start():
    return connect(
        ENGINE, CONFIG, in_process=False, on_outputs=seen.on_outputs, on_death=seen.on_death
    )

def generate(client):
    client.submit(NewRequest("long", PROMPT, LONG))
    seen.wait_for(lambda: len(seen.tokens("long")) > 2)

"""
"""The beginning of a user's script, which has no `if __name__ == "__main__"`."""


def workers_of(pid: int) -> list[psutil.Process]:
    """The executors' processes that this process has started."""
    children = psutil.Process(pid).children()
    return [child for child in children if "inlay.runtime.worker" in str(child.cmdline())]


def is_gone(process: psutil.Process) -> bool:
    """A zombie counts: whoever inherits it in a container need not reap."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def assert_gone_within(process: psutil.Process, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not is_gone(process):
        assert time.monotonic() < end, f"{process} still runs after {seconds} s"
        time.sleep(0.01)


class OnlyToken:
    """A logits processor that leaves one token, or raises."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        only = torch.full_like(logits, -torch.inf)
        only[self.token] = 0
        return only
