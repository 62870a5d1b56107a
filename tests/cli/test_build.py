"""`inlay build --config`: a YAML file is the same options as the flags, and flags win."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from inlay import CompileOptions
from inlay.cli import main
from inlay.errors import OptionError

Seen = list[tuple[str, str, str | None, CompileOptions]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What `build` is called with."""
    calls: Seen = []

    def build(model: str, path: str, options: CompileOptions, **given: Any) -> None:
        calls.append((model, path, given["tokenizer"], options))
        raise OptionError("enough")

    monkeypatch.setattr("inlay.engine.build", build)
    return calls


def write(folder: Path, text: str) -> str:
    (folder / "build.yaml").write_text(text)
    return str(folder / "build.yaml")


def test_a_file_says_all_and_flags_win(tmp_path: Path, seen: Seen) -> None:
    file = write(
        tmp_path,
        "model: demo\noutput: out\ntokenizer: other\nbackend: eager\nmax_seq_len: 99\n"
        "trust_remote_code: true\nquantization: {format: w4a16, group_size: 64}\n",
    )
    expected = CompileOptions(
        backend="eager", max_seq_len=99, trust_remote_code=True,
        quantization="w4a16,group_size=64",
    )  # fmt: skip
    assert main(["build", "--config", file]) == 1
    assert seen[0] == ("demo", "out", "other", expected)
    flags = ["mine", "-o", "here", "--max-seq-len", "50", "--quantization", "w8a8"]
    assert main(["build", "--config", file, *flags]) == 1
    model, output, _, options = seen[1]
    assert (model, output, options.backend) == ("mine", "here", "eager")
    assert (options.max_seq_len, options.quantization.format) == (50, "w8a8")
    assert main(["build", "demo", "-o", "x"]) == 1
    assert seen[2] == ("demo", "x", None, CompileOptions())
    assert main(["build", "demo", "-o", "x", "--config", write(tmp_path, "{}")]) == 1
    assert seen[3] == seen[2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max-seq-len: 9", "unknown 'max-seq-len'; names are model, output, tokenizer, backend"),
        ("targets: sm80", "unknown 'targets'"),
        ("backend: magic", "tensorrt, eager, got 'magic'"),
        ("backend: [eager]", "tensorrt, eager, got ['eager']"),
        ("block_size: 16.0", "block_size must be one of 16, 32, 64, 128, got 16.0"),
        ("max_seq_len: '99'", "max_seq_len must be an integer of at least 2, got '99'"),
        ("max_num_seqs: true", "max_num_seqs must be an integer of at least 1, got True"),
        ("trust_remote_code: 1", "trust_remote_code must be one of False, True, got 1"),
        ("dtype: int3", "dtype must be one of auto, float32, bfloat16, float16, got 'int3'"),
        ("quantization: 8", "quantization must be one of none, w8a8"),
        ("quantization: {format: w8a8, bits: 4}", "quantization: unknown 'bits'; known are"),
        ("model: [a, b]", "model must be a text, got ['a', 'b']"),
        ("verify: capture\nverify: engine", "verify is there 2 times; keep one"),
        (
            "quantization: {format: w4a16, format: w8a8}",
            "quantization.format is there 2 times; keep one",
        ),
        ("- a\n- b", "must be a mapping of names to values, got ['a', 'b']"),
        ("a: [", "cannot be read: while parsing"),
    ],
)
def test_what_a_file_cannot_say(
    text: str, message: str, tmp_path: Path, seen: Seen, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", "demo", "-o", "x", "--config", write(tmp_path, text)]) == 1
    assert message in capsys.readouterr().err
    assert seen == []


def test_a_file_that_is_not_there(seen: Seen, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "demo", "-o", "x", "--config", "no/such.yaml"]) == 1
    assert "config no/such.yaml cannot be read" in capsys.readouterr().err


def test_a_model_and_a_place_are_needed(
    tmp_path: Path, seen: Seen, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["build", "--config", write(tmp_path, "model: demo")])
    assert ended.value.code == 2
    assert "required: -o/--output" in capsys.readouterr().err
