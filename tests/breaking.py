"""Ways to break a part of the package for one test, and builds that share what is not broken."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from torch.fx import GraphModule, Node
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from inlay import Engine, compile_model
from inlay.lowering import capture as capture_module
from inlay.lowering import pipeline
from inlay.lowering.attention import ATTENTION
from inlay.lowering.experts import EXPERTS
from inlay.lowering.export import Captured
from inlay.lowering.guards import References
from inlay.passes import pass_manager
from inlay.passes.graph import bind, calls, copy_graph, insert_call
from tests.toys import build_toy


class Patch:
    """Puts broken functions in place of right ones; counts their calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.reached = 0

    def broken(self, original: Callable[..., Any], change: Callable[..., Any]) -> Any:
        @functools.wraps(original)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.reached += 1
            return change(original, *args, **kwargs)

        return run

    def function(self, owner: Any, name: str, change: Callable[..., Any]) -> None:
        """owner.name(...), or owner[name](...), becomes change(original, ...)."""
        if isinstance(owner, dict):
            self.monkeypatch.setitem(owner, name, self.broken(owner[name], change))
        else:
            self.monkeypatch.setattr(owner, name, self.broken(getattr(owner, name), change))


Break = Callable[[Patch], None]


def with_arguments(owner: Any, name: str, **changes: Callable[[Any], Any]) -> Break:
    """The function is given changes[argument](value) for these arguments."""

    def change(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        for key, new in changes.items():
            bound.arguments[key] = new(bound.arguments[key])
        return original(*bound.args, **bound.kwargs)

    return lambda patch: patch.function(owner, name, change)


def with_result(owner: Any, name: str, new: Callable[[Any], Any]) -> Break:
    """The function's result is changed."""
    return lambda patch: patch.function(owner, name, lambda run, *a, **k: new(run(*a, **k)))


def instead(owner: Any, name: str, run: Callable[..., Any]) -> Break:
    """The function is another one."""
    return lambda patch: patch.function(owner, name, lambda original, *a, **k: run(*a, **k))


def attention_call(**changes: Callable[[Any], Any]) -> Break:
    """What transformers calls for attention gets other arguments."""
    return with_arguments(AttentionInterface._global_mapping, ATTENTION, **changes)


def experts_call(**changes: Callable[[Any], Any]) -> Break:
    """What transformers calls for experts gets other arguments."""
    return with_arguments(ExpertsInterface._global_mapping, EXPERTS, **changes)


Edit = Callable[[GraphModule], None]


def after_pass(name: str, *edits: Edit) -> Break:
    """A pass that also does this to the graph."""

    def apply(patch: Patch) -> None:
        def change(original: Callable[..., Any], gm: GraphModule, one: Any) -> Any:
            if one.name != name:
                return original(gm, one)

            def run(gm: GraphModule) -> int:
                count = one.run(gm)
                for edit in edits:
                    edit(gm)
                return count

            return original(gm, replace(one, run=run))

        patch.function(pass_manager, "_run_pass", change)

    return apply


def read_calls(gm: GraphModule, op: Any) -> list[Node]:
    """Calls whose result is read: a pass leaves what it has replaced to the driver."""
    return [node for node in calls(gm, op) if node.users]


def emit(op: Any, which: slice = slice(None), **changes: Callable[[Any], Any]) -> Edit:
    """Calls of this op get other arguments; at least one must be there."""

    def edit(gm: GraphModule) -> None:
        found = read_calls(gm, op)[which]
        assert found, f"the graph has no {op}"
        for node in found:
            bound = bind(node)
            for key, new in changes.items():
                bound[key] = new(bound[key])
            node.args, node.kwargs = tuple(bound.values()), {}

    return edit


def swap(op: Any, one: str, other: str) -> Edit:
    """Calls of this op get two arguments in each other's place."""

    def edit(gm: GraphModule) -> None:
        found = read_calls(gm, op)
        assert found, f"the graph has no {op}"
        for node in found:
            bound = bind(node)
            bound[one], bound[other] = bound[other], bound[one]
            node.args, node.kwargs = tuple(bound.values()), {}

    return edit


def through(target: Any, *args: Any) -> Callable[[Node], Node]:
    """A tensor of the graph, sent through one more op."""
    return lambda node: insert_call(node.graph, node.next, target, node, *args)


@dataclass(frozen=True)
class Toy:
    """A model small enough to be built for every mutant.

    plain: attention is not asked of transformers' registry but looked for in the plain graph.
    scaled: ends of parameters' names, and what these are multiplied with. overrides: of the config.
    """

    name: str
    layers: int | None = 1
    plain: bool = False
    scaled: tuple[tuple[str, float], ...] = ()
    overrides: tuple[tuple[str, Any], ...] = ()

    def build(self) -> PreTrainedModel:
        model = build_toy(self.name, layers=self.layers, **dict(self.overrides))
        for end, factor in self.scaled:
            found = [value for name, value in model.named_parameters() if name.endswith(end)]
            assert found, f"{self.name} has no parameter {end}"
            for value in found:
                value.data.mul_(factor)
        return model


@dataclass
class Subject:
    """A toy, what its right build gave, and what mutants of later stages can go on with.

    exports: by attention implementation, before any pass. captured: the result of capture.
    """

    model: PreTrainedModel
    exports: dict[str | None, Captured] = field(default_factory=dict)
    captured: Captured | None = None
    references: References | None = None
    engine: Engine | None = None


def copied(captured: Captured) -> Captured:
    return replace(captured, graph=copy_graph(captured.graph))


def looked_for_in_the_plain_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    right = capture_module.build_shell

    def build_shell(model: Any, attention: str | None, *rest: Any) -> Any:
        if attention == ATTENTION:
            raise ValueError("not asked")
        return right(model, "eager" if attention is None else attention, *rest)

    monkeypatch.setattr(capture_module, "build_shell", build_shell)


@functools.cache
def right_build(toy: Toy, backend: str = "eager") -> Subject:
    """The control: nothing is broken, and every guard lets it pass."""
    subject = Subject(toy.build())
    export, captured = capture_module.export_row, pipeline.capture
    references = pipeline.reference_logits

    def keep_export(shell: PreTrainedModel, *rest: Any) -> Captured:
        made = export(shell, *rest)
        subject.exports[shell.config._attn_implementation] = copied(made)
        return made

    def keep_captured(*args: Any) -> Captured:
        made = captured(*args)
        subject.captured = copied(made)
        return made

    def keep_references(*args: Any) -> References:
        subject.references = references(*args)
        return subject.references

    with pytest.MonkeyPatch.context() as monkeypatch:
        if toy.plain:
            looked_for_in_the_plain_graph(monkeypatch)
        monkeypatch.setattr(capture_module, "export_row", keep_export)
        monkeypatch.setattr(pipeline, "capture", keep_captured)
        monkeypatch.setattr(pipeline, "reference_logits", keep_references)
        subject.engine = build(subject.model, "pass", backend)
    return subject


def build(model: PreTrainedModel, verify: str, backend: str = "eager") -> Engine:
    return compile_model(model, backend, dtype="float32", block_size=16, verify=verify)


def reuse(monkeypatch: pytest.MonkeyPatch, toy: Toy, begin: str) -> None:
    """Let a build take what the right one made before a part of the pipeline.

    begin: "model" (nothing is taken), "export" (only Hugging Face's numbers are), "graph" (the
    exported graph), "passes" (the captured graph).
    """
    subject = right_build(toy)
    if toy.plain:
        looked_for_in_the_plain_graph(monkeypatch)
    if begin == "model":
        return
    monkeypatch.setattr(pipeline, "reference_logits", lambda *_: subject.references)
    if begin == "graph":
        made = subject.exports
        monkeypatch.setattr(
            capture_module,
            "export_row",
            lambda shell, *_: copied(made[shell.config._attn_implementation]),
        )
    if begin == "passes":
        assert subject.captured is not None
        kept = subject.captured
        monkeypatch.setattr(pipeline, "capture", lambda *_: copied(kept))
