"""Every architecture, through every backend: Hugging Face's tokens, in ragged, mixed and chunked
batches, and again from the saved artifact in another process."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from inlay import LLM, Engine, RequestOutput, SamplingParams, compile_model
from inlay.backends.step import StepRequest, build_step
from inlay.lowering.loading import demo_path
from inlay.passes.check import relative_rms
from inlay.verify import compare_greedy
from tests.toys import TOYS, build_toy

BACKENDS = ("eager", "inductor")
MODELS = (*TOYS, "demo")
PROMPT_LENGTHS = (1, 5, 19, 40, 2, 33)
NUM_TOKENS = 24
RUN = """
import json, sys
from inlay import LLM, Engine, SamplingParams
results = {}
for path in sys.argv[2:]:
    llm = LLM(Engine.load(path), kv_cache_tokens=1024)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    outputs = llm.generate(json.loads(sys.argv[1]), params, use_tqdm=False)
    results[path] = [list(output.outputs[0].token_ids) for output in outputs]
print(json.dumps(results))
"""


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randint(3, 128, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS
    ]


def load(name: str) -> PreTrainedModel:
    if name == "demo":
        return AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32).eval()
    return build_toy(name)


def generate(engine: Engine, **options: int) -> list[RequestOutput]:
    llm = LLM(engine, kv_cache_tokens=1024, **options)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    return llm.generate(prompts(), params, use_tqdm=False)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[list[int]]]]:
    """Tokens by backend and artifact path, filled by the tests below in their order."""
    return {backend: {} for backend in BACKENDS}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_are_those_of_hugging_face(
    backend: str,
    name: str,
    tmp_path_factory: pytest.TempPathFactory,
    artifacts: dict[str, dict[str, list[list[int]]]],
) -> None:
    model = load(name)
    engine = compile_model(model, backend, dtype="float32", block_size=16)
    errors = engine.manifest["errors"]
    # Teacher-forced logits through capture, and through a chunked, mixed, paged run.
    assert errors["capture"] <= 1e-4
    assert errors["engine"] <= 1e-4
    for report in engine.manifest["passes"]:
        assert report["expected"] in (None, report["matches"]), report
        assert not report["misses"]

    ragged = generate(engine)
    # Budget and slots so small that prompts are chunked and requests join while others decode.
    chunked = generate(engine, max_num_tokens=7, max_num_seqs=3)
    for outputs in (ragged, chunked):
        comparison = compare_greedy(outputs, model, errors["engine"])
        assert comparison.num_tokens == len(PROMPT_LENGTHS) * NUM_TOKENS
        assert comparison.passed, comparison
    if name != "demo":  # a trained model may well repeat itself
        distinct = [len(set(output.outputs[0].token_ids)) for output in ragged]
        assert sum(distinct) / len(distinct) >= 12

    path = tmp_path_factory.mktemp(f"{backend}-{name}") / "engine"
    engine.save(path)
    artifacts[backend][str(path)] = [list(output.outputs[0].token_ids) for output in ragged]


@pytest.mark.parametrize("backend", BACKENDS)
def test_reloaded_in_another_process_the_tokens_are_the_same(
    backend: str, artifacts: dict[str, dict[str, list[list[int]]]], tmp_path: Path
) -> None:
    expected = artifacts[backend]
    assert len(expected) == len(MODELS)
    command = [sys.executable, "-c", RUN, json.dumps(prompts()), *expected]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == expected


def last_logits(engine: Engine, requests: list[list[int]]) -> torch.Tensor:
    """Logits after each request's last token, [len(requests), vocab], eight requests a step."""
    model = engine.load_model()
    model.allocate_kv_cache(16)
    rows = []
    for first in range(0, len(requests), 8):
        batch = [
            StepRequest(ids, 0, [[2 * slot, 2 * slot + 1]] * len(model.kv_groups))
            for slot, ids in enumerate(requests[first : first + 8])
        ]
        step = build_step(batch, model.limits.block_size)
        rows.append(model.forward(step)[: step.num_logits].float())
    return torch.cat(rows)


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_bfloat16_is_as_exact_as_hugging_face_in_bfloat16(name: str) -> None:
    narrow = load(name).to(torch.bfloat16)
    exact = copy.deepcopy(narrow).float()
    engine = compile_model(narrow, "eager", dtype="bfloat16")
    requests = torch.randint(3, 128, (64, 24)).tolist()
    ours = last_logits(engine, requests)
    ids = torch.tensor(requests)
    truth = exact(input_ids=ids).logits[:, -1]
    theirs = narrow(input_ids=ids).logits[:, -1].float()
    assert 0 < relative_rms(truth, ours) <= 1.25 * relative_rms(truth, theirs)

    def divergence(logits: torch.Tensor) -> torch.Tensor:
        """KL(truth || logits), mean over rows, in nats."""
        return F.kl_div(
            logits.log_softmax(-1), truth.log_softmax(-1), log_target=True, reduction="batchmean"
        )

    assert divergence(ours) <= 1.25 * divergence(theirs)
