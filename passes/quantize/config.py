"""How a model is quantized: what a user asks for, and the scheme of one layer that follows."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from inlay.errors import OptionError

FORMATS = ("w8a8", "w8a16", "w4a16", "fp8")
ALIASES = {"int8": "w8a8", "int8_weight_only": "w8a16", "int4": "w4a16"}
METHODS: dict[str, tuple[str, ...]] = {
    "rtn": FORMATS,
    "smoothquant": ("w8a8",),
    "gptq": ("w4a16", "w8a16"),
    "awq": ("w4a16", "w8a16"),
}
TEXTS = "calibration.jsonl"
"""What stands for texts that came as an iterable: the file in the artifact that holds them."""
GROUP_SIZES = (0, 32, 64, 128)
NONE = "none"


@dataclass(frozen=True)
class Scheme:
    """How one linear layer, or a layer's experts, are quantized.

    weight: "int8", "int4" or "fp8". activation: what its inputs are rounded to, "none" for a layer
    whose weights alone are narrow, "int8" or "fp8". group_size: inputs of a weight's row that share
    a scale, 0 for all; of fp8 activations too. symmetric: weights without zero points.
    per_tensor: one scale for the whole weight. static: one activation scale, measured beforehand,
    where else each token has its own. activation_symmetric: activations without zero points.
    """

    weight: str
    activation: str = NONE
    group_size: int = 0
    symmetric: bool = True
    per_tensor: bool = False
    static: bool = False
    activation_symmetric: bool = True


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """What `quantization=` takes; as a string "FORMAT,name=value,...", for example
    "w4a16,group_size=128,method=gptq,calibration=texts.jsonl".

    format: "w8a8" (int8 weights and activations), "w8a16" and "w4a16" (weights alone in int8 or
        int4), "fp8" (e4m3 weights and activations).
    method: "rtn" rounds to nearest; "smoothquant" (w8a8), "gptq" and "awq" (w8a16, w4a16) look at
        calibration texts.
    group_size: inputs that share a weight's scale in w8a16 and w4a16: 32, 64 or 128, 0 for a whole
        row. None: 32 for w4a16, else 0.
    symmetric: False gives the weights of w8a16 and w4a16 zero points.
    activation_scales: of w8a8 and fp8: "dynamic", a scale for each token at run time, or "static",
        one for each layer from calibration texts. One dynamic scale for all tokens of a step does
        not exist: one request's numbers would change another's.
    activation_symmetric: False gives w8a8's activations zero points.
    weight_scales: of fp8: "channel" (a scale for each row) or "tensor".
    lm_head: its format, "none" to leave it, "auto": w8a16 where the layers are w8a16 or w4a16,
        w8a8 for w8a8, none for fp8.
    embeddings: "none", or "int8" with a scale for each row.
    ignore: layers to leave as they are: names or patterns ("*.down_proj", "re:.*layers\\.0\\..*")
        of modules, separated by | in a string.
    smoothing: smoothquant's alpha, from 0 (weights take no difficulty over) to 1.
    calibration: a JSONL file whose lines have "text", "messages" or "token_ids", or a text file; in
        Python also an iterable of texts and such mappings. An artifact keeps the token ids in its
        calibration.jsonl, which is such a file. "": for what needs it, an error.
    num_samples, sample_length: pieces of text taken at most, and tokens of each.
    """

    format: str
    method: str = "rtn"
    group_size: int | None = None
    symmetric: bool = True
    activation_scales: str = "dynamic"
    activation_symmetric: bool = True
    weight_scales: str = "channel"
    lm_head: str = "auto"
    embeddings: str = NONE
    ignore: tuple[str, ...] = ()
    smoothing: float = 0.5
    calibration: Any = ""
    num_samples: int = 64
    sample_length: int = 256

    def __post_init__(self) -> None:
        if isinstance(self.calibration, os.PathLike):
            object.__setattr__(self, "calibration", os.fspath(self.calibration))
        if not isinstance(self.format, str):
            raise OptionError(
                f"quantization: format must be one of {', '.join(FORMATS)}, got {self.format!r}"
            )
        if isinstance(self.ignore, str):
            object.__setattr__(self, "ignore", tuple(filter(None, self.ignore.split("|"))))
        if not isinstance(self.ignore, tuple) or not all(isinstance(p, str) for p in self.ignore):
            raise OptionError(
                f"quantization: ignore must be a list of patterns of names, got {self.ignore!r}"
            )
        for pattern in self.ignore:
            _check_pattern(pattern)
        if isinstance(self.calibration, str) and set(self.calibration) & {",", "\0"}:
            raise OptionError(
                "quantization: calibration must be a file whose name has no comma (a comma ends a "
                f"setting), got {self.calibration!r}; rename it, or give the texts themselves"
            )
        if isinstance(self.calibration, bool | int | float | bytes | Mapping):
            raise OptionError(
                "quantization: calibration must be a file, or an iterable of texts, got "
                f"{self.calibration!r}"
            )
        object.__setattr__(self, "format", ALIASES.get(self.format, self.format))
        one_of("format", self.format, FORMATS)
        one_of("method", self.method, tuple(METHODS))
        one_of("group_size", self.group_size, (None, *GROUP_SIZES))
        one_of("activation_scales", self.activation_scales, ("dynamic", "static"))
        one_of("weight_scales", self.weight_scales, ("channel", "tensor"))
        one_of("lm_head", self.lm_head, ("auto", NONE, *FORMATS))
        one_of("embeddings", self.embeddings, (NONE, "int8"))
        for name in ("symmetric", "activation_symmetric"):
            one_of(name, getattr(self, name), (True, False))
        for name in ("num_samples", "sample_length"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise OptionError(f"quantization: {name} must be an integer >= 1, got {value!r}")
        is_number = isinstance(self.smoothing, int | float) and self.smoothing is not True
        if not is_number or not 0 <= self.smoothing <= 1:
            raise OptionError(
                f"quantization: smoothing must be from 0 to 1, got {self.smoothing!r}"
            )
        self._check_together()

    def _check_together(self) -> None:
        """What only some formats have; and calibration where it is needed."""
        weight_only = self.format in ("w8a16", "w4a16")
        if self.format not in METHODS[self.method]:
            raise OptionError(
                f"quantization: method {self.method!r} is for {', '.join(METHODS[self.method])}, "
                f"got format {self.format!r}"
            )
        wrong = {
            "group_size": bool(self.group_size) and not weight_only,
            "symmetric": not self.symmetric and not weight_only,
            "activation_scales": self.activation_scales == "static" and weight_only,
            "activation_symmetric": not self.activation_symmetric and self.format != "w8a8",
            "weight_scales": self.weight_scales == "tensor" and self.format != "fp8",
        }
        for name, is_wrong in wrong.items():
            if is_wrong:
                raise OptionError(
                    f"quantization: format {self.format!r} has no {name}={getattr(self, name)!r}; "
                    "leave it out"
                )
        if self.needs_calibration and isinstance(self.calibration, str) and not self.calibration:
            raise OptionError(
                f"quantization: {self.format} with method={self.method}, activation_scales="
                f"{self.activation_scales} needs texts: give calibration=FILE (text or JSONL)"
            )

    @property
    def needs_calibration(self) -> bool:
        return self.method != "rtn" or self.activation_scales == "static"

    @property
    def layers(self) -> Scheme:
        """The scheme of linear layers and experts."""
        size = self.group_size
        static = self.activation_scales == "static"
        if self.format == "w8a8":
            return Scheme(
                "int8", "int8", static=static, activation_symmetric=self.activation_symmetric
            )
        if self.format == "fp8":
            return Scheme("fp8", "fp8", static=static, per_tensor=self.weight_scales == "tensor")
        if self.format == "w8a16":
            return Scheme("int8", group_size=size or 0, symmetric=self.symmetric)
        return Scheme("int4", group_size=32 if size is None else size, symmetric=self.symmetric)

    @property
    def head(self) -> Scheme | None:
        """The LM head's scheme, rounded to nearest; None where it stays as it is. Its activation
        scales are dynamic, so that where those of the layers are static "auto" is weights alone."""
        chosen = {"w8a8": "w8a8", "fp8": NONE}.get(self.format, "w8a16")
        if chosen == "w8a8" and self.activation_scales == "static":
            chosen = "w8a16"
        chosen = chosen if self.lm_head == "auto" else self.lm_head
        return None if chosen == NONE else QuantizationConfig(format=chosen).layers

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """Those patterns of ignore that mean none of these modules."""
        known = list(names)
        return [p for p in self.ignore if not any(_matches(name, p) for name in known)]

    def ignores(self, names: list[str]) -> bool:
        """Whether a weight made of these weights of the checkpoint is to be left as it is."""
        modules = [name.removesuffix(".weight") for name in names]
        return any(_matches(module, pattern) for module in modules for pattern in self.ignore)

    def to_json(self) -> dict[str, Any]:
        """Plain data; texts that came as an iterable are not in it."""
        plain = self if isinstance(self.calibration, str) else replace(self, calibration=TEXTS)
        return {**asdict(plain), "ignore": list(self.ignore)}

    def __str__(self) -> str:
        """The string that gives this configuration again."""
        parts = [self.format]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default:
                text = "|".join(value) if field.name == "ignore" else str(value)
                if field.name == "calibration" and not isinstance(value, str):
                    text = TEXTS
                parts.append(f"{field.name}={text}")
        return ",".join(parts)


def parse_quantization(value: Any) -> QuantizationConfig | None:
    """None for None and "none"; a config from a string, a mapping or a QuantizationConfig.

    Raises OptionError for what is none of these, and for unknown names or values.
    """
    if value is None or value == NONE or isinstance(value, QuantizationConfig):
        return None if value == NONE else value
    if isinstance(value, str):
        format_, *rest = value.split(",")
        items = [_parse_item(item) for item in rest]
        names = ["format", *(name for name, _ in items)]
        for name in names:
            if names.count(name) > 1:
                raise OptionError(f"quantization: {name} is there twice in {value!r}; keep one")
        return _from_mapping({"format": format_, **dict(items)})
    if isinstance(value, Mapping):
        return _from_mapping(value)
    raise OptionError(
        f"quantization must be one of none, {', '.join(FORMATS)}, a string FORMAT,name=value,..., "
        f"a mapping or a QuantizationConfig, got {value!r}"
    )


def _parse_item(item: str) -> tuple[str, Any]:
    name, equals, text = item.partition("=")
    if not equals:
        raise OptionError(f"quantization: {item!r} must be name=value")
    kinds = {field.name: str(field.type) for field in fields(QuantizationConfig)}
    kind = kinds.get(name.strip(), "str")
    text = text.strip()
    if kind == "bool" and text.lower() in ("true", "false"):
        return name.strip(), text.lower() == "true"
    try:
        if kind.startswith("int"):
            return name.strip(), int(text)
        return name.strip(), float(text) if kind == "float" else text
    except ValueError:
        raise OptionError(f"quantization: {name.strip()} must be a number, got {text!r}") from None


def _from_mapping(data: Mapping[str, Any]) -> QuantizationConfig:
    known = [field.name for field in fields(QuantizationConfig)]
    for name in data:
        if name not in known:
            raise OptionError(f"quantization: unknown {name!r}; known are {', '.join(known)}")
    given = dict(data)
    if isinstance(given.get("ignore"), list):
        given["ignore"] = tuple(given["ignore"])
    if "format" not in given:
        raise OptionError(f"quantization: format is missing; it is one of {', '.join(FORMATS)}")
    return QuantizationConfig(**given)


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        words = ", ".join("None" if choice is None else str(choice) for choice in allowed)
        raise OptionError(f"quantization: {name} must be one of {words}, got {value!r}")


def _check_pattern(pattern: str) -> None:
    """A manifest holds all patterns as one string, which their separators would break."""
    wrong = "holds | or a comma, which end a pattern" if set(pattern) & {"|", ","} else ""
    if not wrong and pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            wrong = f"is no regular expression ({error}); | ends a pattern, too"
    if wrong:
        raise OptionError(
            f"quantization: the ignore pattern {pattern!r} {wrong}; give each alternative as a "
            "pattern of its own"
        )


def _matches(module: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return fnmatchcase(module, pattern) or fnmatchcase(module, f"*.{pattern}")
