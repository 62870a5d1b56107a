"""onnxruntime-genai: models from its own builder, requests one at a time."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnxruntime_genai as og

MAX_LENGTH = 2048


def versions() -> dict[str, str]:
    names = ("onnxruntime-genai", "onnxruntime")
    return {name: importlib.metadata.version(name) for name in names}


def prepare(checkpoint: Path, directory: Path, job: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        source = Path(folder) / "checkpoint"
        source.mkdir()
        for file in checkpoint.iterdir():
            (source / file.name).symlink_to(file.resolve())
        _add_tokenizer(source)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source)]
        command += ["-o", str(directory), "-p", job["precision"], "-e", "cpu", "-c", folder]
        subprocess.run([*command, "--extra_options", "prune_lm_head=true"], check=True)
    place = directory / "genai_config.json"
    config = json.loads(place.read_text())
    session = config["model"]["decoder"].setdefault("session_options", {})
    session["intra_op_num_threads"] = job["threads"]
    config["model"]["eos_token_id"] = []
    place.write_text(json.dumps(config))


def _add_tokenizer(directory: Path) -> None:
    """The builder insists on a tokenizer; a checkpoint without gets one that nothing uses."""
    if (directory / "tokenizer_config.json").exists():
        return
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    size = json.loads((directory / "config.json").read_text())["vocab_size"]
    words = Tokenizer(WordLevel({f"<{i}>": i for i in range(size)}, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory)


class Model:
    def __init__(self, directory: Path, job: dict[str, Any]) -> None:
        self.model = og.Model(str(directory))
        self.conditions = {"batching": "none: one request after the other"}

    def run(self, requests: list[dict[str, Any]], answers: Any) -> None:
        for index, request in enumerate(requests):
            params = og.GeneratorParams(self.model)
            length = len(request["prompt_token_ids"]) + request["max_tokens"]
            params.set_search_options(do_sample=False, max_length=min(length, MAX_LENGTH))
            generator = og.Generator(self.model, params)
            generator.append_tokens([request["prompt_token_ids"]])
            while not answers.is_done(index):
                generator.generate_next_token()
                answers.add(index, [int(generator.get_next_tokens()[0])])
