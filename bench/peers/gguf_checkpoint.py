"""A Hugging Face checkpoint in bfloat16 as a GGUF file, for llama.cpp; no vocabulary.

Formats: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and safetensors' README. Names,
the order of rotary halves in Llama's projections and its rope factors are those of llama.cpp's
convert_hf_to_gguf.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

ARCHITECTURES = {
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "llama": gguf.MODEL_ARCH.LLAMA,
}


def write_gguf(checkpoint: Path, file: Path) -> None:
    """Matrices as they are, vectors in float32."""
    config = json.loads((checkpoint / "config.json").read_text())
    model_type = config["model_type"]
    if model_type not in ARCHITECTURES:
        raise SystemExit(f"model_type must be one of {', '.join(ARCHITECTURES)}, got {model_type}")
    arch = ARCHITECTURES[model_type]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[arch])
    _add_facts(writer, config)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    if (factors := _rope_factors(config)) is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    for name, bits in read_tensors(checkpoint):
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None or (name == "lm_head.weight" and config["tie_word_embeddings"]):
            continue
        if model_type == "llama":
            bits = _rotary_pairs(name, bits, config)
        if bits.ndim == 1:
            writer.add_tensor(known, (bits.astype(np.uint32) << 16).view(np.float32))
        else:
            data = np.ascontiguousarray(bits).view(np.uint8)
            writer.add_tensor(known, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_tensors(checkpoint: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, bits of bfloat16 as uint16) of all tensors of a checkpoint."""
    for file in sorted(checkpoint.glob("*.safetensors")):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "BF16":
                raise SystemExit(f"{name} must be BF16, got {entry['dtype']}")
            begin = 8 + length + entry["data_offsets"][0]
            shape = tuple(entry["shape"])
            yield name, np.memmap(file, np.uint16, "r", begin, shape)


def _add_facts(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    num_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    rope = config.get("rope_parameters") or config
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")


def _rotary_pairs(name: str, bits: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """llama.cpp rotates neighbours where Hugging Face rotates halves; Llama's weights are
    reordered for that."""
    if name.endswith("q_proj.weight"):
        num_heads = config["num_attention_heads"]
    elif name.endswith("k_proj.weight"):
        num_heads = config["num_key_value_heads"]
    else:
        return bits
    halves = bits.reshape(num_heads, 2, -1, bits.shape[1])
    return halves.swapaxes(1, 2).reshape(bits.shape)


def _rope_factors(config: dict[str, Any]) -> np.ndarray | None:
    """What llama3's rope scaling divides each frequency by, [head_dim / 2]; else None."""
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") != "llama3":
        return None
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    context = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (index / head_dim)
        smooth = min(max((context / wavelength - low) / (high - low), 0), 1)
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)
