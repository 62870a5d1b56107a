"""Hugging Face in float32: what engines are judged against, run once for all of them."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from inlay.backends.cache import building, cache_dir, content_key, hold, keep
from inlay.errors import ModelLoadError, OptionError
from inlay.eval.text import Window
from inlay.lowering.capture import REFERENCE, build_shell
from inlay.lowering.export import output_of
from inlay.lowering.guards import in_float32, run_alone
from inlay.lowering.loading import load_source
from inlay.passes.check import relative_rms

logger = logging.getLogger(__name__)

CACHE_KIND = "references"
"""The folder of the cache that holds final hidden states."""

MAX_CACHED_BYTES = 1 << 30
"""Of one text's hidden states: more are neither held in memory nor kept on disk."""

SAME = 1e-6
"""Relative RMS error of a head that is run by itself: the same sums, in another order at most."""

Rows = Callable[[int, int], torch.Tensor]
"""Judged rows [begin, end) of a window as float32 logits [end - begin, vocab]."""


class Reference:
    """A checkpoint that is run by transformers, its weights widened to float32.

    Where the logits are the LM head's output and nothing else, the head is run for a few rows at a
    time, and the hidden states before it are what is cached between runs.
    """

    def __init__(self, model: PreTrainedModel, name: str, max_seq_len: int) -> None:
        self.name = name
        self.config = model.config
        self.sha256 = _model_sha256(model)
        self._max_seq_len = max_seq_len
        self._model = in_float32(build_shell(model, REFERENCE, max_seq_len=max_seq_len))
        self._is_split: bool | None = None

    @torch.inference_mode()
    def rows(self, window: Window) -> Rows:
        """Run one window; its logits are made as they are asked for."""
        hidden, logits = self._run(window)
        return self._rows_of(hidden) if logits is None else lambda begin, end: logits[begin:end]

    @torch.inference_mode()
    def over(self, windows: Sequence[Window]) -> Iterator[Rows]:
        """`rows` for each window, from the cache where the same was asked before."""
        place = cache_dir() / CACHE_KIND / f"{self._key(windows)}.safetensors"
        if (file := hold(place)) is not None:
            logger.info("hidden states of %s come from the cache, %s", self.name, file)
            for hidden in load_file(file)["hidden"].split([w.num_judged for w in windows]):
                yield self._rows_of(hidden)
            return
        kept: list[torch.Tensor] | None = []
        for window in windows:
            hidden, logits = self._run(window)
            if logits is not None:
                kept = None
                yield lambda begin, end, logits=logits: logits[begin:end]  # type: ignore[misc]
                continue
            if kept is not None:
                kept.append(hidden)
                if sum(part.nbytes for part in kept) > MAX_CACHED_BYTES:
                    logger.info("%s: too many hidden states to be kept in the cache", self.name)
                    kept = None
            yield self._rows_of(hidden)
        if kept:
            _keep(torch.cat(kept), place, self.name)

    def _run(self, window: Window) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The judged rows' hidden states [m, hidden], and their logits where those are not to be
        had from them alone."""
        ids, num = torch.tensor([list(window.token_ids)]), window.num_judged
        if self._is_split is None:
            logits = run_alone(self._model, ids)[-num:].float()
            try:
                hidden = self._hidden(ids, num)
                alone = self._rows_of(hidden)(0, num)
                self._is_split = relative_rms(logits, alone) <= SAME
            except (AttributeError, KeyError, RuntimeError, TypeError):  # a model of another build
                self._is_split, hidden = False, logits
            if not self._is_split:
                logger.info("%s does more than its LM head to its hidden states", self.name)
            return hidden, None if self._is_split else logits
        if self._is_split:
            return self._hidden(ids, num), None
        logits = run_alone(self._model, ids)[-num:].float()
        return logits, logits

    def _hidden(self, ids: torch.Tensor, num: int) -> torch.Tensor:
        hidden: torch.Tensor = output_of(self._model.base_model(input_ids=ids, use_cache=False))
        return hidden[0, -num:].clone()

    def _rows_of(self, hidden: torch.Tensor) -> Rows:
        head = self._model.get_output_embeddings()

        @torch.inference_mode()
        def rows(begin: int, end: int) -> torch.Tensor:
            logits: torch.Tensor = head(hidden[begin:end])
            return logits.float()

        return rows

    def _key(self, windows: Sequence[Window]) -> str:
        digest = hashlib.sha256()
        for window in windows:
            digest.update(str((list(window.token_ids), list(window.targets))).encode())
        return content_key(
            {
                "model": self.sha256,
                "windows": digest.hexdigest(),
                "max_seq_len": self._max_seq_len,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
        )


def _keep(hidden: torch.Tensor, place: Path, name: str) -> None:
    try:
        with building(place.parent) as scratch:
            file = scratch / place.name
            save_file({"hidden": hidden.contiguous()}, file)
            keep(file, place, {"origin": name, "what": "hidden states in float32"})
    except OSError as error:
        logger.warning("the cache cannot keep what %s gave: %s", name, error)


def _model_sha256(model: PreTrainedModel) -> str:
    """Of the config and all weights, by name."""
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


@dataclass(frozen=True)
class Origin:
    """Where an engine's reference comes from: a model in memory, or a name that is loaded when it
    is needed."""

    model: Any
    trust_remote_code: bool = False

    def load(self, max_seq_len: int) -> Reference:
        """Raises OptionError or ModelLoadError where there is none that can be run."""
        name = str(self.model) if isinstance(self.model, str | os.PathLike) else "model in memory"
        try:
            source = load_source(self.model, "auto", trust_remote_code=self.trust_remote_code)
        except ModelLoadError as error:
            raise ModelLoadError(
                f"the reference {name} cannot be loaded; name the checkpoint that the engine was "
                f"made of with reference (--reference DIR): {error}"
            ) from error
        if getattr(source.model.config, "quantization_config", None):
            raise OptionError(
                f"the reference {name} is quantized itself; name the checkpoint that it was made "
                "of, in float32, bfloat16 or float16, with reference (--reference DIR)"
            )
        return Reference(source.model, name, max_seq_len)
