"""`inlay run ARTIFACT_OR_MODEL -p "..."`: stream text, then say how fast it came."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

LISTS = (
    "stop",
    "stop_token_ids",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "bad_words_ids",
    "logits_processors",
)
"""Fields that are no single number: their flags may be repeated."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from inlay.cli.options import add_dataclass_arguments
    from inlay.lowering.options import CompileOptions
    from inlay.runtime.sampling_params import SamplingParams

    parser.add_argument("model", help="an artifact, a directory, a hub id (owner/name), or 'demo'")
    parser.add_argument("-p", "--prompt", action="append", required=True, help="may be repeated")
    parser.add_argument("--chat", action="store_true", help="render prompts as chat messages")
    parser.add_argument("--tokenizer", help="directory or hub id, where not the model's own")
    sampling = parser.add_argument_group("sampling")
    add_dataclass_arguments(sampling, SamplingParams, skip=LISTS)
    sampling.add_argument("--stop", action="append", help="stop string; may be repeated")
    sampling.add_argument("--bad-words", action="append", help="must not come; may be repeated")
    sampling.add_argument("--bad-words-ids", type=_ids, action="append", metavar="ID,ID,...")
    sampling.add_argument("--logit-bias", type=_bias, action="append", metavar="ID=NUMBER")
    sampling.add_argument("--allowed-token-ids", type=int, action="append", metavar="int")
    sampling.add_argument("--stop-token-ids", type=int, action="append", metavar="int")
    sampling.add_argument("--logits-processors", action="append", metavar="module:Class")
    compiling = parser.add_argument_group("compiling, where a model is given")
    add_dataclass_arguments(compiling, CompileOptions)
    for name in vars(CompileOptions)["__dataclass_fields__"]:
        parser.set_defaults(**{name: None})  # an artifact has its own; only what is given counts


def _ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be token ids, as 1,2,3; got {text}") from None


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        message = f"must be a token id and a number, as 7=-2.5; got {text}"
        raise argparse.ArgumentTypeError(message) from None


def run(arguments: argparse.Namespace) -> int:
    from inlay.bench.roofline import decode_bytes, read_bandwidth
    from inlay.cli.options import dataclass_from_arguments
    from inlay.llm import LLM
    from inlay.runtime.sampling_params import SamplingParams

    arguments.logit_bias = dict(arguments.logit_bias or ())
    params = dataclass_from_arguments(arguments, SamplingParams)
    engine = open_or_compile(arguments)
    with LLM(engine, tokenizer=arguments.tokenizer) as llm:
        results = [_stream(llm, prompt, params, arguments) for prompt in arguments.prompt]
    bandwidth = read_bandwidth()
    facts = []
    for output in results:
        facts.append(_speed(output, params))
        cached = len(output.prompt_token_ids) + len(output.outputs[0].token_ids) // 2
        rate = facts[-1]["decode_tokens_per_s"]
        share = None if rate is None else rate * decode_bytes(engine, cached) / bandwidth
        facts[-1] |= {"bandwidth_share": share, "bandwidth_gb_s": bandwidth / 1e9}
    if arguments.json:
        texts = [one.text for output in results for one in output.outputs]
        print(json.dumps({"ok": True, "texts": texts, "metrics": facts}))
    else:
        for fact in facts:
            print(_line(fact), file=sys.stderr)
    return 0


def open_or_compile(arguments: argparse.Namespace) -> Any:
    """The engine of an artifact, or of a model that is compiled first.

    Raises OptionError for a compile option that is given along with an artifact.
    """
    from inlay.engine import Engine, compile_model, is_artifact
    from inlay.errors import OptionError
    from inlay.lowering.options import CompileOptions

    fields = CompileOptions.__dataclass_fields__
    given = {n: v for n in fields if (v := getattr(arguments, n, None)) is not None}
    if is_artifact(arguments.model):
        backend = given.pop("backend", None)
        if given:
            raise OptionError(
                f"{', '.join(given)} cannot be changed for the artifact {arguments.model}; build "
                "another with `inlay build`"
            )
        return Engine.load(arguments.model, backend=backend)
    quiet = arguments.json
    return compile_model(
        arguments.model,
        tokenizer=arguments.tokenizer,
        progress=lambda line: None if quiet else print(f"  {line}", file=sys.stderr, flush=True),
        **given,
    )


def _stream(llm: Any, prompt: str, params: Any, arguments: argparse.Namespace) -> Any:
    """Print one prompt's text as it comes, or several sequences' at the end; returns its last
    output. Raises what the request failed of."""
    if arguments.chat:
        stream = llm.stream_chat([{"role": "user", "content": prompt}], params)
    else:
        stream = llm.stream(prompt, params)
    output: Any = None
    for output in stream:
        if not arguments.json and params.n == 1 and output.outputs:
            print(output.outputs[0].delta, end="", flush=True)
    if not arguments.json:
        several = [f"[{one.index}] {one.text}" for one in output.outputs if params.n > 1]
        print(*several, sep="\n", flush=True)
    if output.error is not None:
        raise output.error
    return output


def _speed(output: Any, params: Any) -> dict[str, Any]:
    """Time to first token in seconds, and decode speed: tokens after the first over their time."""
    metrics, num_tokens = output.metrics, len(output.outputs[0].token_ids)
    one_by_one = None if params.use_beam_search else metrics.mean_itl  # beams come all at once
    return {
        "prompt_tokens": len(output.prompt_token_ids),
        "output_tokens": num_tokens,
        "finish_reason": output.outputs[0].finish_reason,
        "ttft_s": metrics.ttft,
        "decode_tokens_per_s": 1 / one_by_one if one_by_one else None,
    }


def _line(fact: dict[str, Any]) -> str:
    text = (
        f"{fact['prompt_tokens']} prompt tokens, {fact['output_tokens']} output tokens, "
        f"TTFT {fact['ttft_s'] * 1e3:.1f} ms"
    )
    if fact["decode_tokens_per_s"] is not None:
        text += (
            f", decode {fact['decode_tokens_per_s']:.1f} tokens/s, "
            f"{fact['bandwidth_share']:.0%} of the {fact['bandwidth_gb_s']:.1f} GB/s limit"
        )
    return text
