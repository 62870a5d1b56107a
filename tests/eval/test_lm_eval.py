"""Tasks of lm-evaluation-harness: our model gives what the harness's own one for HF gives."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from inlay.cli import main
from inlay.engine import Engine, compile_model
from inlay.errors import OptionError
from inlay.eval.tasks import evaluate_tasks
from inlay.lowering.loading import demo_path

ITEMS = [
    ("The for statement is used to", [" iterate over the elements", " zebra quantum"], 0),
    ("Return a new", [" banana of the of", " list containing the items"], 1),
    ("If the argument is a", [" string, it must contain", " violin"], 0),
    ("Raises ValueError if", [" the value is not", " if if if"], 0),
]
TASKS = {
    "toy_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: brier_score}]
""",
    "toy_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "toy_generation": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{wanted}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}

MISSING = [name for name in ("lm_eval", "accelerate") if importlib.util.find_spec(name) is None]


def installed(test: Any) -> Any:
    """Importing the harness alone takes some ten seconds; its own model needs accelerate."""
    skip = pytest.mark.skipif(
        bool(MISSING), reason=f"pip install 'inlay[eval]' accelerate: {MISSING}"
    )
    return pytest.mark.slow(skip(test))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return compile_model("demo", "eager", dtype="float32", verify="capture")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the three tasks over one JSONL file."""
    folder = tmp_path_factory.mktemp("tasks")
    # Longer than the engine's context, so that it is rolled over.
    text = (demo_path() / "heldout.txt").read_text()[:12_000]
    data = folder / "data.jsonl"
    wanted = [" iterate", "", "", ""]
    rows = [
        {"question": q, "choices": c, "answer": a, "text": text[i * 100 :], "wanted": w}
        for i, ((q, c, a), w) in enumerate(zip(ITEMS, wanted, strict=True))
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, body in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        files = f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        (folder / f"{name}.yaml").write_text(head + files + body.lstrip())
    return folder


def from_hugging_face(folder: Path, max_length: int, tasks: list[str]) -> dict[str, Any]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(
        str(demo_path()), dtype="float32", device="cpu", max_length=max_length, batch_size=1
    )
    return lm_eval.simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )


@installed
def test_results_are_those_of_the_harness_own_model(engine: Engine, folder: Path) -> None:
    ours = evaluate_tasks(engine, list(TASKS), include_path=str(folder))
    theirs = from_hugging_face(folder, 2048 - 2, list(TASKS))["results"]
    for task, metrics in theirs.items():
        numbers = {
            key: value
            for key, value in metrics.items()
            if isinstance(value, float) and "stderr" not in key
        }
        assert numbers
        # Float32 sums in another order: 1e-6 of a log probability, a thousand of them summed.
        assert {key: ours[task][key] for key in numbers} == pytest.approx(numbers, rel=1e-5)
    assert ours["toy_choice"]["acc,none"] == 1.0
    assert ours["toy_rolling"]["word_perplexity,none"] > 50


@installed
def test_each_answer_is_that_of_the_harness_own_model(engine: Engine, folder: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    from inlay.eval.lm_eval import InlayLM
    from inlay.llm import LLM

    tasks = ["toy_choice", "toy_generation"]
    theirs = from_hugging_face(folder, 2048 - 2, tasks)["samples"]
    with LLM(engine, in_process=True) as llm:
        ours = lm_eval.simple_evaluate(
            model=InlayLM(llm, 2048, show_progress=False),
            tasks=tasks,
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            bootstrap_iters=0,
        )["samples"]
    for task in tasks:
        for mine, other in zip(ours[task], theirs[task], strict=True):
            if task == "toy_choice":
                for (score, greedy), (right, likeliest) in zip(
                    mine["filtered_resps"], other["filtered_resps"], strict=True
                ):
                    assert score == pytest.approx(right, rel=1e-5)
                    assert greedy == likeliest
            else:
                assert mine["filtered_resps"] == other["filtered_resps"]


@installed
def test_the_command_prints_a_table(engine: Engine, folder: Path, capsys: Any) -> None:
    arguments = ["eval", str(engine.path), "--tasks", "toy_choice", "--include-path", str(folder)]
    assert main([*arguments, "--num-samples", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    (results,) = report["results"].values()
    assert results["toy_choice"]["acc,none"] == 1.0


@installed
def test_an_unknown_task_is_refused(engine: Engine, folder: Path) -> None:
    with pytest.raises(OptionError, match=r"no task 'no_such'.*ls tasks"):
        evaluate_tasks(engine, ["toy_choice", "no_such"], include_path=str(folder))


@installed
def test_an_unknown_argument_of_generation_is_refused(engine: Engine) -> None:
    from inlay.eval.lm_eval import InlayLM
    from inlay.llm import LLM

    with LLM(engine, in_process=True) as llm:
        model = InlayLM(llm, 2048)
        assert model._sampling({"until": "x", "temperature": 0.5}).temperature == 0.5
        assert model._sampling({"until": "x", "do_sample": False, "top_p": 0.5}).top_p == 1.0
        with pytest.raises(OptionError, match="generation_kwargs has 'num_beams'"):
            model._sampling({"num_beams": 4})


def test_without_the_harness_the_message_says_what_to_install(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(OptionError, match=r"pip install 'inlay\[eval\]'"):
        evaluate_tasks(engine, ["hellaswag"])
