"""`inlay bench startup MODEL`: what it takes until the first token, each part in fresh processes.

A cold build has empty caches, a warm one those that the cold one filled. Loads run without a
compiler on PATH; the first is cold in all but the page cache, which holds what was just built.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from inlay.bench import conditions, model
from inlay.bench.shapes import SHAPES, save_shape
from inlay.errors import BuildError, OptionError

LOAD = """
import sys, time, json
import torch
from inlay import Engine
begin = time.perf_counter()
model = Engine.load(sys.argv[1]).load_model()
print(json.dumps({"load_s": time.perf_counter() - begin}))
"""
"""Code and weights into a process that has imported everything."""

FIRST_TOKEN = """
import json, sys, time
begin = time.perf_counter()
from inlay import LLM, SamplingParams
imported = time.perf_counter()
llm = LLM(sys.argv[1], **json.loads(sys.argv[2]))
ready = time.perf_counter()
params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
(output,) = llm.generate([[1] * int(sys.argv[3])], params, use_tqdm=False)
first, now = time.perf_counter(), time.time()
assert output.error is None, output.error
llm.shutdown()
print(json.dumps({"import_s": imported - begin, "llm_s": ready - imported,
                  "generate_s": first - ready, "time": now}))
"""
"""What a program does that has a prompt and wants its first token."""

FORMULAS = {
    "cold start": "cold build + first start to the first token",
    "start": "from a process's start to its first token: imports, the engine's process, load, "
    "prefill",
    "warm start": "the median of the starts after the first",
    "load": "Engine.load().load_model() alone, imports done: the least",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model.add_arguments(parser)
    group = parser.add_argument_group("measuring")
    add = group.add_argument
    add("--repeats", type=int, default=3, metavar="N", help="warm starts, and loads (3)")
    add("--input-len", type=int, default=128, metavar="N", help="tokens of the prompt (128)")
    add("--twin-layers", type=int, metavar="N", help="of a shape: build it with so many layers "
        "too, and compare compiles and memory")  # fmt: skip
    add("--output", "-o", metavar="FILE", help="append the result to this file, a line of JSON")
    add("--json", action="store_true", default=argparse.SUPPRESS, help="that line on stdout")


def run(arguments: argparse.Namespace) -> int:
    subject = _checked(arguments)
    rows: dict[str, dict[str, Any]] = {}
    depths = [arguments.layers, *([arguments.twin_layers] if arguments.twin_layers else [])]
    for depth in depths:
        with tempfile.TemporaryDirectory() as scratch:
            rows["twin" if rows else "start"] = _measure(arguments, subject, depth, Path(scratch))
    facts = {
        "bench": "startup",
        "model": subject.label,
        "layers": arguments.layers,
        "twin_layers": arguments.twin_layers,
        "options": {n: conditions.without_directories(v) for n, v in subject.options.items()},
        "threads": model.num_threads(arguments),
        "repeats": arguments.repeats,
        "input_len": arguments.input_len,
        **rows["start"],
        **(
            {"twin": rows["twin"], **_compared(rows["start"], rows["twin"])}
            if rows.get("twin")
            else {}
        ),
        **conditions.conditions(),
    }
    conditions.append(arguments.output, facts)
    print(json.dumps(facts) if getattr(arguments, "json", False) else "\n".join(table(facts)))
    return 0


def table(facts: dict[str, Any]) -> list[str]:
    lines = [f"startup: {facts['model']}, {facts['threads']} threads on {facts['cpu']}"]
    for name in ("cold_build", "warm_build"):
        if row := facts[name]:
            peak = "" if row["peak_pss_mb"] is None else f", peak {row['peak_pss_mb']} MB"
            compiled = (
                f", {row['num_compiled']} compiles" if row["num_compiled"] is not None else ""
            )
            lines.append(f"  {name.replace('_', ' '):12} {row['seconds']:8.2f} s{compiled}{peak}")
    first, warm = facts["first_start"], facts["warm_start"]
    lines.append(f"  first start  {first['seconds']:8.2f} s")
    lines.append(
        f"  warm start   {warm['seconds']:8.2f} s: imports {warm['import_s']:.2f}, engine "
        f"{warm['llm_s']:.2f}, first token {warm['generate_s']:.2f}"
    )
    lines.append(f"  load         {facts['load_s']:8.2f} s")
    if facts["cold_start_s"] is not None:
        lines.append(
            f"  cold start   {facts['cold_start_s']:8.2f} s, {facts['cold_over_warm']:.1f} times "
            "a warm one"
        )
    if "twin" in facts:
        lines.append(
            f"  beside {facts['twin_layers']} layers: equal number of compiles "
            f"{facts['same_number_of_compiles']}, peak grows "
            f"{facts['pss_growth_over_checkpoint_growth']} times as much as the checkpoint"
        )
    return lines + [f"  {name} = {text}" for name, text in FORMULAS.items()]


def cold_build(
    checkpoint: Path | str, folder: Path, options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Build into folder/engine with empty caches, and load that without a compiler."""
    built = build(checkpoint, folder, "engine", options or {})
    loads = [load_seconds(folder / "engine", folder) for _ in range(3)]
    return built | {"load_s": round(min(loads), 2)}


def build(
    checkpoint: Path | str, folder: Path, name: str, options: dict[str, Any]
) -> dict[str, Any]:
    """`inlay build` in a process of its own, with the caches in folder/cache."""
    environment = {
        **os.environ,
        "INLAY_CACHE_DIR": str(folder / "cache"),
        "TMPDIR": str(folder),
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    command = [sys.executable, "-m", "inlay.cli", "build", str(checkpoint), "-o"]
    flags = [part for item in options.items() for part in _flag(*item)]
    command += [str(folder / name), "--json", *flags]
    seconds, peak, output = run_watched(command, environment)
    facts = json.loads(output.splitlines()[-1])
    place = Path(checkpoint)
    files = list(place.iterdir()) if place.is_dir() else []
    return {
        "seconds": round(seconds, 2),
        "phases": facts["phases"],
        "num_compiled": facts["target"].get("num_compiled"),
        "peak_pss_mb": None if peak is None else round(peak / 1e6),
        "checkpoint_mb": round(sum(f.stat().st_size for f in files) / 1e6),
    }


def load_seconds(engine: Path | str, folder: Path) -> float:
    """Code and weights of an artifact, without a compiler on PATH and with an empty cache."""
    _, _, output = run_watched([sys.executable, "-c", LOAD, str(engine)], _bare(folder))
    return float(json.loads(output.splitlines()[-1])["load_s"])


def run_watched(command: list[str], environment: dict[str, str]) -> tuple[float, int | None, str]:
    """Seconds, peak PSS in bytes (None without psutil) and standard output of a command.

    Raises BuildError where it fails. Whatever interrupts this ends the command's whole group.
    """
    begin = time.perf_counter()
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    watcher = _PeakWatcher(process.pid)
    try:
        output, _ = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    finally:
        peak = watcher.stop()
    if process.returncode:
        raise BuildError(
            f"{' '.join(command[1:4])[:80]} failed with status {process.returncode}; what it said "
            "is on stderr"
        )
    return time.perf_counter() - begin, peak, output


def tree_pss(process: Any) -> int:
    """Proportional set size of a psutil.Process and its descendants, bytes: shared pages once."""
    import psutil

    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


class _PeakWatcher:
    """Asks a process tree for its memory ten times a second."""

    def __init__(self, pid: int) -> None:
        self._peak, self._done = 0, threading.Event()
        self._thread: threading.Thread | None = None
        if find_spec("psutil") is not None:
            self._thread = threading.Thread(target=self._watch, args=(pid,), daemon=True)
            self._thread.start()

    def stop(self) -> int | None:
        self._done.set()
        if self._thread is None:
            return None
        self._thread.join()
        return self._peak

    def _watch(self, pid: int) -> None:
        import psutil

        while not self._done.wait(0.1):
            try:
                self._peak = max(self._peak, tree_pss(psutil.Process(pid)))
            except psutil.NoSuchProcess:
                return


def _checked(arguments: argparse.Namespace) -> model.Subject:
    for name in ("repeats", "input_len", "twin_layers"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise OptionError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if arguments.twin_layers is not None and arguments.model not in SHAPES:
        raise OptionError(f"--twin-layers is for a shape ({', '.join(SHAPES)})")
    if arguments.in_process:
        raise OptionError("startup measures fresh processes: leave --in-process out")
    conditions.check_output(arguments.output)
    subject = model.subject_of(arguments)
    if subject.max_seq_len is not None and arguments.input_len >= subject.max_seq_len:
        raise OptionError(
            f"--input-len must leave room for a token within the model's {subject.max_seq_len}, "
            f"got {arguments.input_len}"
        )
    return subject


def _measure(
    arguments: argparse.Namespace, subject: model.Subject, layers: int | None, folder: Path
) -> dict[str, Any]:
    facts: dict[str, Any] = {"cold_build": None, "warm_build": None, "cold_start_s": None}
    engine = Path(subject.place).resolve()
    if subject.kind != "artifact":
        checkpoint: Path | str = subject.place
        if subject.kind == "shape":
            checkpoint = save_shape(subject.place, folder / "checkpoint", layers)
        facts["cold_build"] = build(checkpoint, folder, "engine", subject.compile_options)
        facts["warm_build"] = build(checkpoint, folder, "again", subject.compile_options)
        engine = folder / "engine"
    options = {**subject.executor_options, "num_threads": arguments.threads}
    command = [sys.executable, "-c", FIRST_TOKEN, str(engine), json.dumps(options)]
    starts = []
    for _ in range(1 + arguments.repeats):
        begin = time.time()
        _, _, output = run_watched([*command, str(arguments.input_len)], _bare(folder))
        row = json.loads(output.splitlines()[-1])
        starts.append({"seconds": row.pop("time") - begin, **row})
    loads = [load_seconds(engine, folder) for _ in range(arguments.repeats)]
    facts["first_start"] = {n: round(v, 3) for n, v in starts[0].items()}
    warm = {name: median(start[name] for start in starts[1:]) for name in starts[0]}
    facts["warm_start"] = {n: round(v, 3) for n, v in warm.items()}
    facts["load_s"] = round(min(loads), 3)
    if facts["cold_build"] is not None:
        cold = facts["cold_build"]["seconds"] + starts[0]["seconds"]
        facts |= {
            "cold_start_s": round(cold, 2),
            "cold_over_warm": round(cold / warm["seconds"], 1),
        }
    return facts


def _compared(start: dict[str, Any], twin: dict[str, Any]) -> dict[str, Any]:
    """Whether depth costs compiles, and how memory grows with it."""
    deep, shallow = start["cold_build"], twin["cold_build"]
    size = deep["checkpoint_mb"] - shallow["checkpoint_mb"]
    ratio = None
    if deep["peak_pss_mb"] is not None and size:
        ratio = round((deep["peak_pss_mb"] - shallow["peak_pss_mb"]) / size, 2)
    return {
        "same_number_of_compiles": deep["num_compiled"] == shallow["num_compiled"],
        "pss_growth_over_checkpoint_growth": ratio,
    }


def _bare(folder: Path) -> dict[str, str]:
    """No compiler, and a cache that holds nothing of the build's."""
    environment = {**os.environ, "PATH": "", "INLAY_CACHE_DIR": str(folder / "empty")}
    environment.pop("CXX", None)
    return environment


def _flag(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}"] if value else []
    return [f"--{flag}", str(value)]
