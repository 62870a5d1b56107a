"""The contract between lowering, backends and the runtime.

A backend compiles the distinct segments of a program once (`build`) and gives back a model that
runs steps (`load`). The runtime sees only `LoadedModel`; lowering sees only `Backend`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch.fx import GraphModule

from inlay.backends.program import Program
from inlay.backends.step import StepInputs
from inlay.errors import RequestError
from inlay.passes.quantize.config import Scheme

if TYPE_CHECKING:
    from inlay.backends.artifact import Artifact


@dataclass(frozen=True)
class KVGroup:
    """Attention layers that keep the same blocks: all full-attention layers, or all of one window.

    window: tokens a query may look back on, itself included; 0 means all.
    bytes_per_block: of all the group's layers together, in the cache's dtype.
    """

    window: int
    num_layers: int
    bytes_per_block: int


@dataclass(frozen=True)
class ModelLimits:
    """What an engine was built for; requests and batches are checked against these."""

    vocab_size: int
    max_seq_len: int  # prompt and output together, in tokens
    max_num_tokens: int  # a step's token budget
    max_num_seqs: int  # requests in one step
    block_size: int  # tokens a KV block holds
    padding_token: int | None = None  # takes no position, so no request may hold it

    def refuse_padding(self, token_ids: Sequence[int]) -> None:
        """Raises RequestError where the padding token is among a request's tokens."""
        if self.padding_token in token_ids:
            raise RequestError(
                f"token ids must not hold the padding token {self.padding_token}: this model counts"
                " positions without it, so the tokens behind it would get other ones than Hugging "
                "Face gives them; leave it out"
            )


@dataclass
class Process:
    """is_executor: whether this process is there to run one engine, so that a backend may set what
    a library keeps for a whole process. In a user's own it must leave such things alone."""

    is_executor: bool = False


PROCESS = Process()


class LoadedModel(Protocol):
    """A model that is ready to run steps on one device.

    is_encoder: tokens see those after them: requests come whole, and `forward` gives the hidden
        states [T, hidden] of all tokens.
    kv_groups: what `kv_groups_for(None)` gives.
    """

    is_encoder: bool
    limits: ModelLimits
    kv_groups: tuple[KVGroup, ...]
    device: torch.device

    def kv_groups_for(self, dtype: str | None) -> tuple[KVGroup, ...]:
        """The KV groups, with the bytes of a block in this cache dtype, scales included.

        dtype: a word that `inlay.passes.kv_formats.parse_kv_cache_dtype` knows; None: the model's.
        Raises OptionError for another word.
        """

    def allocate_kv_cache(self, num_blocks: int | Sequence[int], dtype: str | None = None) -> None:
        """(Re)allocate the paged cache of every layer: num_blocks for each KV group, or one number
        for all of them; dtype as in `kv_groups_for`."""

    def kv_tensors(self, group: int) -> list[torch.Tensor]:
        """All that holds a group's keys and values, scales included; the first dimension is the
        block: who copies tensor[a] to tensor[b] in each of them has copied block a to b."""

    def make_batch_invariant(self) -> None:
        """From now on a token's logits are bitwise the same whatever else is in its step, for as
        long as the number of threads is; may cost speed. OptionError where it cannot be."""

    def forward(self, step: StepInputs) -> torch.Tensor:
        """Run one step, writing the new tokens' keys and values; returns logits [R, vocab]."""

    def forward_pieces(self, step: StepInputs) -> torch.Tensor:
        """As `forward`, with what lies between attention calls replayed from CUDA graphs; these are
        captured at the first call with a step's number of (padded) tokens."""

    def forward_hidden(self, step: StepInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """The same; returns logits [R, vocab] and the final hidden states [T, hidden], which the
        LM head takes: those after the last norm. An encoder gives its hidden states twice."""


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """See `CompileOptions`."""

    device: str = "auto"
    library: str = "auto"
    target: str = "auto"
    fallback: str = "none"
    whole: bool = False


@dataclass(frozen=True)
class BuildSettings(BackendOptions):
    """What a backend needs to know to compile segments.

    progress: called with a line of text when a part of the build ends. origin: the model's name,
        noted beside what is cached.
    """

    limits: ModelLimits
    optimization_level: int
    progress: Callable[[str], None]
    origin: str = ""


@dataclass(frozen=True, kw_only=True)
class Known(BackendOptions):
    """What is known of a build before a model is captured, which may take minutes.

    dtype: as in `Program`; "" while only a checkpoint that was not opened says it. schemes: some
        that layers are sure to have; is_stored: they are a checkpoint's own, not asked for.
    """

    dtype: str = ""
    schemes: tuple[Scheme, ...] = ()
    is_stored: bool = False


BACKEND_OPTIONS = {
    "device": ("inductor", "eager"),
    "library": ("tensorrt",),
    "target": ("tensorrt",),
    "fallback": ("tensorrt",),
    "whole": ("onnxruntime",),
}
"""Options that not every backend has, with the names of those: the fields of `BackendOptions`."""


class Checkable(NamedTuple):
    """What a finished build is compared with Hugging Face by.

    what: it in words, for the manifest. is_engine: False where the engine cannot run here, so that
    something else runs what it was made of.
    """

    model: LoadedModel
    what: str
    is_engine: bool = True


class Backend(Protocol):
    """How segments become code, and how that code is run. Backends inherit of it."""

    name: str

    def check_early(self, known: Known) -> None:
        """Raise what `check` would, where this is enough to know it. Asked before a model is
        opened, when its config is read and when it is loaded, each time with more."""
        return

    def check_runs(self) -> None:
        """Raise BuildError where no engine of this backend can run on this machine, though it may
        be built here."""
        return

    def prepare(self, options: BackendOptions) -> None:
        """Begin, in the background, what a build needs whatever the model; errors come in check."""

    def check(
        self, program: Program, segments: Mapping[str, GraphModule], settings: BuildSettings
    ) -> None:
        """Raise, before anything is built, for what this backend cannot lower here.

        Raises:
            UnsupportedModelError, OptionError: the program or an option is the matter.
            BuildError: this machine lacks something.
        """

    def build(
        self,
        program: Program,
        segments: Mapping[str, GraphModule],
        directory: Path,
        settings: BuildSettings,
    ) -> dict[str, Any]:
        """Compile each segment into files under directory/KEY/; returns what the manifest's
        target must say so that loading elsewhere can be refused, {} for "runs anywhere".

        directory is the artifact's segments/; its weights lie beside it already.
        """

    def load(self, artifact: Artifact) -> LoadedModel:
        """A model ready to run; raises ArtifactError where the artifact does not fit here."""

    def load_to_check(self, artifact: Artifact) -> Checkable:
        """The same after a build, or what stands in for it where the engine cannot run here."""
        return Checkable(self.load(artifact), f"the {self.name} engine")

    def weight_files(self, directory: Path) -> list[Path]:
        """Files below an artifact's directory that hold weights, beside weights/: `prune` leaves
        them out, `refit` has them made again. Code of most backends holds none."""
        return []

    def check_refit(self, settings: BuildSettings) -> None:
        """Raise BuildError where this machine lacks what `refit` needs. Asked before any weight is
        read; `refit` itself need not ask again."""
        return

    def refit(self, directory: Path, program: Program, settings: BuildSettings) -> dict[str, Any]:
        """Make `weight_files` again, of what an artifact's directory has: the build's other files
        and new weights (`WeightReader(directory)`); there is no manifest yet. Returns what it is to
        say anew of its target."""
        return {}
