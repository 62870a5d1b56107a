"""llama.cpp by its C interface, with the server's scheme: running requests give one token each to
a batch, prompts fill what is left of it."""

from __future__ import annotations

import ctypes
import importlib.metadata
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

BATCH = 2048
NUM_SEQUENCES, SEQUENCE_LENGTH = 32, 1280
FILE_TYPES = {"int8": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "int4": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}
"""Of the precisions; bfloat16 is what the converter writes."""


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("llama-cpp-python", "gguf")}


def prepare(checkpoint: Path, directory: Path, job: dict[str, Any]) -> None:
    from gguf_checkpoint import write_gguf

    source, model = directory / "bf16.gguf", directory / "model.gguf"
    write_gguf(checkpoint, source)
    if job["precision"] == "bf16":
        source.rename(model)
        return
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[job["precision"]]
    params.nthread = job["threads"]
    failed = llama_cpp.llama_model_quantize(
        str(source).encode(), str(model).encode(), ctypes.byref(params)
    )
    source.unlink()
    if failed:
        raise SystemExit(f"llama_model_quantize returned {failed}")


class Model:
    def __init__(self, directory: Path, job: dict[str, Any]) -> None:
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        file = str(directory / "model.gguf").encode()
        self.model = llama_cpp.llama_model_load_from_file(file, params)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = NUM_SEQUENCES * SEQUENCE_LENGTH
        options.n_batch = BATCH
        options.n_seq_max = NUM_SEQUENCES
        options.n_threads = options.n_threads_batch = job["threads"]
        for name, value in job.get("options", {}).items():
            setattr(options, name, value)
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise SystemExit(f"llama.cpp cannot load {directory}")
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self.conditions = {"batching": "continuous", "n_ubatch": options.n_ubatch}

    def run(self, requests: list[dict[str, Any]], answers: Any) -> None:
        if len(requests) > NUM_SEQUENCES:
            raise SystemExit(f"at most {NUM_SEQUENCES} requests, got {len(requests)}")
        memory = llama_cpp.llama_get_memory(self.context)
        llama_cpp.llama_memory_clear(memory, False)
        tokens = [list(request["prompt_token_ids"]) for request in requests]
        done = [0 for _ in requests]  # tokens that the cache holds
        while True:
            places = self._fill(tokens, done, answers)
            if not self.batch.n_tokens:
                return
            if llama_cpp.llama_decode(self.context, self.batch):
                raise SystemExit("llama_decode failed")
            for index, place in places.items():
                logits = llama_cpp.llama_get_logits_ith(self.context, place)
                token = int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())
                tokens[index].append(token)
                answers.add(index, [token])
                if answers.is_done(index):
                    llama_cpp.llama_memory_seq_rm(memory, index, -1, -1)

    def _fill(self, tokens: list[list[int]], done: list[int], answers: Any) -> dict[int, int]:
        """Put the next tokens of all requests into the batch, those that decode first; gives the
        place in it of each request's last token, of those that have no more."""
        order = [index for index in range(len(tokens)) if not answers.is_done(index)]
        order.sort(key=lambda index: len(tokens[index]) - done[index] > 1)
        batch, places = self.batch, {}
        batch.n_tokens = 0
        for index in order:
            chunk = tokens[index][done[index] : done[index] + BATCH - batch.n_tokens]
            for token in chunk:
                place = batch.n_tokens
                batch.token[place], batch.pos[place] = token, done[index]
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, index
                done[index] += 1
                is_last = done[index] == len(tokens[index])
                batch.logits[place] = is_last
                if is_last:
                    places[index] = place
                batch.n_tokens += 1
        return places
