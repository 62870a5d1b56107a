"""Checkpoints: what is wrong with one is said by name; nothing is filled with random numbers."""

from __future__ import annotations

import copy
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, dynamic_module_utils, modeling_utils

from inlay import compile_model
from inlay.errors import InlayError, ModelLoadError, OptionError, UnsupportedModelError
from inlay.lowering.loading import demo_path, load_source, load_tokenizer, resolve
from tests.runtime.toy_tokenizers import byte_level
from tests.toys import build_toy

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "llama"
    build_toy("llama", layers=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "sharded"
    build_toy("llama", layers=1).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_bytes(change: Callable[[bytearray], Any]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        data = bytearray((folder / WEIGHTS).read_bytes())
        result = change(data)
        (folder / WEIGHTS).write_bytes(data if result is None else result)

    return run


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        weights = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
        change(weights)
        save_file(weights, folder / WEIGHTS, {"format": "pt"})

    return run


def pickled(data: bytes) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / "pytorch_model.bin").write_bytes(data)

    return run


UP_PROJ = "model.layers.0.mlp.up_proj.weight"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (edit_bytes(lambda data: data[:-1000]), "cannot be read: .*truncated, download"),
    "empty": (edit_bytes(lambda data: b""), "cannot be read: .*damaged or truncated"),
    "cut in the header": (edit_bytes(lambda data: data[:100]), "cannot be read: .*damaged or"),
    "corrupt header": (edit_bytes(lambda data: data.__setitem__(20, 255)), "cannot be read: .*dam"),
    "corrupt length": (
        edit_bytes(lambda data: data.__setitem__(slice(0, 8), b"\xff" * 8)),
        "cannot be read: .*damaged",
    ),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "cannot be read: .*no file named"),
    "junk for a pickle": (pickled(b"junk" * 100), "cannot be (read|loaded): "),
    "a weight missing": (
        edit_weights(lambda weights: weights.pop(UP_PROJ)),
        f"missing weights .'{UP_PROJ}'.*would fill them with random numbers",
    ),
    "a weight of another shape": (
        edit_weights(lambda weights: weights.update({UP_PROJ: torch.ones(3, 64)})),
        f"wrong shapes .*{UP_PROJ}.*3, 64",
    ),
    "more layers than weights": (
        lambda folder: edit_config(folder, num_hidden_layers=2),
        r"missing weights \['model\.layers\.1\.input_layernorm",
    ),
    "another size": (lambda folder: edit_config(folder, hidden_size=128), "wrong shapes .*lm_head"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "half a config": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "llama",'),
        "config.json.* is not a valid JSON",
    ),
    "an impossible config": (
        lambda folder: edit_config(folder, num_attention_heads=0),
        "cannot be loaded: ",
    ),
    "a config of wrong types": (
        lambda folder: edit_config(folder, hidden_size="64"),
        "cannot be loaded: .*hidden_size",
    ),
    "half a tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text('{"model":'),
        r"tokenizer in .* \(tokenizer.json\) cannot be read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named(damage: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "damaged"))
    spoil, message = DAMAGE[damage]
    spoil(folder)
    with pytest.raises(ModelLoadError, match=message) as caught:
        load_source(folder, "auto")
    assert str(folder) in str(caught.value)
    assert load_source(checkpoint, "auto").model.num_parameters() > 0


def test_a_missing_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "damaged"))
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelLoadError, match=f"cannot be read: .*{shard.name}"):
        load_source(folder, "auto")
    index = folder / "model.safetensors.index.json"
    for text in (index.read_text()[:50], "[]", "{}", '{"weight_map": 3, "metadata": {}}'):
        index.write_text(text)
        with pytest.raises(ModelLoadError, match=f"checkpoint {folder} cannot be"):
            load_source(folder, "auto")


def test_a_shard_that_is_cut_or_lacks_a_weight(sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "damaged"))
    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(ModelLoadError, match=r"cannot be read: .*truncated, download"):
        load_source(folder, "auto")
    shard.write_bytes(whole)
    weights = {name: tensor.clone() for name, tensor in load_file(shard).items()}
    lost = sorted(weights)[0]
    del weights[lost]
    save_file(weights or {"nothing": torch.ones(1)}, shard, {"format": "pt"})
    with pytest.raises(ModelLoadError, match=f"missing weights .'{lost}'"):
        load_source(folder, "auto")


def test_directories_that_hold_too_little(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"has no config\.json"):
        load_source(tmp_path, "auto")
    build_toy("llama", layers=1).config.save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=r"cannot be read: .*no file named"):
        load_source(tmp_path, "auto")


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "neither kind": ({"model_type": "vit"}, "cannot be loaded: .*ViTConfig"),
    "unknown": ({"model_type": "wibble"}, "model type `wibble`"),
    "no model type": ({"model_type": ""}, "cannot be loaded: "),
    "code of its own": (
        {"model_type": "wibble", "auto_map": {"AutoConfig": "configuration_x.X"}},
        r"Python code of its own .*configuration_x\.X.*trust_remote_code=True \(--trust-remote",
    ),
    "quantized": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        r"quantized with 'bitsandbytes' \(quantization_config\), which is not supported",
    ),
    "quantized, in words": ({"compression_config": "fp8"}, r"quantized with 'fp8' \(compression_"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_a_checkpoint_that_is_not_supported(
    case: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, message = UNSUPPORTED[case]
    folder = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    edit_config(folder, **changes)
    (folder / WEIGHTS).unlink()  # refused before the weights are read
    with pytest.raises(UnsupportedModelError, match=message):
        load_source(folder, "auto")
    assert "Do you wish to run" not in capsys.readouterr().out, "a library does not ask questions"


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_that_no_config_tells_of(
    dtype: torch.dtype, checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    tensors = load_file(folder / WEIGHTS)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(dtype)}, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=rf"is quantized: {name} in .* is (I8|F8_E4M3)"):
        load_source(folder, "auto")


def test_an_adapter_beside_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    with pytest.raises((UnsupportedModelError, ModelLoadError), match=r"adapter"):
        load_source(folder, "auto")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite(value: float, checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    tensors = load_file(folder / WEIGHTS)
    tensors["model.embed_tokens.weight"][127, 3] = value
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(
        ModelLoadError, match=r"holds NaN or infinity in model\.embed_tokens\.weight"
    ):
        load_source(folder, "auto")


def test_a_model_without_its_head(tmp_path: Path) -> None:
    build_toy("llama", layers=1).model.save_pretrained(tmp_path / "base")
    with pytest.raises(ModelLoadError, match=r"missing weights \['lm_head.weight'\]"):
        load_source(tmp_path / "base", "auto")


@pytest.mark.parametrize(
    "name", ["nowhere", "/nowhere/model", "./nowhere", "~/nowhere", "a/b/c", "../a/b"]
)
def test_a_place_that_does_not_exist(name: str) -> None:
    with pytest.raises(
        ModelLoadError, match=rf"model '{name}' is not a directory, a hub id \(owner/name\) or"
    ):
        load_source(name, "auto")


def test_places_that_hold_something_else(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="is not a directory, a hub id"):
        load_source(checkpoint / WEIGHTS, "auto")
    (tmp_path / "inlay.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"no config.json: .* load it with Engine.load"):
        load_source(tmp_path, "auto")


def test_weights_that_the_config_has_no_use_for_are_told(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "more"))
    edit_weights(lambda weights: weights.update({"model.layers.7.extra": torch.ones(3)}))(folder)
    load_source(folder, "auto")
    assert "no use for: ['model.layers.7.extra']" in caplog.text


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_a_checkpoint_is_loaded_as_it_is(checkpoint: Path, dtype: str) -> None:
    source = load_source(str(checkpoint), dtype)
    expected = getattr(torch, dtype, torch.float32)
    assert {p.dtype for p in source.model.parameters()} == {expected}
    assert not source.model.training
    assert source.name == str(checkpoint)
    assert source.tokenizer is None
    for name, tensor in load_file(checkpoint / WEIGHTS).items():
        assert torch.equal(source.model.get_parameter(name), tensor.to(expected))


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_with_tied_weights_in_any_dtype(stored: str, dtype: str, tmp_path: Path) -> None:
    model = build_toy("gemma2", getattr(torch, stored), layers=2, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    names = {name for f in (tmp_path / "model").glob("*.safetensors") for name in load_file(f)}
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    assert "lm_head.weight" not in names, "the checkpoint stores it twice: pointless"
    loaded = load_source(tmp_path / "model", dtype).model
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    for name, tensor in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), tensor.to(getattr(torch, dtype)))

    engine = compile_model(tmp_path / "model", "eager", dtype=dtype)
    index = engine.artifact.json("weights/index.json")
    vocabulary, width = model.get_input_embeddings().weight.shape
    stored_weights = [
        tensor
        for file in (engine.path / "weights").glob("*.safetensors")
        for tensor in load_file(file).values()
    ]
    assert len([t for t in stored_weights if tuple(t.shape) == (vocabulary, width)]) == 1
    assert {t.dtype for t in stored_weights if t.dim() == 2} == {getattr(torch, dtype)}
    assert len(index) > 3


def test_reading_without_mapping_is_undone(tmp_path: Path) -> None:
    build_toy("llama", layers=1).save_pretrained(tmp_path / "model")
    before = modeling_utils.safe_open
    load_source(tmp_path / "model", "bfloat16")
    (tmp_path / "model" / WEIGHTS).write_bytes(b"")
    with pytest.raises(ModelLoadError):
        load_source(tmp_path / "model", "bfloat16")
    assert modeling_utils.safe_open is before


# --- pickles ---------------------------------------------------------------------------------


class Hostile:
    """Unpickling it runs a command."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


def as_bin(folder: Path, shards: int, **extra: Any) -> None:
    """The checkpoint's safetensors as pytorch_model.bin, or as shards of it with an index."""
    weights = list(load_file(folder / WEIGHTS).items())
    (folder / WEIGHTS).unlink()
    parts = [dict(weights[n::shards]) for n in range(shards)]
    parts[-1] |= extra
    if shards == 1:
        torch.save(parts[0], folder / "pytorch_model.bin")
        return
    places = {}
    for number, part in enumerate(parts):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        torch.save(part, folder / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pickled_tensors_are_loaded(
    shards: int, dtype: str, checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "bin"))
    as_bin(folder, shards)
    loaded = load_source(folder, dtype).model
    for name, tensor in load_file(checkpoint / WEIGHTS).items():
        assert torch.equal(loaded.get_parameter(name), tensor.to(getattr(torch, dtype)))


@pytest.mark.parametrize("shards", [1, 3])
def test_a_hostile_pickle_is_refused_and_not_run(
    shards: int, checkpoint: Path, tmp_path: Path
) -> None:
    folder, trace = Path(shutil.copytree(checkpoint, tmp_path / "bin")), tmp_path / "trace"
    as_bin(folder, shards, hostile=Hostile(trace))
    with pytest.raises(ModelLoadError, match=r"\.bin file .*system.*never unpickled.*safetensors"):
        load_source(folder, "auto")
    assert not trace.exists()
    shutil.copy(checkpoint / WEIGHTS, folder)
    assert load_source(folder, "auto").model.num_parameters() > 0, "safetensors come first"
    assert not trace.exists()
    worst = next(folder.glob("*.bin"))
    torch.save(Hostile(trace), worst)
    torch.load(worst, weights_only=False)
    assert trace.exists(), "it was not hostile: pointless"


# --- code that a checkpoint brings -----------------------------------------------------------

CONFIG_CODE = """
from pathlib import Path
from transformers import LlamaConfig

Path({trace!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""

MODEL_CODE = """
from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = -out.logits
        return out
"""


@pytest.fixture
def own_code(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with a model class of its own, which leaves a trace when it is imported."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = Path(shutil.copytree(checkpoint, tmp_path / f"own{len(os.listdir(tmp_path))}"))
    code = CONFIG_CODE.format(trace=str(tmp_path / "trace"))
    (folder / "configuration_own.py").write_text(code)
    (folder / "modeling_own.py").write_text(MODEL_CODE)
    auto_map = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    edit_config(folder, model_type="own_llama", auto_map=auto_map)
    return folder


def test_code_of_a_checkpoint_is_run_only_when_trusted(own_code: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"modeling_own.*trust_remote_code=True"):
        compile_model(own_code, "eager")
    assert not (tmp_path / "trace").exists()
    engine = compile_model(own_code, "eager", trust_remote_code=True)
    assert (tmp_path / "trace").exists()
    assert engine.manifest["architecture"] == "own_llama"
    assert engine.manifest["errors"]["engine"] < 1e-4
    assert engine.manifest["rebuild"].endswith("--trust-remote-code")
    own = load_source(own_code, "auto", trust_remote_code=True).model
    assert type(own).__module__.startswith("transformers_modules.")
    ids = torch.arange(5)[None]
    plain = LlamaForCausalLM.from_pretrained(own_code, config=own.config)
    torch.testing.assert_close(own(ids).logits, -plain(ids).logits)  # its forward is what ran


def test_code_of_a_checkpoint_whose_type_transformers_has(own_code: Path, tmp_path: Path) -> None:
    edit_config(own_code, model_type="llama")
    assert type(load_source(own_code, "auto").model) is LlamaForCausalLM
    assert not (tmp_path / "trace").exists()


def test_a_model_in_memory_of_another_dtype_is_converted_and_not_changed() -> None:
    model = build_toy("gemma2", torch.float32, tie_word_embeddings=True)
    model.generation_config.eos_token_id = [5, 6]
    before = copy.deepcopy(model.state_dict()), model.config.to_dict()
    source = load_source(model, "bfloat16")
    assert source.model is not model
    assert {p.dtype for p in source.model.parameters()} == {torch.bfloat16}
    assert source.model.lm_head.weight is source.model.model.embed_tokens.weight
    assert source.model.generation_config.eos_token_id == [5, 6]
    assert model.config.to_dict() == before[1]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[0][name])
        assert tensor.dtype == torch.float32
        assert torch.equal(source.model.state_dict()[name], tensor.bfloat16())
    assert load_source(model, "auto").model is model
    assert load_source(model, "float32").model is model


def test_mixed_dtypes_become_one() -> None:
    model = build_toy("llama", layers=1)
    model.lm_head.bfloat16()
    source = load_source(model, "auto")
    assert {p.dtype for p in source.model.parameters()} == {torch.float32}
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert source.model.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()
    norm = source.model.model.norm.weight
    assert norm.data_ptr() == model.model.norm.weight.data_ptr(), "copied without need"


def test_a_dtype_that_no_engine_has() -> None:
    model = build_toy("llama", layers=1).double()
    with pytest.raises(OptionError, match=r"'auto' takes the model's own, torch.float64.*give one"):
        load_source(model, "auto")
    assert load_source(model, "float32").model.dtype == torch.float32


def test_tokenizers(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    byte_level().save_pretrained(tmp_path / "tokenizer")
    model = build_toy("llama", layers=1)
    for given in (byte_level(), tmp_path / "tokenizer", str(tmp_path / "tokenizer")):
        for source in (model, checkpoint):
            tokenizer = load_source(source, "auto", given).tokenizer
            assert tokenizer.encode("a fox") == byte_level().encode("a fox")
    assert load_source(model, "auto").tokenizer is None
    assert load_tokenizer(checkpoint) is None
    assert not caplog.records, "that there is none is no news"
    for source in (model, checkpoint):
        with pytest.raises(OptionError, match="no tokenizer at tokenizer='/nowhere'"):
            load_source(source, "auto", "/nowhere")
        with pytest.raises(OptionError, match=r"must be a transformers tokenizer, .* got int"):
            load_source(source, "auto", 42)


def test_demo_is_a_name() -> None:
    assert resolve("demo") == str(demo_path())
    assert resolve("owner/name") == "owner/name"
    assert load_source("demo", "auto").tokenizer.chat_template


# --- the hub ---------------------------------------------------------------------------------

ASK = """
import sys, time
import inlay.lowering.loading as loading
from inlay.errors import ModelLoadError
loading.HUB_TIMEOUT = 0.5
begin = time.perf_counter()
try:
    loading.load_source("owner/name", "auto")
except ModelLoadError as error:
    print(error)
assert loading.load_tokenizer("owner/name") is None
print(time.perf_counter() - begin)
"""


def ask_the_hub(**environment: str) -> tuple[str, float]:
    """The message for a hub id and the seconds until it came, in a process of its own."""
    kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    kept.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        capture_output=True,
        text=True,
        env={**kept, **environment},
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *message, seconds = done.stdout.strip().splitlines()
    return " ".join(message), float(seconds)


def test_a_hub_that_never_answers_is_given_up_quickly(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        message, seconds = ask_the_hub(HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path))
    assert "model 'owner/name' is not a local directory" in message
    assert "hub cannot give it (no network, HF_HUB_OFFLINE set, or no such model)" in message
    assert seconds < 20, "its client alone takes minutes"


def test_offline_the_hub_is_not_even_asked() -> None:
    begin = time.perf_counter()
    with pytest.raises(InlayError, match=r"hub cannot give it .* HF_HUB_OFFLINE set"):
        load_source("owner/name", "auto")
    assert time.perf_counter() - begin < 2
