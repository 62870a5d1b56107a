"""A whole model in one ONNX file, run by plain ONNX Runtime: Hugging Face's greedy tokens."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from inlay import CompileOptions
from inlay.backends.onnx.whole import FILE
from inlay.engine import build
from inlay.errors import OptionError, UnsupportedModelError
from tests.toys import build_toy

OPTIONS = CompileOptions(backend="onnxruntime", dtype="float32", whole=True)
PROMPT = list(range(5, 40))  # longer than the toys' windows and chunks
NUM_TOKENS = 16

UNLIKE = (
    "mistral",
    "gemma2",
    "gpt_oss",
    "llama4_text",
    "gemma3n_text",
    "deepseek_v3",
    "falcon-alibi",
    "bloom",
    "gpt2",
)
"""Windows, soft-caps, sinks, chunks, shared keys and values, heads of unequal sizes, slopes."""


def generate(path: Path) -> list[int]:
    """Prefill, then one token a step; its own caches, as a user of the file has them."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    feed: dict[str, Any] = {
        value.name: np.zeros([0 if size == "P" else size for size in value.shape], np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past.")
    }
    wanted = {value.name for value in session.get_inputs()}
    new, position, tokens = PROMPT, 0, []
    for _ in range(NUM_TOKENS):
        step = {
            "input_ids": np.array([new]),
            "position_ids": np.arange(position, position + len(new))[None],
            "logits_indices": np.array([len(new) - 1]),
        }
        given = {name: value for name, value in step.items() if name in wanted}
        outputs = dict(zip(names, session.run(None, {**feed, **given}), strict=True))
        position += len(new)
        new = [int(outputs["logits"][0, -1].argmax())]
        tokens += new
        feed = {name: outputs[name.replace("past", "present")] for name in feed}
    return tokens


def cases() -> list[Any]:
    return ["mistral", *(pytest.param(name, marks=pytest.mark.slow) for name in UNLIKE[1:])]


@pytest.mark.parametrize("name", cases())
def test_greedy_tokens_of_one_file(name: str, tmp_path: Path) -> None:
    model = build_toy(name)
    engine = build(model, tmp_path / "engine", OPTIONS)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(engine.path / "weights", elsewhere / "weights")
    shutil.copyfile(engine.path / FILE, elsewhere / FILE)
    tokens = generate(elsewhere / FILE)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPT + tokens])).logits[0]
    assert tokens == logits[len(PROMPT) - 1 : -1].argmax(-1).tolist()
    assert len(set(tokens)) >= NUM_TOKENS // 2
    saved = engine.save(tmp_path / "saved").path
    for path in (engine.path, saved):  # onnx refuses data in files that have several names
        onnx.checker.check_model(str(path / FILE))
        onnx.load(str(path / FILE))
    domains = {node.domain for node in onnx.load(str(engine.path / FILE)).graph.node}
    assert domains == {""}, "standard ops alone"


def test_an_encoder_has_no_cache(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="whole=True is for decoders"):
        build(build_toy("bert"), tmp_path / "engine", OPTIONS)
    assert not (tmp_path / "engine").exists()


def test_it_is_an_option_of_this_backend() -> None:
    with pytest.raises(OptionError, match="whole is an option of backend='onnxruntime'"):
        CompileOptions(backend="inductor", whole=True)
