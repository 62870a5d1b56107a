"""The model that a benchmark runs: an artifact, a checkpoint, "demo", or a named shape."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from inlay.bench.shapes import SHAPES, build_shape
from inlay.errors import OptionError
from inlay.llm import LLM
from inlay.lowering.options import DTYPES, CompileOptions
from inlay.model_source import BUILD_SIZES
from inlay.passes.kv_formats import parse_kv_cache_dtype
from inlay.runtime.config import ExecutorConfig

COMPILE = tuple(field.name for field in fields(CompileOptions))
EXECUTE = tuple(field.name for field in fields(ExecutorConfig))
NO_FLAGS = ("logits_processors", "eos_token_ids")
"""Lists, which have no flag."""


@dataclass(frozen=True)
class Subject:
    """What is known of the model before anything is built.

    kind: "artifact", "checkpoint" or "shape". label: what results call it, without directories.
    options: of the build and of the executor, as given.
    """

    kind: str
    place: str
    label: str
    vocab_size: int
    max_seq_len: int | None
    tokenizer: Any
    options: dict[str, Any]
    layers: int | None = None

    @property
    def executor_options(self) -> dict[str, Any]:
        """Sizes of a model that is built belong to the build."""
        built = BUILD_SIZES if self.kind != "artifact" else frozenset()
        return {n: v for n, v in self.options.items() if n in EXECUTE and n not in built}

    @property
    def compile_options(self) -> dict[str, Any]:
        return {n: v for n, v in self.options.items() if n in COMPILE}


@dataclass
class Opened:
    """The model, ready to generate; build_s: seconds of its build, None for an artifact."""

    llm: LLM
    engine: Any
    build_s: float | None
    kv_cache_dtype: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and its options, of the build and of the executor."""
    from inlay.cli.options import add_dataclass_arguments

    parser.add_argument(
        "model",
        help=f"an artifact, a directory, a hub id, 'demo', or a shape: {', '.join(SHAPES)}",
    )
    parser.add_argument("--tokenizer", help="directory or hub id, where not the model's own")
    parser.add_argument("--layers", type=int, metavar="N", help="of a shape: so many layers only")
    parser.add_argument(
        "--threads", "--num-threads", type=int, metavar="N", help="of the engine's process"
    )
    parser.add_argument(
        "--in-process", action="store_true", help="run the engine in this process, for debugging"
    )
    compiling = parser.add_argument_group("compiling, where a model is given")
    add_dataclass_arguments(compiling, CompileOptions)
    running = parser.add_argument_group("running")
    add_dataclass_arguments(running, ExecutorConfig, skip={*COMPILE, *NO_FLAGS})
    for name in (*COMPILE, *EXECUTE):
        parser.set_defaults(**{name: None})  # an artifact has its own; only what is given counts


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    names = dict.fromkeys((*COMPILE, *EXECUTE))
    return {n: v for n in names if (v := getattr(arguments, n, None)) is not None}


def subject_of(arguments: argparse.Namespace) -> Subject:
    """Look at the model without loading its weights.

    Raises OptionError, ModelLoadError, ArtifactError.
    """
    from inlay.engine import Engine, is_artifact
    from inlay.lowering.loading import demo_path, load_tokenizer
    from inlay.lowering.options import check_against_model

    for name in ("threads", "layers"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise OptionError(f"--{name} must be at least 1, got {value}")
    model, options = arguments.model, given_options(arguments)
    ExecutorConfig(**{n: v for n, v in options.items() if n in EXECUTE})  # checked at once
    parse_kv_cache_dtype(options.get("kv_cache_dtype", "auto"))
    compile_options = {n: v for n, v in options.items() if n in COMPILE}
    if arguments.layers is not None and model not in SHAPES:
        raise OptionError(f"--layers is for a shape ({', '.join(SHAPES)}); {model} is none")
    if is_artifact(model):
        _refuse_compile_options(model, compile_options)
        engine = Engine.load(model, backend=options.get("backend"))
        tokenizer = None if arguments.tokenizer else engine.tokenizer()
        kind, label = "artifact", f"{engine.manifest['architecture']} artifact"
        limits = engine.manifest["limits"]
        vocab_size, most = limits["vocab_size"], limits["max_seq_len"]
        most = min(most, options.get("max_seq_len") or most)
    else:
        kind = "shape" if model in SHAPES else "checkpoint"
        config = _config(model, options)
        text = config.get_text_config()
        vocab_size, limit = text.vocab_size, getattr(text, "max_position_embeddings", None)
        most = check_against_model(CompileOptions(**compile_options), limit)
        is_bare = kind == "shape" or arguments.tokenizer is not None
        tokenizer = None if is_bare else load_tokenizer(model)
        path = demo_path() if model == "demo" else Path(model)
        label = path.resolve().name if path.is_dir() and model != "demo" else model
    if arguments.tokenizer is not None:
        tokenizer = load_tokenizer(arguments.tokenizer)
        if tokenizer is None:
            raise OptionError(f"there is no tokenizer at --tokenizer {arguments.tokenizer}")
    return Subject(kind, model, label, vocab_size, most, tokenizer, options, arguments.layers)


def open_model(
    subject: Subject, arguments: argparse.Namespace, progress: Callable[[str], None] | None = None
) -> Opened:
    """Build where need be, load, and start the engine; closing the LLM ends all of it."""
    from inlay.engine import Engine, compile_model

    seconds = None
    if subject.kind == "artifact":
        engine = Engine.load(subject.place, backend=subject.options.get("backend"))
    else:
        begin = time.perf_counter()
        engine = compile_model(
            _model(subject), tokenizer=subject.tokenizer, progress=progress or _tell,
            **subject.compile_options,
        )  # fmt: skip
        seconds = time.perf_counter() - begin
    llm = LLM(
        engine,
        tokenizer=subject.tokenizer,
        in_process=arguments.in_process,
        num_threads=None if arguments.in_process else arguments.threads,
        **subject.executor_options,
    )
    kv_cache_dtype = subject.options.get("kv_cache_dtype") or "auto"
    return Opened(llm, engine, seconds, kv_cache_dtype)


def num_threads(arguments: argparse.Namespace) -> int:
    """Of the engine's process, as OpenMP takes them."""
    given = arguments.threads or os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(given) if str(given).isdigit() else len(os.sched_getaffinity(0))


def _model(subject: Subject) -> Any:
    if subject.kind != "shape":
        return subject.place
    dtype = DTYPES.get(subject.options.get("dtype") or "auto", torch.bfloat16)
    return build_shape(subject.place, dtype, subject.layers)


def _config(model: str, options: dict[str, Any]) -> Any:
    from inlay.lowering.checkpoint import check_place, guarded
    from inlay.lowering.loading import resolve

    if model in SHAPES:
        return AutoConfig.for_model(**SHAPES[model])
    place = resolve(model)
    if not Path(place).is_dir() and place.count("/") != 1:
        raise OptionError(
            f"model must be an artifact, a directory, a hub id (owner/name), 'demo' or a shape "
            f"({', '.join(SHAPES)}); got {model!r}"
        )
    check_place(place)
    trusted = bool(options.get("trust_remote_code"))
    return guarded(place, lambda: AutoConfig.from_pretrained(place, trust_remote_code=trusted))


def _refuse_compile_options(model: str, given: dict[str, Any]) -> None:
    fixed = sorted(set(given) - {*EXECUTE, "backend"})
    if fixed:
        raise OptionError(
            f"{', '.join(fixed)} cannot be changed for the artifact {model}; build another with "
            "`inlay build`"
        )


def _tell(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)
