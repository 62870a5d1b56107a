"""`evaluate` finds right engines right and wrong ones wrong, and keeps what it found."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import inlay
from inlay.backends.artifact import EVALUATIONS, Artifact, hash_files
from inlay.cli import main
from inlay.engine import Engine, build
from inlay.errors import ArtifactError, ModelLoadError, OptionError
from inlay.eval import EvalOptions, Evaluation, evaluate, evaluate_all
from inlay.eval.measure import PagedRows, measure
from inlay.eval.options import default_limit
from inlay.eval.reference import CACHE_KIND, Reference
from inlay.eval.text import cut, read_text, tokenize
from inlay.lowering.loading import demo_path, load_tokenizer
from inlay.lowering.options import CompileOptions
from inlay.report.artifact import artifact_data, artifact_text
from inlay.report.collect import of_artifact
from tests.toys import build_toy

OPTIONS = CompileOptions(backend="eager", dtype="float32", verify="capture", block_size=16)
SMALL = {"window": 96, "stride": 48, "num_prompts": 3, "num_greedy_tokens": 6}
NUM_TOKENS = 400


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The beginning of the held-out text, NUM_TOKENS tokens and some."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(read_text(None).content[: NUM_TOKENS * 4])
    return file


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The demo model as it is, in float32."""
    return build("demo", tmp_path_factory.mktemp("sound") / "engine", OPTIONS)


@pytest.fixture
def saved(sound: Engine, tmp_path: Path) -> Engine:
    """A copy to keep verdicts in, as yet without any."""
    copy = sound.save(tmp_path / "copy")
    (copy.path / EVALUATIONS).unlink(missing_ok=True)
    return copy


def rounded(bits: int) -> Any:
    """The demo model with its linear weights rounded to so many bits, a scale for each row."""
    model = AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32).eval()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            scale = module.weight.data.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            module.weight.data = (module.weight.data / scale).round() * scale
    return model


@pytest.fixture(scope="module")
def corrupted(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The demo model at three bits, which is far too few."""
    path = tmp_path_factory.mktemp("corrupted") / "engine"
    return build(rounded(3), path, OPTIONS, tokenizer=load_tokenizer("demo"))


def judge(engine: Engine, text: Path, **options: Any) -> Evaluation:
    return evaluate(engine, text=text, **{"max_tokens": NUM_TOKENS, **SMALL, **options})


def plain_perplexity(text: Path, window: int, stride: int) -> float:
    """By transformers alone, window by window, written down a second time."""
    bos, ids = tokenize(read_text(text), load_tokenizer("demo"), NUM_TOKENS)
    model = AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32).eval()
    nats = 0.0
    for begin in range(0, len(ids), stride):
        end = min(begin + stride, len(ids))
        row = torch.tensor([[bos, *ids[max(end - window, 0) : end]]])
        with torch.no_grad():
            logits = model(row).logits[0, :-1]
        new = end - begin
        nats += float(F.cross_entropy(logits[-new:], row[0, -new:], reduction="sum"))
    return math.exp(nats / len(ids))


def test_a_float32_engine_agrees_with_hugging_face(sound: Engine, text: Path) -> None:
    found = judge(sound, text)
    expected = plain_perplexity(text, SMALL["window"], SMALL["stride"])
    # Float32 sums in another order: log-probabilities differ by some 1e-6.
    assert found.reference_perplexity == pytest.approx(expected, rel=1e-5)
    assert found.perplexity == pytest.approx(found.reference_perplexity, rel=1e-5)
    assert found.increase.low <= found.increase.value <= found.increase.high
    assert abs(found.increase.high) < 1e-5
    assert found.kl_mean < 1e-6
    assert found.kl_mean <= found.kl_p99 <= found.kl_max < 1e-5
    assert found.top1_agreement >= 1 - 1 / NUM_TOKENS  # a near tie at the most
    assert found.greedy is not None
    assert (found.greedy.num_prompts, found.greedy.mean_length, found.greedy.num_whole) == (3, 6, 3)
    assert (found.verdict, found.limit) == ("pass", 1e-4)
    assert found.setting.num_tokens == NUM_TOKENS
    assert found.setting.num_windows == math.ceil(NUM_TOKENS / SMALL["stride"])


def test_a_corrupted_engine_fails(corrupted: Engine, text: Path, capsys: Any) -> None:
    found = judge(corrupted, text, reference="demo", limit=0.03)
    assert found.verdict == "fail"
    assert found.increase.low > 0.03
    assert found.kl_mean > 0.05
    assert found.top1_agreement < 0.95
    assert found.greedy is not None
    assert found.greedy.mean_length < 6

    command = ["eval", str(corrupted.path), "--text", str(text), "--reference", "demo"]
    sizes = ["--window", "96", "--stride", "48", "--num-prompts", "0", "--max-tokens", "300"]
    assert main([*command, *sizes, "--limit", "0.03"]) == 1
    assert "FAIL" in capsys.readouterr().out
    assert main([*command, *sizes, "--limit", "10", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert report["evaluations"][0]["verdict"] == "pass"
    assert report["evaluations"][0]["greedy"] is None


def test_engines_of_one_checkpoint_share_a_run_of_it(
    sound: Engine,
    corrupted: Engine,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what it gave comes from the cache the next time."""
    monkeypatch.setenv("INLAY_CACHE_DIR", str(tmp_path))
    runs = 0
    original = Reference._run

    def counted(self: Reference, window: Any) -> Any:
        nonlocal runs
        runs += 1
        return original(self, window)

    monkeypatch.setattr(Reference, "_run", counted)
    options = EvalOptions(window=80, stride=40, max_tokens=200, num_prompts=0)
    both = [
        evaluate_all(
            engines, text=text, reference="demo", options=options, progress=lambda line: None
        )
        for engines in ([sound, corrupted], [corrupted])
    ]
    assert runs == 5
    together, again = both[0][1], both[1][0]
    assert together.perplexity == again.perplexity
    # The head over all rows or over cached ones: the same sums.
    assert again.kl_mean == pytest.approx(together.kl_mean, rel=1e-6)
    assert both[0][0].perplexity < together.perplexity


def test_a_damaged_cache_is_not_used(
    sound: Engine, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INLAY_CACHE_DIR", str(tmp_path))
    sizes = {"window": 64, "stride": 32, "max_tokens": 128, "num_prompts": 0}
    first = judge(sound, text, **sizes)
    (file,) = (tmp_path / CACHE_KIND).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-400] + bytes(400))
    assert judge(sound, text, **sizes).reference_perplexity == first.reference_perplexity


def test_a_narrow_kv_cache_is_judged_with_it(sound: Engine, text: Path) -> None:
    exact = judge(sound, text, num_prompts=0)
    narrow = judge(sound, text, num_prompts=0, kv_cache_dtype="int8")
    assert narrow.kl_mean > 10 * exact.kl_mean
    assert narrow.limit == pytest.approx(exact.limit + 0.005)
    assert narrow.verdict == "pass"


def test_chunks_and_rows_change_nothing(
    sound: Engine, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of logits that do not fit in memory at once, and windows longer than a step."""
    whole = judge(sound, text, num_prompts=0, max_tokens=200)
    monkeypatch.setattr("inlay.eval.measure.ROW_BYTES", 7 * 4 * 4096)
    limits = {**sound.manifest["limits"], "max_num_tokens": 10}
    monkeypatch.setitem(sound.artifact.manifest, "limits", limits)
    parts = judge(sound, text, num_prompts=0, max_tokens=200)
    assert parts.perplexity == pytest.approx(whole.perplexity, rel=1e-5)
    assert parts.kl_mean < 1e-6


def test_windows_of_attention_and_capped_logits(tmp_path: Path) -> None:
    """Gemma 2 caps its logits, so hidden states alone would give others, and keeps two groups of
    KV blocks, one for layers that look back on 8 tokens."""
    model = build_toy("gemma2")
    truth = Reference(model, "gemma2", 64)
    ids = torch.randint(128, (60,)).tolist()
    windows = cut(None, ids, 40, 16)
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([list(windows[0].token_ids)])).logits[0]
    torch.testing.assert_close(truth.rows(windows[0])(0, 16), expected, rtol=1e-5, atol=1e-5)
    assert truth._is_split is False
    engine = build(model, tmp_path / "engine", OPTIONS)
    (scores,) = measure([PagedRows(engine.load_model(), 40, "auto")], truth, windows, print)
    assert scores.sizes == [16, 16, 16, 11]
    torch.testing.assert_close(
        torch.cat(scores.ours), torch.cat(scores.theirs), rtol=1e-5, atol=1e-5
    )
    assert float(torch.cat(scores.divergence).max()) < 1e-5


def test_text_shorter_than_a_window_is_undecided(saved: Engine, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("The for statement iterates over the elements of a sequence.")
    found = evaluate(saved, text=file, num_prompts=2, num_greedy_tokens=2)
    assert (found.verdict, found.ok) == ("undecided", False)
    assert found.increase.value == pytest.approx(0, abs=1e-5)
    assert found.to_json()["increase"]["high"] is None
    assert main(["eval", str(saved.path), "--text", str(file), "--num-prompts", "0"]) == 2


def test_verdicts_are_kept_by_text_and_setting(saved: Engine, text: Path) -> None:
    assert saved.evaluations == []
    small = {"max_tokens": 150, "num_prompts": 0}
    first = judge(saved, text, **small)
    judge(saved, text, **small, kv_cache_dtype="fp8")
    judge(saved, text, **small, limit=5.0)  # takes the first one's place
    again = Engine.load(saved.path, check_weights=True)
    kept = again.evaluations
    assert [(one["setting"]["kv_cache_dtype"], one["limit"]) for one in kept] == [
        ("fp8", pytest.approx(0.0051)),
        ("auto", 5.0),
    ]
    assert kept[1]["perplexity"] == first.perplexity
    assert kept[1]["setting"]["text_sha256"] == read_text(text).sha256
    assert again.save(saved.path.parent / "moved").evaluations == kept


def test_inspect_shows_what_was_found(saved: Engine, text: Path) -> None:
    judge(saved, text, max_tokens=150, num_prompts=0)
    data = artifact_data(saved, of_artifact("saved", saved), False)
    assert data["evaluations"] == saved.evaluations
    (line,) = [line for line in artifact_text(data).splitlines() if "evaluation" in line]
    assert "pass: perplexity" in line
    assert "150 tokens" in line


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data["evaluations"][0].update(verdict="fail"),
        lambda data: data.update(manifest_sha256="0" * 64),
        lambda data: data.pop("sha256"),
    ],
)
def test_verdicts_that_were_edited_or_belong_elsewhere_do_not_count(
    saved: Engine, text: Path, damage: Callable[[dict[str, Any]], Any], caplog: Any
) -> None:
    judge(saved, text, max_tokens=100, num_prompts=0)
    file = saved.path / EVALUATIONS
    data = json.loads(file.read_text())
    damage(data)
    file.write_text(json.dumps(data))
    assert Engine.load(saved.path).evaluations == []
    assert "run `inlay eval` again" in caplog.text
    judge(saved, text, max_tokens=100, num_prompts=0)
    assert len(saved.evaluations) == 1


def test_the_manifest_does_not_know_of_verdicts(saved: Engine) -> None:
    before = hash_files(saved.path)
    (saved.path / f"{EVALUATIONS}.123").write_text("being written")
    (saved.path / EVALUATIONS).write_text("{}")
    assert hash_files(saved.path) == before
    Artifact(saved.path)
    (saved.path / "other.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"other\.json is not of this artifact"):
        Artifact(saved.path)


def test_an_artifact_that_cannot_be_written_is_judged(
    saved: Engine, text: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def refuse(*args: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("inlay.eval.store.fcntl.flock", refuse)
    assert judge(saved, text, max_tokens=100, num_prompts=0).ok
    assert "verdict is not kept" in caplog.text


def test_a_reference_of_another_architecture_is_refused(saved: Engine, text: Path) -> None:
    with pytest.raises(OptionError, match="its model_type is llama, the reference's qwen3"):
        judge(saved, text, reference=build_toy("qwen3"))
    with pytest.raises(OptionError, match="its hidden_size is 256, the reference's 64"):
        judge(saved, text, reference=build_toy("llama"))


def test_without_a_reference_it_is_asked_for(
    sound: Engine, corrupted: Engine, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=r"does not say what checkpoint.*--reference"):
        judge(corrupted, text)
    with pytest.raises(ModelLoadError, match="--reference DIR"):
        judge(sound, text, reference=str(tmp_path / "gone"))
    options = EvalOptions(**SMALL)
    with pytest.raises(OptionError, match="different models, MODEL, demo"):
        evaluate_all([sound, corrupted], text=text, reference=None, options=options, progress=print)


def test_an_engine_without_a_tokenizer_needs_one(saved: Engine, text: Path) -> None:
    for file in saved.artifact.model_dir.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(OptionError, match=r"no tokenizer at .*--tokenizer DIR"):
        judge(saved, text)
    found = judge(saved, text, max_tokens=100, num_prompts=0, tokenizer="demo")
    assert found.setting.num_tokens == 100
    with pytest.raises(OptionError, match=r"no tokenizer at .*gone"):
        judge(saved, text, tokenizer=saved.path / "gone")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "window must be an integer of at least 2, got 1"),
        ({"stride": True}, "stride must be an integer of at least 1, got True"),
        ({"limit": -0.1}, "limit must be a share"),
        ({"limit": math.nan}, "limit must be a share"),
        ({"kv_cache_dtype": "int3"}, "kv_cache_dtype must be one of"),
        ({"num_greedy_tokens": 2047}, "leave room for a prompt"),
    ],
)
def test_wrong_options_are_refused(
    sound: Engine, text: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        judge(sound, text, **{"max_tokens": 50, **options})


def test_limits() -> None:
    assert default_limit("w8a16", "bfloat16", "auto") == 0.005
    assert default_limit("w4a16,group_size=64", "bfloat16", "bfloat16") == 0.03
    assert default_limit("w8a8", "float32", "int8") == pytest.approx(0.015)
    assert default_limit(None, "bfloat16", "fp8") == pytest.approx(0.006)
    with pytest.raises(OptionError, match=r"quantization 'w2a2'.*give limit"):
        default_limit("w2a2", "float32", "auto")


def test_it_is_there_from_the_front_door() -> None:
    assert inlay.evaluate is evaluate
