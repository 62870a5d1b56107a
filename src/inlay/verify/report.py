"""The whole of `inlay verify`: compile, run, compare, judge, and look for the fault."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from inlay.backends.model import ProgramModel
from inlay.backends.select import get_backend
from inlay.engine import Engine, compile_model
from inlay.errors import OptionError, UnsupportedModelError, VerificationError
from inlay.lowering.export import max_positions
from inlay.lowering.guards import (
    FLOAT32_TOLERANCE,
    MAX_WINDOW_TO_COVER,
    NOISE_FACTOR,
    reference_logits,
)
from inlay.lowering.loading import Source
from inlay.lowering.options import CompileOptions, check_against_model
from inlay.passes.quantize.config import NONE
from inlay.verify.bisect import Finding, bisect
from inlay.verify.layers import LayerError, layer_errors
from inlay.verify.measure import Measured, measure
from inlay.verify.recapture import Recaptured, recapture
from inlay.verify.workload import Run, prompt_lengths, random_prompts, run_greedy

logger = logging.getLogger(__name__)

MAX_RATIO = 1.25
"""In bfloat16 and float16 RMS error and KL divergence may be this many times those of Hugging Face
in that dtype: roundings fall at other places, and nothing else may differ."""

MANY_ROWS = 256
"""Logits rows for that ratio to mean something; over fewer it is noise, and what a build allows is
allowed."""

WRONG_ROW = 10.0
"""A logits row this many times over the allowed error is wrong, not merely rounded."""


@dataclass(frozen=True)
class Report:
    """What was compared, the numbers, and the verdict.

    measured: None where the build was refused before anything ran. finding: the first fault, None
    where all agrees. notes: what this run did not cover.
    """

    model: str
    backend: str
    dtype: str
    prompt_lengths: list[int]
    num_tokens: int
    measured: Measured | None
    layers: list[LayerError]
    faults: list[str]
    finding: Finding | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        facts = asdict(self)
        if self.measured is not None:
            tokens = self.measured.tokens
            facts["measured"]["tokens"] |= {"num_wrong": tokens.num_wrong}
            del facts["measured"]["row_errors"]
        return {"ok": self.ok, **facts}


def verify_model(
    source: Source,
    options: CompileOptions,
    *,
    engine: Engine | None = None,
    prompts: Sequence[list[int]] = (),
    num_prompts: int = 16,
    max_tokens: int = 32,
    seed: int = 0,
    progress: Callable[[str], None] = logger.info,
) -> Report:
    """Compile a model, run it, and compare it with Hugging Face; bisect where they disagree.

    source: the model, in the dtype to verify. engine: verify this one, made of the same model,
    instead of compiling one. prompts: token ids; without any, num_prompts random ones. Each gets
    max_tokens greedy tokens.

    Raises what `compile_model` raises but VerificationError, which is a verdict; OptionError and
    RequestError for prompts that do not fit.
    """
    _refuse_quantized(source, options, engine)
    model = source.model
    dtype = str(model.dtype).removeprefix("torch.")
    max_seq_len = check_against_model(options, max_positions(model))
    facts: dict[str, Any] = {"model": source.name, "backend": options.backend, "dtype": dtype}
    if engine is None:
        try:
            engine = _compile(source, options, progress)
        except VerificationError as error:
            again = recapture(model, options.max_num_tokens, max_seq_len, options.block_size)
            return Report(
                **facts,
                prompt_lengths=[],
                num_tokens=0,
                measured=None,
                layers=_layers(again, source, None),
                faults=[str(error)],
                finding=bisect(again, model),
            )
    _check_engine(engine, source, dtype)
    loaded = engine.load_model()
    assert isinstance(loaded, ProgramModel), "a backend's model that runs no program"
    if loaded.program.is_encoder:
        raise UnsupportedModelError(
            f"model {source.name} is an encoder, and verify compares generated tokens; `inlay "
            "build` compares an encoder's hidden states with Hugging Face's"
        )
    limits = loaded.limits
    again = recapture(model, limits.max_num_tokens, limits.max_seq_len, limits.block_size)
    lengths = prompt_lengths(num_prompts, max_tokens, again.windows, limits.max_seq_len)
    ids = list(prompts) or random_prompts(lengths, limits.vocab_size, seed)
    progress(f"generating {max_tokens} tokens for each of {len(ids)} prompts")
    run = run_greedy(loaded, ids, max_tokens)
    progress("comparing with Hugging Face")
    measured = measure(run, model, limits.max_seq_len)
    layers = _layers(again, source, loaded)
    del loaded
    faults = judge(measured)
    finding: Finding | None = None
    if faults:
        progress("looking for the fault")
        wrong = _wrong_steps(run, measured)
        finding = bisect(again, model, engine, run, wrong)
    notes = _notes(again, [len(prompt) for prompt in ids])
    return Report(
        **{**facts, "backend": engine.backend},
        prompt_lengths=[len(prompt) for prompt in ids],
        num_tokens=run.num_tokens,
        measured=measured,
        layers=layers,
        faults=faults,
        finding=finding,
        notes=notes,
    )


def _refuse_quantized(source: Source, options: CompileOptions, engine: Engine | None) -> None:
    built = NONE if engine is None else engine.manifest["options"].get("quantization", NONE)
    if options.quantization == NONE and built == NONE and source.stored is None:
        return
    raise OptionError(
        f"model {source.name} is quantized, and verify compares token by token for equality, which "
        "rounding ends by intent: its build has compared the engine with the quantized graph; how "
        "much rounding costs is measured by `inlay eval`"
    )


def _compile(source: Source, options: CompileOptions, progress: Callable[[str], None]) -> Engine:
    get_backend(options.backend).check_runs()
    # The engine is judged here, more strictly; a wrong one must exist to be looked into.
    given = {**asdict(options), "verify": "capture"}
    return compile_model(source.model, tokenizer=source.tokenizer, progress=progress, **given)


def _check_engine(engine: Engine, source: Source, dtype: str) -> None:
    given = source.model.config
    theirs, ours = given.to_dict(), type(given).from_dict(dict(engine.model_config)).to_dict()
    ours["model_type"] = engine.model_config.get("model_type")  # from_dict takes the class's
    for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        if theirs.get(name) != ours.get(name):
            raise OptionError(
                f"the artifact {engine.path} is of another model than {source.name}: its {name} is "
                f"{ours.get(name)}, the model's {theirs.get(name)}"
            )
    if engine.manifest["dtype"] != dtype:
        raise OptionError(
            f"dtype must be that of the engine {engine.path}, {engine.manifest['dtype']}, got "
            f"{dtype}"
        )


def max_ratio(num_rows: int) -> float:
    """How many times Hugging Face's own error is allowed, by the logits rows that it rests on."""
    return MAX_RATIO if num_rows >= MANY_ROWS else NOISE_FACTOR


def judge(measured: Measured) -> list[str]:
    """What is beyond the limits, a sentence each; nothing where all agrees."""
    ours, theirs, tokens = measured.ours, measured.hugging_face, measured.tokens
    faults = []
    if theirs is None:
        if not ours.rms <= FLOAT32_TOLERANCE:
            faults.append(f"logits are off by {ours.rms:.1e}, allowed is {FLOAT32_TOLERANCE:.0e}")
        if not tokens.passed and not tokens.num_wrong:
            faults.append(f"{tokens.num_excused} of {tokens.num_tokens} tokens had to be excused")
    else:
        for what, mine, other in (
            ("RMS error", ours.rms, theirs.rms),
            ("mean KL divergence", ours.kl_mean, theirs.kl_mean),
        ):
            allowed = max_ratio(tokens.num_tokens)
            if not mine <= allowed * other:
                faults.append(
                    f"{what} is {mine / other:.2f} times that of Hugging Face in the same dtype, "
                    f"allowed is {allowed}"
                )
    if tokens.num_wrong:
        faults.append(f"{tokens.num_wrong} of {tokens.num_tokens} tokens are wrong")
    return faults


def _wrong_steps(run: Run, measured: Measured) -> list[int]:
    """Steps of the run that gave a row which is far beyond what is allowed."""
    theirs = measured.hugging_face
    allowed = FLOAT32_TOLERANCE if theirs is None else NOISE_FACTOR * theirs.rms
    return sorted(
        step
        for request, errors in zip(run.requests, measured.row_errors, strict=True)
        for step, error in zip(request.steps, errors, strict=True)
        if not error <= WRONG_ROW * allowed
    )


def _layers(again: Recaptured, source: Source, engine: ProgramModel | None) -> list[LayerError]:
    """On the two packed requests of the build's own guard."""
    references = reference_logits(source.model, again.captured, again.max_seq_len)
    requests = [reference.token_ids.tolist() for reference in references.requests]
    return layer_errors(again, source.model, requests, engine)


def _notes(again: Recaptured, lengths: Sequence[int]) -> list[str]:
    notes = [
        f"no prompt is longer than the sliding window of {window} tokens (prompts grow with it up "
        f"to {MAX_WINDOW_TO_COVER}, and with --max-seq-len)"
        for window in again.windows
        if window >= max(lengths)
    ]
    if max(lengths) < 2:
        notes.append("all prompts are of one token: chunked prefill was not run")
    return notes
