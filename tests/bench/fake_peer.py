"""A peer that speaks the protocol and has no model; `serve.py` imports it as it does the real ones.

job: "answers": a JSON file of {prompt: tokens}; "order": a file that gets a line for each run;
"mode": what it does wrong.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def versions() -> dict[str, str]:
    return {"fake": "1.0"}


def prepare(checkpoint: Path, directory: Path, job: dict[str, Any]) -> None:
    if job["mode"] == "unprepared":
        print("no such format", file=sys.stderr)
        raise SystemExit(3)
    (directory / "model").write_text(checkpoint.name)


class Model:
    def __init__(self, directory: Path, job: dict[str, Any]) -> None:
        assert (directory / "model").is_file()
        print("libraries print what they like")
        self.job = job
        self.known = json.loads(Path(job["answers"]).read_text())
        self.conditions = {"batching": "none"}

    def run(self, requests: list[dict[str, Any]], answers: Any) -> None:
        with Path(self.job["order"]).open("a") as order:
            order.write(f"{self.job['name']} {len(requests)}\n")
        mode = self.job["mode"]
        if mode == "dies":
            print("out of memory", file=sys.stderr, flush=True)
            os._exit(7)
        if mode == "hangs":
            time.sleep(600)
        if mode == "raises":
            raise RuntimeError("shapes differ")
        for index, request in enumerate(requests):
            tokens = self.known[str(request["prompt_token_ids"])]
            if mode == "wrong":
                tokens = [(token + 17) % 90 for token in tokens]
            for token in tokens[1:] if mode == "short" else [*tokens, 1]:
                answers.add(index, [token])
