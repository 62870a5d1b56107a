"""The `inlay` command as a process and a parser: status, pipes, and flags that are the options.

What its subcommands do is in tests/cli/.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import pytest

import inlay
from inlay import CompileOptions, Engine, SamplingParams
from inlay.cli import COMMANDS, main
from inlay.cli.options import add_dataclass_arguments, dataclass_from_arguments, field_help
from inlay.cli.run import LISTS
from inlay.engine import build
from inlay.errors import OptionError
from tests.toys import build_toy

EAGER = CompileOptions(backend="eager", dtype="float32", verify="capture")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return build(build_toy("llama", layers=1), tmp_path_factory.mktemp("cli") / "engine", EAGER)


# --- bad usage -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: command"),
        (["compile"], "invalid choice: 'compile'"),
        (["build"], "required: model, -o/--output"),
        (["build", "demo"], "required: -o/--output"),
        (["build", "demo", "-o", "x", "--block-size", "many"], "--block-size: invalid int value"),
        (["build", "demo", "-o", "x", "--blocksize", "16"], "unrecognized arguments: --blocksize"),
        (["run", "demo"], "required: -p/--prompt"),
        (["run", "demo", "-p", "x", "--temperature", "hot"], "--temperature: invalid float value"),
        (["inspect"], "required: model"),
        (["demo", "more"], "unrecognized arguments: more"),
    ],
)
def test_bad_usage_is_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, text in ((["--version"], f"inlay {inlay.__version__}"), (["-h"], "inspect")):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
        assert text in capsys.readouterr().out
    for command in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0
        assert "--json" in capsys.readouterr().out


# --- status ----------------------------------------------------------------------------------


def test_an_artifact_keeps_what_it_was_built_with(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(engine.path)
    assert main(["run", path, "-p", "x", "--dtype", "bfloat16", "--block-size", "64"]) == 1
    assert "dtype, block_size cannot be changed for the artifact" in capsys.readouterr().err
    assert main(["run", path, "-p", "x", "--backend", "inductor"]) == 1
    assert "backend must be one of eager for the artifact" in capsys.readouterr().err
    assert main(["run", path, "-p", "x", "--json"]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["error"] == "RequestError"
    assert "a text prompt needs a tokenizer" in json.loads(said.out)["message"]
    assert "inlay run: prompt 0: a text prompt needs a tokenizer" in said.err


def test_a_damaged_artifact(engine: Engine, tmp_path: Path, capsys: Any) -> None:
    damaged = engine.save(tmp_path / "engine").path
    weights = next(damaged.glob("weights/*.safetensors"))
    data = bytearray(weights.read_bytes())
    weights.unlink()  # a link to the original
    data[-1] ^= 1
    weights.write_bytes(data)
    assert main(["inspect", str(damaged)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(damaged), "--check-weights", "--json"]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out) == {
        "ok": False,
        "error": "ArtifactError",
        "message": said.err.removeprefix("inlay inspect: ").removesuffix("\n"),
    }
    assert "00000.safetensors has been changed" in said.err


def test_an_interrupt_is_status_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(arguments: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("inlay.cli.inspect.run", interrupted)
    assert main(["inspect", "x"]) == 130
    assert capsys.readouterr().err == "inlay inspect: interrupted\n"


def test_termination_is_an_interrupt_with_status_143(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that temporary directories and processes are put away."""
    before, ended = signal.getsignal(signal.SIGTERM), []

    def waits(arguments: argparse.Namespace) -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        finally:
            ended.append(True)
        return 0

    monkeypatch.setattr("inlay.cli.inspect.run", waits)
    assert main(["inspect", "x"]) == 143
    assert ended
    assert capsys.readouterr().err == "inlay inspect: terminated\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_our_own_faults_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments: argparse.Namespace) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr("inlay.cli.inspect.run", broken)
    with pytest.raises(ZeroDivisionError):
        main(["inspect", "x"])


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads_or_that_cannot_be_written(
    engine: Engine, unbuffered: str
) -> None:
    command = [sys.executable, "-m", "inlay.cli", "inspect", str(engine.path)]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    reader, writer = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    pipe, disk = (
        subprocess.Popen(command, env=environment, stdout=to, stderr=subprocess.PIPE, text=True)
        for to in (writer, full)
    )
    os.close(writer)
    os.close(full)
    assert pipe.communicate()[1] == ""
    assert pipe.returncode == 141
    assert "No space left on device" in disk.communicate()[1]
    assert disk.returncode not in (0, 141)


# --- flags -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Options:
    """What can be asked for.

    name: a text with 100 % of its
        second line.
    size: a number.
    share: another number.
    eager: a switch.

    Not a field: but a remark.
    """

    name: str = "x"
    size: int | None = None
    share: float = 0.5
    eager: bool = False


def parser(skip: tuple[str, ...] = ()) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    add_dataclass_arguments(made, Options, skip)
    return made


def test_flags_are_made_of_fields() -> None:
    given = ["--name", "y", "--size", "3", "--share", "0.25", "--eager"]
    arguments = parser().parse_args(given)
    assert dataclass_from_arguments(arguments, Options) == Options(
        name="y", size=3, share=0.25, eager=True
    )
    assert dataclass_from_arguments(parser().parse_args([]), Options) == Options()
    assert dataclass_from_arguments(parser().parse_args([]), Options, size=9) == Options(size=9)
    assert not hasattr(parser(skip=("size",)).parse_args([]), "size")
    shown = " ".join(parser().format_help().split())
    assert "a text with 100 % of its second line. (default: x)" in shown
    assert "remark" not in shown
    assert field_help(Options)["eager"] == "a switch."


@pytest.mark.parametrize(
    ("command", "cls", "by_hand"),
    [
        (["build", "demo", "-o", "x"], CompileOptions, set()),
        (["run", "demo", "-p", "x"], CompileOptions, set()),
        (["run", "demo", "-p", "x"], SamplingParams, set(LISTS)),
    ],
)
def test_every_option_has_its_flag(
    command: list[str], cls: type, by_hand: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command[0], "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    texts = field_help(cls)
    for field in fields(cls):
        assert f"--{field.name.replace('_', '-')}" in shown
        assert field.default is not MISSING
        if field.name not in by_hand:
            assert " ".join(texts[field.name].split()[:4]) in shown


def test_flags_reach_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[CompileOptions] = []

    def build(model: str, path: str, options: CompileOptions, **_: Any) -> None:
        seen.append(options)
        raise OptionError("enough")

    monkeypatch.setattr("inlay.engine.build", build)
    assert main(["build", "demo", "-o", "x"]) == 1
    assert main(["build", "demo", "-o", "x", "--max-seq-len", "99", "--verify", "pass"]) == 1
    assert seen == [CompileOptions(), CompileOptions(max_seq_len=99, verify="pass")]
