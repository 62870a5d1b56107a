"""`inlay bench` as a user meets it, on the demo model with the eager backend."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from inlay.bench import kernels, kernels_cpu, sampler_cpu, startup
from inlay.cli import main
from inlay.cli.bench import BENCHES
from inlay.errors import BuildError

SMALL = ["--in-process", "--input-len", "8-12", "--output-len", "5"]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("bench") / "engine"
    assert main(["build", "demo", "-o", str(path), "--backend", "eager"]) == 0
    return str(path)


@pytest.fixture
def nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("something was built, or started")

    monkeypatch.setattr("inlay.engine.compile_model", refuse)
    monkeypatch.setattr("inlay.bench.model.LLM", refuse)
    monkeypatch.setattr("inlay.bench.model.build_shape", refuse)
    monkeypatch.setattr("inlay.bench.startup.run_watched", refuse)


def test_throughput(artifact: str, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "results.jsonl"
    command = ["bench", "throughput", artifact, *SMALL, "--num-prompts", "6", "--repeats", "2"]
    assert main([*command, "--output", str(file), "--goodput", "ttft:60000", "e2el:60000"]) == 0
    shown = capsys.readouterr().out
    for text in (
        *("12 completed, 0 failed", "TTFT", "E2E", "ITL          not measured", "GFLOP/s"),
        *("of the blocks at the peak", "percentiles = ", "goodput = "),
        "TPOT = (finish - first token) / (output tokens - 1)",
    ):
        assert text in shown
    (line,) = file.read_text().splitlines()
    facts = json.loads(line)
    assert (facts["num_completed"], facts["num_output_tokens"]) == (12, 60)
    assert facts["goodput_per_s"] == facts["requests_per_s"] > 0
    assert len(facts["output_tokens_per_s_of_repeats"]) == 2
    assert facts["prefix_hit_rate"] == 0  # the second run found nothing of the first
    assert 0 < facts["roofline"]["memory_share"] < 1
    assert 0 < facts["roofline"]["compute_share"] < 1
    for name in ("cpu", "cores", "torch", "transformers", "python", "inlay", "threads", "dtype",
                 "backend", "commit", "layers", "time", "shapes"):  # fmt: skip
        assert facts[name] is not None
    assert facts["arguments"]["num_warmups"] == 8
    assert str(Path.home()) not in line
    assert str(tmp_path) not in line
    assert main([*command[:3], *SMALL, "--num-prompts", "2", "--streaming", "--output", str(file),
                 "--json"]) == 0  # fmt: skip
    assert json.loads(capsys.readouterr().out) == json.loads(file.read_text().splitlines()[1])
    assert json.loads(file.read_text().splitlines()[1])["itl_ms"]["p99"] > 0


def test_latency(artifact: str, capsys: Any) -> None:
    command = ["bench", "--json", "latency", artifact, *SMALL, "--batch-size", "3"]
    assert main([*command, "--repeats", "2", "--threads", "1"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["num_completed"], facts["num_output_tokens"], facts["threads"]) == (6, 30, 1)
    assert facts["batch_ms"]["p50"] >= facts["e2e_ms"]["p50"] > facts["ttft_ms"]["p50"] > 0
    assert 0 < facts["roofline"]["decode_share"] < 1
    assert 0 < facts["roofline"]["prefill_share"] < 1


def test_serve_load(artifact: str, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"The {i}th statement", "max_tokens": 3} for i in range(4)]
    file.write_text("\n".join(map(json.dumps, lines)))
    command = ["bench", "serve-load", artifact, "--in-process", "--dataset", str(file)]
    assert main([*command, "--request-rate", "50", "--max-concurrency", "2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["num_completed"], facts["num_output_tokens"]) == (4, 12)
    assert facts["wait_ms"]["p99"] >= 0
    assert facts["arguments"]["dataset"] == "prompts.jsonl"
    assert facts["api"] == "in process, no HTTP"
    shared = ["--dataset", "prefix", "--prefix-len", "64", "--num-prefixes", "1"]
    assert (
        main([*command[:4], *shared, *SMALL, "--num-prompts", "4", "--max-concurrency", "1"]) == 0
    )
    assert "prefix hits 0.0%" not in capsys.readouterr().out


def test_failed_requests_are_counted_and_named(artifact: str, capsys: Any) -> None:
    """A pool of 32 tokens has no room for prompts of more."""
    command = ["bench", "serve-load", artifact, "--in-process", "--num-prompts", "8"]
    command += ["--input-len", "20-60", "--output-len", "4", "--num-warmups", "0"]
    command += ["--kv-cache-tokens", "32"]
    assert main([*command, "--json"]) == 1
    said = capsys.readouterr()
    facts = json.loads(said.out)
    assert 0 < facts["num_failed"] < 8
    assert facts["num_failed"] + facts["num_completed"] == 8
    assert facts["num_output_tokens"] == 4 * facts["num_completed"]
    assert any("refused: " in name and "kv_cache_tokens" in name for name in facts["failures"])
    assert f"{facts['num_failed']} requests failed" in said.err


@pytest.mark.usefixtures("nothing_is_built")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["throughput", "demo", "--dataset", "nothing"], "--dataset must be random, prefix"),
        (["throughput", "demo", "--dataset", os.devnull], "--dataset must be random, prefix"),
        (["throughput", "demo", "--input-len", "99999"], "and the model takes 2048"),
        (["throughput", "demo", "--max-seq-len", "64"], "and the model takes 64"),
        (["throughput", "0.5b", "--output-len", "9-9000"], "and the model takes 4096"),
        (["throughput", "nothing"], "or a shape (0.5b, "),
        (["throughput", "demo", "--layers", "2"], "--layers is for a shape"),
        (["throughput", "demo", "--threads", "0"], "--threads must be at least 1"),
        (["throughput", "demo", "--repeats", "0"], "--repeats must be at least 1"),
        (["throughput", "demo", "--goodput", "fast"], "--goodput takes"),
        (["throughput", "demo", "--output", "/"], "--output / cannot be written"),
        (["throughput", "demo", "--temperature", "-1"], "temperature"),
        (["throughput", "demo", "--kv-cache-dtype", "int3"], "kv_cache_dtype"),
        (["throughput", "demo", "--block-size", "17"], "block_size must be one of"),
        (["throughput", "demo", "--tokenizer", "/nowhere"], "tokenizer"),
        (["latency", "demo", "--batch-size", "0"], "--batch-size, at least 1"),
        (["latency", "demo", "--num-prompts", "3"], "no --num-prompts"),
        (["serve-load", "demo", "--request-rate", "-3"], "--request-rate must be above 0"),
        (["serve-load", "demo", "--max-concurrency", "0"], "--max-concurrency must be"),
        (["startup", "demo", "--twin-layers", "2"], "--twin-layers is for a shape"),
        (["startup", "demo", "--in-process"], "leave --in-process out"),
        (["startup", "demo", "--input-len", "4000"], "within the model's 2048"),
        (["kernels", "softmax"], "kernel must be one of linear, products, decode"),
        (["kernels", "--repeats", "0"], "--repeats must be at least 1"),
    ],
)
def test_bad_input_is_refused_before_anything_is_built(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 1
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""


@pytest.mark.usefixtures("nothing_is_built")
def test_an_empty_file_and_an_artifacts_own_options(
    artifact: str, tmp_path: Path, capsys: Any
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert main(["bench", "throughput", artifact, "--dataset", str(empty)]) == 1
    assert "holds 0 requests" in capsys.readouterr().err
    assert main(["bench", "throughput", artifact, "--dtype", "float32"]) == 1
    assert "dtype cannot be changed for the artifact" in capsys.readouterr().err


def test_bad_usage_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, text in (
        (["bench"], "required: bench"),
        (["bench", "speed"], "invalid choice: 'speed'"),
        (["bench", "throughput"], "required: model"),
        (["bench", "throughput", "demo", "--num-prompts", "many"], "invalid int value"),
        (["bench", "latency", "demo", "--request-rate", "3"], "unrecognized arguments"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert text in capsys.readouterr().err
    for name in sorted(set(BENCHES) - {"compare"}):
        with pytest.raises(SystemExit) as ended:
            main(["bench", name, "--help"])
        assert ended.value.code == 0
        assert "--output" in capsys.readouterr().out


def test_compare_is_imported_only_when_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    fake = SimpleNamespace(
        add_arguments=lambda parser: parser.add_argument("--peers"),
        run=lambda arguments: seen.append(arguments.peers) or 3,
    )
    monkeypatch.setitem(sys.modules, "inlay.bench.compare", fake)  # type: ignore[arg-type]
    assert main(["bench", "compare", "--peers", "hf,openvino"]) == 3
    assert seen == ["hf,openvino"]
    for name in [name for name in sys.modules if name.startswith("inlay.bench.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit):
        main(["bench", "-h"])
    assert not [name for name in sys.modules if name.startswith("inlay.bench.")]


def test_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    def run(names: list[str], threads: int, repeats: int) -> Iterator[dict[str, Any]]:
        for name in names:
            yield {"bench": name, "gb_s": {"qkv": 3.5}, "threads": threads}

    monkeypatch.setattr(kernels_cpu, "run", run)
    monkeypatch.setattr(sampler_cpu, "measure", lambda repeats: {"greedy": {"least_ms": 1.5}})
    file = tmp_path / "kernels.jsonl"
    assert main(["bench", "kernels", "--threads", "1", "--output", str(file)]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["bench"] for row in rows] == [*kernels_cpu.BENCHES, kernels.SAMPLER]
    assert all(row["cpu"] and row["repeats"] == 20 for row in rows)
    assert "linear: gb_s (qkv 3.5); threads 1" in capsys.readouterr().out


def test_startup_of_an_artifact(
    artifact: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    commands: list[list[str]] = []

    def run_watched(command: list[str], environment: dict[str, str]) -> tuple[float, int, str]:
        commands.append(command)
        assert environment["PATH"] == ""
        if len(command) == 4:
            return 1.0, 5, '{"load_s": 0.5}'
        now, count = time.time(), len(commands)
        row = {"import_s": count, "llm_s": 2.0, "generate_s": 1.0, "time": now + 10 * count}
        return 1.0, 5, "a warning\n" + json.dumps(row)

    monkeypatch.setattr(startup, "run_watched", run_watched)
    assert main(["bench", "startup", artifact, "--repeats", "3", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["first_start"]["seconds"] == pytest.approx(10, abs=1)
    assert facts["warm_start"]["seconds"] == pytest.approx(30, abs=1)  # of 20, 30 and 40
    assert facts["warm_start"]["import_s"] == 3
    assert facts["load_s"] == 0.5
    assert (facts["cold_build"], facts["cold_start_s"]) == (None, None)
    assert main(["bench", "startup", artifact, "--repeats", "1"]) == 0
    assert "warm start" in capsys.readouterr().out


def test_a_watched_command(tmp_path: Path) -> None:
    environment = dict(os.environ)
    seconds, peak, output = startup.run_watched(
        [sys.executable, "-c", "import time; x = bytearray(50 << 20); time.sleep(0.5); print(1)"],
        environment,
    )
    assert (output, seconds > 0.5) == ("1\n", True)
    assert peak is not None
    assert 50 << 20 < peak < 200 << 20
    with pytest.raises(BuildError, match="failed with status 3"):
        startup.run_watched([sys.executable, "-c", "raise SystemExit(3)"], environment)


def test_an_interrupted_command_leaves_nothing(tmp_path: Path) -> None:
    """Nor what it has started itself."""
    file, main_thread = tmp_path / "pid", threading.get_ident()

    def interrupt() -> None:
        while not (file.exists() and file.read_text().endswith("\n")):
            time.sleep(0.01)
        signal.pthread_kill(main_thread, signal.SIGINT)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    # It says so a second late, when its starter is no longer in Popen but watches.
    command = f"sleep 60 & pid=$!; sleep 1; echo $pid > {file}; wait"
    with pytest.raises(KeyboardInterrupt):
        startup.run_watched(["sh", "-c", command], dict(os.environ))
    watcher.join()
    pid, end = int(file.read_text()), time.monotonic() + 10
    while _is_alive(pid):
        assert time.monotonic() < end
        time.sleep(0.01)


def _is_alive(pid: int) -> bool:
    """A container may have nobody who takes an orphan's exit status: a zombie is dead."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_an_interrupt_leaves_no_process(artifact: str, tmp_path: Path) -> None:
    steps = tmp_path / "steps.jsonl"
    command = ["serve-load", artifact, "--iteration-log", str(steps), "--num-warmups", "0"]
    bench = subprocess.Popen(
        [sys.executable, "-m", "inlay.cli", "bench", *command, "--output-len", "900"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 120  # for machines under load
        while not steps.exists() or len(steps.read_text().splitlines()) < 5:
            assert bench.poll() is None, bench.communicate()
            assert time.monotonic() < end
            time.sleep(0.02)
        children = psutil.Process(bench.pid).children(recursive=True)
        assert children
        bench.send_signal(signal.SIGINT)
        _, errors = bench.communicate(timeout=120)
    finally:
        bench.kill()
    assert bench.returncode == 130
    assert errors.splitlines()[-1] == "inlay bench: interrupted"
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
