"""A mutation check: every part that can be silently wrong is broken once, and noticed.

Each mutant in mutants.py breaks one part; the build of a toy must then fail in the guard that is
there for it, and the same build without the mutant must pass (`right_build`).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from inlay import LLM, SamplingParams
from inlay.backends.kernels.cpu_attention import CpuAttention
from inlay.backends.kernels.cpu_ops import load_ops
from inlay.backends.model import ProgramModel
from inlay.errors import RequestError, UnsupportedModelError, VerificationError
from inlay.lowering import capture as capture_module
from inlay.lowering.attention import ATTENTION
from inlay.lowering.guards import check_engine
from inlay.lowering.support import NotCapturableError
from inlay.passes.pass_manager import CAPTURE_PASSES, PASSES
from inlay.verify import TokenComparison, compare_greedy
from tests import mutants
from tests.breaking import Break, Patch, Toy, after_pass, build, reuse, right_build

CAPTURE = "^(the captured graph does not compute|architecture '.*' cannot be captured|module )"
ENGINE = "^the eager engine does not compute what Hugging Face computes"


def refused(
    monkeypatch: pytest.MonkeyPatch, toy: Toy, mutant: Break, begin: str, verify: str, message: str
) -> None:
    reuse(monkeypatch, toy, begin)
    patch = Patch(monkeypatch)
    mutant(patch)
    with pytest.raises((VerificationError, UnsupportedModelError), match=message):
        build(right_build(toy).model, verify)
    assert patch.reached, "the broken part was never used"


def each(table: dict[str, Any]) -> Any:
    return pytest.mark.parametrize("name", table)


@each(mutants.ATTENTION | mutants.EXPERTS | mutants.POSITIONS)
def test_ops(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, mutant = (mutants.ATTENTION | mutants.EXPERTS | mutants.POSITIONS)[name]
    refused(monkeypatch, toy, mutant, "passes", "capture", CAPTURE)


@each(mutants.EXPORT)
def test_capture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, mutant = mutants.EXPORT[name]
    refused(monkeypatch, toy, mutant, "export", "capture", CAPTURE)


@each(mutants.MASKS)
def test_masks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, mutant = mutants.MASKS[name]
    right = capture_module._capture

    def without_plain_graph(model: Any, attention: str | None, *rest: Any) -> Any:
        if attention != ATTENTION:
            raise NotCapturableError("not looked at")
        return right(model, attention, *rest)

    monkeypatch.setattr(capture_module, "_capture", without_plain_graph)
    message = "^architecture '.*' cannot be captured: module .* calls attention with .* its mask is"
    refused(monkeypatch, toy, mutant, "model", "capture", message)


@each(mutants.GRAPH)
def test_capture_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, mutant = mutants.GRAPH[name]
    refused(monkeypatch, toy, mutant, "graph", "capture", CAPTURE)


@each(mutants.CANONICALISE)
def test_canonicalise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, mutant = mutants.CANONICALISE[name]
    refused(monkeypatch, toy, mutant, "passes", "pass", "^pass canonicalise changed the outputs")


@pytest.mark.parametrize(("name", "pass_name"), [(n, p) for n, (_, p, _) in mutants.PASSES.items()])
def test_passes(name: str, pass_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, _, edit = mutants.PASSES[name]
    message = f"^pass {pass_name} changed the outputs"
    refused(monkeypatch, toy, after_pass(pass_name, edit), "passes", "pass", message)


@each(mutants.ENGINE)
def test_engine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, mutant = mutants.ENGINE[name]
    refused(monkeypatch, toy, mutant, "passes", "engine", ENGINE)


@each(mutants.FROM_EXPORT)
def test_engine_from_the_export_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, mutant = mutants.FROM_EXPORT[name]
    refused(monkeypatch, toy, mutant, "export", "engine", ENGINE)


@pytest.fixture
def cpu_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The C++ op attends for engines that interpret everything else."""
    load_ops()
    monkeypatch.setattr("inlay.backends.eager.backend.ReferenceAttention", CpuAttention)


@pytest.mark.parametrize("toy", [mutants.MISTRAL, mutants.GPT_OSS, mutants.ALIBI])
def test_right_cpu_attention(
    toy: Toy, cpu_attention: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    reuse(monkeypatch, toy, "passes")
    assert build(right_build(toy).model, "engine").manifest["errors"]["engine"] < 1e-5


@each(mutants.CPU_ATTENTION)
def test_cpu_attention(name: str, cpu_attention: None, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, mutant = mutants.CPU_ATTENTION[name]
    refused(monkeypatch, toy, mutant, "passes", "engine", ENGINE)


@each(mutants.COMPILED)
def test_compiled_segments(name: str) -> None:
    subject = right_build(mutants.COMPILED_TOY, "inductor")
    assert subject.engine is not None
    assert subject.references is not None
    model = subject.engine.load_model()
    assert isinstance(model, ProgramModel)
    mutants.COMPILED[name](model)
    with pytest.raises(VerificationError, match=r"^the inductor engine does not compute"):
        check_engine(model, subject.references, "the inductor engine")


def tokens(engine: Any, toy: Toy) -> TokenComparison:
    """Three requests of two slots, the longest in chunks, against Hugging Face.

    Overlapped, and decodes padded as for graphs: the parts that only a device needs run too.
    """
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(3, 128, (n,), generator=generator).tolist() for n in (5, 40, 19)]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    options = {"kv_cache_tokens": 256, "max_num_tokens": 24, "max_num_seqs": 2}
    with LLM(engine, in_process=True, overlap=True, cuda_graphs=True, **options) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    return compare_greedy(outputs, right_build(toy).model, 1e-6)


@each(mutants.RUNTIME)
def test_runtime(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patch = Patch(monkeypatch)
    mutants.RUNTIME[name](patch)
    try:
        passed = tokens(right_build(mutants.TWO_LAYERS).engine, mutants.TWO_LAYERS).passed
    except RequestError as error:  # blocks that nobody has written may hold NaN
        assert "its logits are NaN" in str(error)  # noqa: PT017
        passed = False
    assert patch.reached
    assert not passed


@each(mutants.TOKENS_OF_A_BUILD)
def test_tokens_of_a_build(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, mutant = mutants.TOKENS_OF_A_BUILD[name]
    assert tokens(right_build(toy).engine, toy).passed
    patch = Patch(monkeypatch)
    mutant(patch)
    found = tokens(build(right_build(toy).model, "engine"), toy)
    assert patch.reached
    assert not found.passed, found


def test_without_a_mutant_the_tokens_are_right() -> None:
    found = tokens(right_build(mutants.TWO_LAYERS).engine, mutants.TWO_LAYERS)
    assert found.num_tokens == 60
    assert found.passed


def test_every_pass_has_mutants() -> None:
    broken = Counter(pass_name for _, pass_name, _ in mutants.PASSES.values())
    broken["canonicalise"] = len(mutants.CANONICALISE)
    broken.update(name.partition(":")[0] for name in mutants.GRAPH)
    assert all(broken[one.name] >= 2 for one in (*PASSES, *CAPTURE_PASSES)), broken
    assert len(mutants.ATTENTION) >= 10
