"""A quantized checkpoint's files, as transformers' loader sees them: of plain weights."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from inlay.errors import ModelLoadError
from inlay.lowering.quantized_checkpoint.format import Format
from inlay.lowering.quantized_checkpoint.layer import Layer, to_layer

logger = logging.getLogger(__name__)

CACHE_PARTS = (
    *("k_scale", "v_scale", "q_scale", "kv_scale", "output_scale"),
    *("k_zero_point", "v_zero_point", "q_zero_point"),
)
"""Scales of a narrow KV cache."""

NARROW = ("F8_E4M3", "F8_E5M2", "I8", "U8", "I16", "I32", "I64")
"""Types that only quantized weights have, as safetensors names them."""


class QuantizedFiles:
    """Opens a checkpoint's files so that each quantized weight looks like a plain one of dtype.

    It is dequantized when it is asked for; layers then holds what is stored of it, by the name of
    the plain weight, or the reason why no op of ours takes that. addresses: where the plain
    weight's numbers went.
    """

    def __init__(self, format_: Format, dtype: torch.dtype) -> None:
        self._format, self._dtype = format_, dtype
        self._where: dict[str, Any] = {}
        self._modules: dict[str, dict[str, str]] = {}
        self.layers: dict[str, Layer | str] = {}
        self.addresses: dict[int, str] = {}
        self.cache_scales: list[str] = []
        self.notes = format_.notes

    def open(self, file: str | Path, *args: Any, **kwargs: Any) -> _OpenFile:
        """In place of safetensors' safe_open; raises ModelLoadError for layers that lack a part."""
        if not self._where:
            self._read_names(Path(file))
        return _OpenFile(self, safe_open(file, "pt", backend="pread"))

    def names_in(self, names: list[str]) -> Iterator[str]:
        """What transformers is told of a file with tensors of these names."""
        for name in names:
            module, _, part = name.rpartition(".")
            members = self._modules.get(module, {})
            if name in self.cache_scales:
                continue
            if part not in members or part == "bias":
                yield name
            elif part == self._main(members):
                yield f"{module}.weight"

    def is_quantized(self, name: str) -> bool:
        module, _, part = name.rpartition(".")
        return part == "weight" and module in self._modules

    def weight(self, name: str) -> Tensor:
        """The plain weight of a quantized module."""
        module = name.removesuffix(".weight")
        members = self._modules[module]
        tensors = {
            part: self._where[full].get_tensor(full)
            for part, full in members.items()
            if part != "bias"
        }
        stored = self._format.read(module, tensors)
        layer = self.layers[name] = to_layer(stored)
        plain = (stored if isinstance(layer, str) else layer).weight(self._dtype)
        self.addresses[plain.data_ptr()] = name
        return plain

    def _main(self, members: dict[str, str]) -> str | None:
        return next((part for part in self._format.main if part in members), None)

    def _read_names(self, file: Path) -> None:
        """All tensors of all files: a layer's may lie in several."""
        kinds = {}
        for path in _all_files(file):
            opened = safe_open(path, "pt", backend="pread")
            for name in opened.keys():  # noqa: SIM118  (it is no mapping)
                self._where[name] = opened
                kinds[name] = opened.get_slice(name).get_dtype()
        modules: dict[str, dict[str, str]] = defaultdict(dict)
        for name in self._where:
            module, _, part = name.rpartition(".")
            if part in CACHE_PARTS:
                self.cache_scales.append(name)
            else:
                modules[module][part] = name
        marks = {*self._format.parts, *self._format.main} - {"weight"}
        for module, members in modules.items():
            narrow = kinds.get(f"{module}.weight") in NARROW
            if narrow or marks & set(members):
                self._check(module, members)
                self._modules[module] = members
        if not self._modules:
            raise ModelLoadError(
                f"the config says that the checkpoint is quantized ({self._format.name}), and "
                f"none of its tensors is; take quantization_config out of {file.parent}/config.json"
            )

    def _check(self, module: str, members: dict[str, str]) -> None:
        format_ = self._format
        required = [self._main(members) or format_.main[0], *format_.required]
        if missing := [part for part in required if part not in members]:
            raise ModelLoadError(
                f"module {module} is quantized ({format_.name}), and lacks the tensors "
                f"{', '.join(missing)}; it has {', '.join(sorted(members))}"
            )
        known = {required[0], *format_.parts, "bias"}
        if unknown := sorted(set(members) - known):
            raise ModelLoadError(
                f"module {module} is quantized ({format_.name}), and has tensors that this format "
                f"does not know: {', '.join(unknown)}; known are {', '.join(sorted(known))}"
            )


class _OpenFile:
    """What transformers uses of an open safetensors file."""

    def __init__(self, files: QuantizedFiles, opened: Any) -> None:
        self._files, self._opened = files, opened

    def keys(self) -> list[str]:
        return list(self._files.names_in(list(self._opened.keys())))

    def get_slice(self, name: str) -> Any:
        if self._files.is_quantized(name):
            return _Dequantized(self._files, name)
        return self._opened.get_slice(name)

    def __exit__(self, *_: object) -> None:
        return None


class _Dequantized:
    """A tensor that is made when it is read."""

    def __init__(self, files: QuantizedFiles, name: str) -> None:
        self._files, self._name = files, name

    def __getitem__(self, index: Any) -> Tensor:
        assert index is ..., "transformers reads a tensor whole"
        return self._files.weight(self._name)


def _all_files(file: Path) -> list[Path]:
    """A file, or where it is one of several those that the index names."""
    for index in sorted(file.parent.glob("*.safetensors.index.json")):
        names = set(json.loads(index.read_text())["weight_map"].values())
        if file.name in names:
            return [file.parent / name for name in sorted(names)]
    return [file]
