"""Calibration in a build: from flags and from Python, kept in the artifact, done again from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from inlay import Engine, compile_model
from inlay.backends.artifact import WeightReader
from inlay.cli import main
from inlay.passes.quantize.config import QuantizationConfig
from tests.toys import build_toy

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_seq_len": 128,
    "max_num_tokens": 64,
    "verify": "capture",
}


def some_ids(seed: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(128, (6, 50), generator=generator)
    return [{"token_ids": row.tolist()} for row in ids]


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    read = WeightReader(engine.artifact)
    return {name: read.get(name).clone() for name in engine.artifact.json("weights/index.json")}


def given(engine: Engine) -> set[str]:
    recipes = engine.artifact.recipes
    parts = [name for name, recipe in recipes.items() if recipe["op"] == "given"]
    assert {recipes[name]["origin"] for name in parts} <= {"calibration"}
    return {name.rpartition(".")[2] for name in parts}


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"format": "w4a16", "method": "gptq"}, {"values", "scales"}),
        (
            {"format": "w8a8", "method": "smoothquant", "activation_scales": "static"},
            {"smooth", "input_scale"},
        ),
    ],
    ids=["gptq", "smoothquant"],
)
def test_what_calibration_ran_on_is_kept_and_gives_the_same_again(
    options: dict[str, Any], parts: set[str]
) -> None:
    model = build_toy("llama", layers=1)
    config = QuantizationConfig(**options, calibration=iter(some_ids(1)))
    engine = compile_model(model, "eager", quantization=config, **OPTIONS)
    assert given(engine) == parts
    kept = engine.path / "calibration.jsonl"
    assert kept.name in engine.manifest["files"]
    assert [json.loads(line) for line in kept.read_text().splitlines()] == some_ids(1)
    described = engine.manifest["options"]["quantization"]
    assert described.endswith("calibration=calibration.jsonl")
    again = described.replace("calibration.jsonl", str(kept))
    replayed = weights(compile_model(model, "eager", quantization=again, **OPTIONS))
    mine = weights(engine)
    assert all(torch.equal(mine[name], replayed[name]) for name in {*mine, *replayed})


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "".join(json.dumps({"text": f"def f{i}(self): " * 20}) + "\n" for i in range(9))
    )
    quantization = f"w4a16,method=gptq,calibration={texts},num_samples=4,sample_length=64"
    target = tmp_path / "engine"
    command = ["build", "demo", "-o", str(target), "--backend", "eager", "--max-seq-len", "256"]
    assert main([*command, "--quantization", quantization]) == 0
    told = capsys.readouterr().err
    assert "calibrate: 4 samples, 256 tokens" in told
    assert "calibrate: layer 16 of 16" in told
    engine = Engine.load(target)
    assert len((target / "calibration.jsonl").read_text().splitlines()) == 4
    assert given(engine) == {"values", "scales"}
    assert engine.manifest["options"]["quantization"] == quantization
