from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from inlay.batch_file import BatchSummary, parse
from inlay.errors import EngineError, OptionError, RequestError
from inlay.runtime.sampling_params import SamplingParams
from tests.fake_llm import GREEDY, TOKENIZER, FakeLLM, alone, assert_usable, fail_at
from tests.test_prompts import TEMPLATE


@pytest.fixture
def llm() -> Iterator[FakeLLM]:
    with FakeLLM() as llm:
        yield llm


def write(path: Path, lines: Sequence[Mapping[str, Any] | str]) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts))
    return path


def read(path: Path) -> dict[Any, dict[str, Any]]:
    """Output lines by id, else by line number; each must come once."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {line["line"] if line["id"] is None else line["id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


def run(llm: FakeLLM, source: Path, target: Path, **options: Any) -> BatchSummary:
    return llm.batch(source, target, GREEDY, use_tqdm=False, **options)


def text_of(line: Mapping[str, Any]) -> str:
    return line["outputs"][0]["text"]


def test_every_kind_of_line(llm: FakeLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOKENIZER, "chat_template", TEMPLATE)
    messages = [{"role": "user", "content": "fox"}]
    lines: list[Any] = [
        {"id": "text", "prompt": "a fox"},
        "",
        {"prompt_token_ids": [1, 2, 3], "max_tokens": 3},
        {"id": 9, "messages": messages, "logit_bias": {"5": -3.5}, "n": 1},
    ]
    source, target = write(tmp_path / "in", lines), tmp_path / "out"
    assert run(llm, source, target) == BatchSummary(num_done=3, num_failed=0, num_skipped=0)
    found = read(target)
    assert list(map(str, sorted(found, key=str))) == ["3", "9", "text"]
    assert text_of(found["text"]) == TOKENIZER.decode(alone(llm, "a fox", GREEDY))
    assert found["text"]["outputs"][0]["finish_reason"] == "length"
    assert found["text"]["prompt_tokens"] == len(TOKENIZER.encode("a fox"))
    assert found[3]["outputs"][0]["num_tokens"] == 3
    biased = SamplingParams(temperature=0, max_tokens=10, logit_bias={5: -3.5})
    assert text_of(found[9]) == TOKENIZER.decode(alone(llm, "<user>fox\n<assistant>", biased))
    assert all(line["error"] is None for line in found.values())
    assert_usable(llm)


def test_bad_lines_are_told_and_tried_again(llm: FakeLLM, tmp_path: Path) -> None:
    bad = {
        "{broken": "a line must be a JSON object",
        "[1]": "a line must be a JSON object",
        '{"id": [1], "prompt": "x"}': "id must be a text or an integer",
        '{"id": "a"}': "must have one of prompt, messages, prompt_token_ids; given none",
        '{"id": "b", "prompt": "x", "messages": []}': "given prompt, messages",
        '{"id": "c", "prompt": ""}': "the prompt is empty",
        '{"id": "d", "prompt": 5}': "a prompt must be",
        '{"id": "e", "messages": 5}': "chat template",
        '{"id": "f", "prompt": "x", "temprature": 1}': "unknown field 'temprature'",
        '{"id": "g", "prompt": "x", "temperature": -1}': "SamplingParams.temperature must be",
        '{"id": "h", "prompt_token_ids": [1, 100000]}': "prompt token ids must be integers",
        '{"id": "i", "prompt": "\\ud800"}': "no valid Unicode",
        '{"id": "j", "prompt": "x", "logit_bias": {"a": 1}}': "logit_bias must be",
        '{"id": "good", "prompt": "y"}': "was given to a line before",
    }
    source = write(tmp_path / "in", ['{"id": "good", "prompt": "x"}', *bad])
    with source.open("ab") as file:
        file.write(b'{"id": "bytes", "prompt": "\xff"}\n')
    target = tmp_path / "out"
    expected = BatchSummary(num_done=1, num_failed=len(bad) + 1, num_skipped=0)
    assert run(llm, source, target) == expected
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    errors = {line["line"]: line["error"] for line in lines if line["error"] is not None}
    for number, (text, message) in enumerate(bad.items(), 2):
        assert message in errors[number], text
    assert "no valid Unicode" in errors[len(bad) + 2]
    again = run(llm, source, target)
    assert again == BatchSummary(num_done=0, num_failed=len(bad) + 1, num_skipped=1)
    assert len(target.read_text().splitlines()) == len(bad) + 2, "old errors were kept"


def test_a_request_that_fails_is_tried_again(llm: FakeLLM, tmp_path: Path) -> None:
    source = write(tmp_path / "in", [{"prompt": "a fox"}, {"prompt": "x"}])
    target = tmp_path / "out"
    fail_at(llm, 1, RuntimeError("out of luck"))
    first = run(llm, source, target)
    assert first.num_failed >= 1
    assert "RuntimeError: out of luck" in [line.get("error") for line in read(target).values()]
    assert run(llm, source, target).num_done == first.num_failed
    assert [text_of(read(target)[n]) for n in (1, 2)] == [
        TOKENIZER.decode(alone(llm, prompt, GREEDY)) for prompt in ("a fox", "x")
    ]


KILLED = """
import json, os, sys
from tests.fake_llm import GREEDY, FakeLLM

def kill_self(number):
    if number == 60:
        os.kill(os.getpid(), 9)

llm = FakeLLM()
llm.model.before_forward = kill_self
llm.batch(sys.argv[1], sys.argv[2], GREEDY, use_tqdm=False)
"""


def test_a_killed_run_is_resumed(llm: FakeLLM, tmp_path: Path) -> None:
    prompts = [[n, n + 1] for n in range(80)]
    lines = [{"id": f"p{n}", "prompt_token_ids": ids} for n, ids in enumerate(prompts)]
    source, target = write(tmp_path / "in", lines), tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(source), str(target)]
    killed = subprocess.run(command, check=False, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr[-2000:]
    before = target.read_bytes()
    num_before = before.count(b"\n")
    assert 0 < num_before < 80
    whole, torn = before.rsplit(b"\n", 2)[0] + b"\n", before.splitlines()[-1]
    target.write_bytes(whole + torn[: len(torn) // 2])
    summary = run(llm, source, target)
    assert summary == BatchSummary(81 - num_before, 0, num_before - 1)
    assert target.read_bytes().startswith(whole), "what was done is as it was"
    found = read(target)
    assert len(found) == 80
    for number, ids in enumerate(prompts):
        expected = TOKENIZER.decode(alone(llm, ids, GREEDY), skip_special_tokens=True)
        assert text_of(found[f"p{number}"]) == expected
    assert run(llm, source, target) == BatchSummary(0, 0, 80)


def test_the_engines_end_raises_and_loses_nothing(llm: FakeLLM, tmp_path: Path) -> None:
    lines = [{"prompt_token_ids": [n]} for n in range(60)]
    source, target = write(tmp_path / "in", lines), tmp_path / "out"
    llm.model.before_forward = lambda number: llm._frontend.close_soon() if number == 40 else None
    with pytest.raises(EngineError, match="shut down"):
        run(llm, source, target)
    num_done = len(read(target))
    assert all(line["error"] is None for line in read(target).values())
    llm.model.before_forward = lambda number: None
    llm.restart()
    assert run(llm, source, target) == BatchSummary(60 - num_done, 0, num_done)
    assert sorted(read(target)) == list(range(1, 61))


def test_few_requests_are_held_at_once(llm: FakeLLM, tmp_path: Path) -> None:
    source = write(tmp_path / "in", [{"prompt_token_ids": [n]} for n in range(100)])
    most = 0

    def count(number: int) -> None:
        nonlocal most
        most = max(most, llm._frontend.processor.num_unfinished)

    llm.model.before_forward = count
    run(llm, source, tmp_path / "out")
    assert most == 4 * 6, "four times max_num_seqs"


def test_files_that_cannot_be_used(llm: FakeLLM, tmp_path: Path) -> None:
    source = write(tmp_path / "in", [{"prompt": "x"}])
    with pytest.raises(OptionError, match=r"batch cannot use .*nowhere"):
        run(llm, tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(OptionError, match="batch cannot use"):
        run(llm, source, tmp_path)


def test_files_that_are_no_outputs_are_left_as_they_are(llm: FakeLLM, tmp_path: Path) -> None:
    source = write(tmp_path / "in", [{"id": "a", "prompt": "x"}])
    output = {"id": None, "line": 1, "error": None, "outputs": []}
    for name, content in {
        "input": source.read_text(),
        "text": "notes of mine",
        "mixed": json.dumps(output) + "\nnotes\n" + json.dumps(output) + "\n",
    }.items():
        target = tmp_path / name
        target.write_text(content)
        with pytest.raises(OptionError, match=r"line \d of .* is no output of batch"):
            run(llm, source, target)
        assert target.read_text() == content
    before = source.read_text()
    with pytest.raises(OptionError, match="over its input"):
        run(llm, source, source)
    with pytest.raises(OptionError, match="nowhere"):  # input and output in the wrong order
        run(llm, tmp_path / "nowhere", source)
    assert source.read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "input", "mixed", "text"]


def test_a_byte_order_mark_is_no_part_of_the_first_line(llm: FakeLLM, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_text('{"prompt": "x"}\n', encoding="utf-8-sig")
    assert run(llm, source, tmp_path / "out") == BatchSummary(1, 0, 0)


def test_its_progress_is_shown(
    llm: FakeLLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in", [{"prompt": "x"}, {"prompt": ""}])
    llm.batch(source, tmp_path / "out", GREEDY)
    assert "Batch: 100%" in capsys.readouterr().err


def test_a_line_brings_no_code() -> None:
    line = json.dumps({"prompt": "a", "logits_processors": ["os:system"]})
    with pytest.raises(RequestError, match="unknown field 'logits_processors'"):
        parse(1, line, SamplingParams())
