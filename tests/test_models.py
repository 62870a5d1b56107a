"""Saved and loaded again in another process, an engine gives the same tokens: Hugging Face's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from inlay import compile_model
from inlay.lowering.loading import demo_path
from inlay.verify import compare_greedy
from tests.test_architectures import generate, prompts
from tests.toys import build_toy

MODELS = {"eager": ("demo", "gemma2", "gpt2"), "inductor": ("gpt2",)}
RUN = """
import json, sys
from inlay import LLM, Engine, SamplingParams
results = []
for path in sys.argv[2:]:
    llm = LLM(Engine.load(path), in_process=True, kv_cache_tokens=2048)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    outputs = llm.generate(json.loads(sys.argv[1]), params, use_tqdm=False)
    results.append([output.outputs[0].token_ids for output in outputs])
print(json.dumps(results))
"""


def load(name: str) -> PreTrainedModel:
    if name == "demo":
        return AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32).eval()
    return build_toy(name)


@pytest.mark.parametrize("backend", MODELS)
def test_tokens_in_another_process(backend: str, tmp_path: Path) -> None:
    expected = []
    for name in MODELS[backend]:
        model = load(name)
        engine = compile_model(model, backend, dtype="float32", block_size=16)
        outputs = generate(engine)
        assert compare_greedy(outputs, model, engine.manifest["errors"]["engine"]).passed
        expected.append([output.outputs[0].token_ids for output in outputs])
        engine.save(tmp_path / name)
    paths = [str(tmp_path / name) for name in MODELS[backend]]
    command = [sys.executable, "-c", RUN, json.dumps(prompts()), *paths]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == expected
