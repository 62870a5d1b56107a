"""Tiny quantized checkpoints, written tensor by tensor as each format lays them down.

Each format's function rounds a weight by arithmetic of its own, lays the numbers down as the format
does, and says what weight they stand for: nothing here is shared with the loader.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

Tensors = dict[str, Tensor]
Pack = Callable[[str, Tensor], tuple[Tensors, Tensor]]
"""A module's name and weight to the tensors that stand for it and the weight that these mean."""

FP8 = torch.float8_e4m3fn


@dataclass
class Written:
    """folder: the quantized checkpoint. model: of the weights that it stands for, in float32."""

    folder: Path
    model: PreTrainedModel


@torch.no_grad()
def write(
    model: PreTrainedModel,
    folder: Path,
    pack: Pack,
    settings: dict[str, Any] | None,
    *,
    skip: str = r"embed|lm_head|gate\.weight|router",
    extra: Tensors | None = None,
    files: int = 1,
) -> Written:
    """Save a model with its matrices packed.

    settings: its quantization_config; None for none. skip: pattern of weights to leave as they
    are. files: over which the tensors are dealt out, one after the other.
    """
    meant, stored = folder / "meant", folder / "quantized"
    model.save_pretrained(meant)
    plain = load_file(meant / "model.safetensors")
    tensors = dict(extra or {})
    for name, weight in plain.items():
        tensors[name] = weight
        if name.endswith(".weight") and weight.dim() == 2 and not re.search(skip, name):
            module = name.removesuffix(".weight")
            parts, plain[name] = pack(module, tensors.pop(name).float())
            tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    save_file(plain, meant / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(stored)
    _save(tensors, stored, files)
    if settings is not None:
        edit_config(stored, quantization_config=settings)
    reference = AutoModelForCausalLM.from_pretrained(meant, dtype=torch.float32)
    return Written(stored, reference.eval())


def _save(tensors: Tensors, folder: Path, files: int) -> None:
    if files == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    where = {name: f"model-{i % files}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        mine = {name: tensor for name, tensor in tensors.items() if where[name] == file}
        save_file(mine, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def rounded(
    weight: Tensor, bits: int, group_size: int, symmetric: bool, groups: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numbers 0 .. 2**bits - 1 [N, K], float16 scales and zeros [N, G], and the weight meant."""
    size = weight.shape[1]
    if groups is None:
        groups = torch.arange(size) // (group_size if group_size > 0 else size)
    count, highest = int(groups.max()) + 1, 2**bits - 1
    scales, zeros = torch.empty(len(weight), count), torch.empty(len(weight), count)
    for group in range(count):
        columns = weight[:, groups == group]
        low, high = columns.amin(1).clamp(max=0), columns.amax(1).clamp(min=0)
        if symmetric:
            scales[:, group] = 2 * torch.maximum(-low, high) / highest
            zeros[:, group] = 2 ** (bits - 1)
        else:
            scales[:, group] = (high - low) / highest
            zeros[:, group] = (-low / scales[:, group].half().float()).round().clamp(0, highest)
    scales = scales.half()
    wide, shift = scales.float()[:, groups], zeros[:, groups]
    numbers = ((weight / wide).round() + shift).clamp(0, highest)
    meant = (numbers - shift) * wide
    return numbers.int(), scales, zeros.int(), meant


def words(numbers: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """[R, C] numbers to int32 [R, C * bits / 32], the lowest bits first; order: which of a word's
    numbers comes where."""
    per_word = 32 // bits
    padded = nn.functional.pad(numbers.long(), (0, -numbers.shape[1] % per_word))
    inside = padded.unflatten(1, (-1, per_word))
    inside = inside if order is None else inside[..., list(order)]
    total = sum(inside[..., i] << (bits * i) for i in range(per_word))
    return torch.as_tensor(total).to(torch.int32).contiguous()


Format = tuple[Pack, dict[str, Any]]


def gptq(
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = True,
    desc_act: bool = False,
    v2: bool = False,
) -> Format:
    """AutoGPTQ's and GPTQModel's layout."""

    def pack(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        size = weight.shape[1]
        groups = torch.arange(size) // (group_size if group_size > 0 else size)
        if desc_act:  # layers with the same input have the same order
            groups = groups[torch.randperm(size, generator=torch.Generator().manual_seed(size))]
        numbers, scales, zeros, meant = rounded(weight, bits, group_size, symmetric, groups)
        stored = zeros.t() if v2 else (zeros.t() - 1) % 2**bits
        return {
            "qweight": words(numbers, bits).t().contiguous(),
            "qzeros": words(stored, bits),
            "scales": scales.t().contiguous(),
            "g_idx": groups.int(),
        }, meant

    return pack, {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": symmetric,
        "desc_act": desc_act,
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
    }


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def awq(group_size: int = 32, order: tuple[int, ...] = AWQ_ORDER) -> Format:
    """AutoAWQ's "gemm"."""

    def pack(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        numbers, scales, zeros, meant = rounded(weight, 4, group_size, symmetric=False)
        return {
            "qweight": words(numbers.t(), 4, order),
            "qzeros": words(zeros.t(), 4, order),
            "scales": scales.t().contiguous(),
        }, meant

    return pack, {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
    }


def config_of(
    weights: dict[str, Any], inputs: dict[str, Any] | None, layout: str
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def packed(
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = True,
    order: tuple[int, ...] | None = None,
    scales_in: torch.dtype = torch.float16,
) -> Format:
    """compressed-tensors' W4A16 and W8A16, "pack-quantized"."""

    def pack(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        numbers, scales, zeros, meant = rounded(weight, bits, group_size, symmetric)
        tensors = {
            "weight_packed": words(numbers, bits, order),
            "weight_scale": scales.to(scales_in),
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            tensors["weight_zero_point"] = words(zeros.t(), bits).t().contiguous()
        return tensors, meant

    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}
    weights |= {"strategy": "group", "group_size": group_size}
    if group_size < 0:
        weights |= {"strategy": "channel", "group_size": None}
    return pack, config_of(weights, None, "pack-quantized")


def w8a8(
    inputs: dict[str, Any], input_scale: float | None = None, input_zero: int | None = None
) -> Format:
    """compressed-tensors' int8 weights and activations, "int-quantized"."""

    def pack(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        scales = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
        numbers = (weight / scales.float()).round().clamp(-128, 127)
        tensors = {"weight": numbers.to(torch.int8), "weight_scale": scales}
        if input_scale is not None:
            tensors["input_scale"] = torch.tensor([input_scale])
        if input_zero is not None:
            tensors["input_zero_point"] = torch.tensor([input_zero], dtype=torch.int8)
        return tensors, numbers * scales.float()

    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    given = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, **inputs}
    return pack, config_of(weights, given, "int-quantized")


def fp8(strategy: str, inputs: dict[str, Any] | None, input_scale: float | None = None) -> Format:
    """compressed-tensors' FP8, "float-quantized", by "tensor" or "channel"."""

    def pack(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        amax = weight.abs().amax(1, keepdim=True) if strategy == "channel" else weight.abs().max()
        scales = (amax / 448).reshape(-1, 1) if strategy == "channel" else (amax / 448).reshape(1)
        numbers = (weight / scales).clamp(-448, 448).to(FP8)
        tensors = {"weight": numbers, "weight_scale": scales}
        if input_scale is not None:
            tensors["input_scale"] = torch.tensor([input_scale])
        return tensors, numbers.float() * scales

    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    given = None if inputs is None else {"num_bits": 8, "type": "float", "dynamic": True, **inputs}
    return pack, config_of(weights, given, "float-quantized")


def blocks(scale_dtype: torch.dtype = torch.float32) -> Format:
    """DeepSeek's fine-grained FP8, 128 x 128."""

    def pack(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        rows, size = weight.shape
        grid = torch.empty(-(-rows // 128), -(-size // 128))
        for i in range(grid.shape[0]):
            for j in range(grid.shape[1]):
                block = weight[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
                grid[i, j] = block.abs().max() / 448
        if scale_dtype == torch.float8_e8m0fnu:
            grid = torch.exp2(grid.log2().ceil())
        wide = grid.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :size]
        numbers = (weight / wide).to(FP8)
        return {"weight": numbers, "weight_scale_inv": grid.to(scale_dtype)}, numbers.float() * wide

    return pack, {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
    }


def modelopt(algorithm: str = "FP8") -> Format:
    """NVIDIA's FP8."""

    def pack(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        if algorithm == "FP8":
            scale = weight.abs().max() / 448
            tensors = {"weight_scale": scale, "input_scale": torch.tensor(0.01)}
        else:
            scale = weight.abs().amax(1, keepdim=True) / 448
            tensors = {"weight_scale": scale.squeeze(1).contiguous()}
        numbers = (weight / scale).clamp(-448, 448).to(FP8)
        return {"weight": numbers, **tensors}, numbers.float() * scale

    return pack, {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]}
