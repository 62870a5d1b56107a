"""Tasks of lm-evaluation-harness on an engine, its own or those of a directory of YAML files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from inlay.engine import Engine
from inlay.errors import OptionError


def evaluate_tasks(
    engine: Engine,
    tasks: Sequence[str],
    *,
    tokenizer: Any = None,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    num_samples: int | None = None,
    kv_cache_dtype: str = "auto",
) -> dict[str, dict[str, Any]]:
    """Metrics by task, as the harness gives them.

    tasks: names. include_path: a directory with tasks beside the harness's own; a task on local
    files needs no network. num_fewshot: examples in each prompt; None is the task's own number.
    num_samples: of each task; None is all.

    Raises OptionError where the harness is not installed, or has no such task.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise OptionError(
            f"--tasks needs lm-evaluation-harness: pip install 'inlay[eval]' ({error})"
        ) from error
    from inlay.eval.lm_eval import InlayLM
    from inlay.llm import LLM

    manager = _task_manager(tasks, include_path)
    with LLM(engine, tokenizer=tokenizer, kv_cache_dtype=kv_cache_dtype) as llm:
        found = lm_eval.simple_evaluate(
            model=InlayLM(llm, engine.manifest["limits"]["max_seq_len"]),
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=num_samples,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,
        )
    # By way of JSON: metrics may be of numpy's types.
    results: dict[str, dict[str, Any]] = json.loads(json.dumps(found["results"], default=float))
    return results


def _task_manager(tasks: Sequence[str], include_path: str | None) -> Any:
    """Of the user's own tasks where that is enough: the harness takes long to list all of its."""
    from lm_eval.tasks import TaskManager

    unknown: list[str] = []
    for include_defaults in (False, True):
        if include_defaults or include_path is not None:
            manager = TaskManager(include_path=include_path, include_defaults=include_defaults)
            unknown = [name for name in tasks if not manager.match_tasks([name])]
            if not unknown:
                return manager
    raise OptionError(
        f"there is no task {unknown[0]!r}; `lm-eval ls tasks` lists those of the harness, and "
        f"--include-path DIR adds those of a directory (given: {include_path})"
    )


def table(name: str, results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Lines: a metric each, with its standard error where the harness gives one."""
    yield name
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if isinstance(value, float) and not metric.endswith("_stderr"):
                error = metrics.get(f"{metric}_stderr,{kind}")
                shown = f" +- {error:.4f}" if isinstance(error, float) else ""
                yield f"  {task:<24} {metric:<16} {value:.4f}{shown}"
