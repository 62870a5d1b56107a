"""Formulas of `inlay bench` against cases computed by hand, each beside a twin that is wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from inlay.bench import metrics
from inlay.bench.metrics import (
    Record,
    distribution,
    meets,
    parse_goodput,
    record_of,
    span,
    summarize,
)
from inlay.errors import OptionError, RequestError
from inlay.runtime.outputs import CompletionOutput, RequestMetrics, RequestOutput

# Sent 1 s after it was due; first token after 2 s; 4 more tokens in 6 s.
LONG = Record(10, 5, due=100.0, sent=101.0, first_token=103.0, finish=109.0, gaps=(1.0, 5.0))
SHORT = Record(30, 1, due=100.0, sent=100.0, first_token=104.0, finish=104.0, gaps=())
ABORTED = Record(7, 3, 100.0, 100.0, 101.0, 120.0, reason="abort")
REFUSED = Record(9, 0, 100.0, 100.0, reason="refused", error="too long")
RUN = [LONG, SHORT, ABORTED, REFUSED]


def test_one_request() -> None:
    assert (LONG.ttft, LONG.tpot, LONG.e2e, LONG.wait) == (2.0, 1.5, 8.0, 1.0)
    assert (SHORT.ttft, SHORT.tpot, SHORT.e2e, SHORT.wait) == (4.0, None, 4.0, 0.0)
    assert (REFUSED.ttft, REFUSED.tpot, REFUSED.e2e) == (None, None, None)
    assert [record.completed for record in RUN] == [True, True, False, False]
    assert not replace(LONG, error="it failed all the same").completed


def test_percentiles() -> None:
    # Of 1, 2, 4, 8 at places 1.5, 2.7 and 2.97 of 0..3; in milliseconds.
    found = distribution([8.0, None, 1.0, 4.0, 2.0])
    assert found == pytest.approx({"mean": 3750.0, "p50": 3000.0, "p90": 6800.0, "p99": 7880.0})
    assert distribution([0.5]) == {"mean": 500.0, "p50": 500.0, "p90": 500.0, "p99": 500.0}
    assert distribution([]) is None
    assert distribution([None]) is None


def test_a_whole_run() -> None:
    found = summarize([RUN], {"ttft": 3000.0})
    # From 100 to 120, when the aborted one ended: its tokens do not count, its time does.
    assert span(RUN) == found["seconds"] == 20.0
    assert (found["num_completed"], found["num_failed"]) == (2, 2)
    assert found["failures"] == {"abort": 1, "refused: too long": 1}
    assert (found["num_input_tokens"], found["num_output_tokens"]) == (40, 6)
    assert found["requests_per_s"] == 2 / 20
    assert found["input_tokens_per_s"] == 40 / 20
    assert found["output_tokens_per_s"] == 6 / 20
    assert found["total_tokens_per_s"] == 46 / 20
    assert found["goodput_per_s"] == 1 / 20
    assert found["ttft_ms"]["mean"] == 3000.0
    assert found["tpot_ms"]["mean"] == 1500.0
    assert found["itl_ms"]["mean"] == 3000.0
    assert found["e2e_ms"]["p50"] == 6000.0
    assert found["wait_ms"]["mean"] == 500.0


def test_repeats_are_pooled_and_rates_are_their_median() -> None:
    fast = [replace(SHORT, first_token=101.0, finish=101.0)]
    slow = [replace(SHORT, first_token=108.0, finish=110.0)]
    found = summarize([fast, [SHORT], slow])
    assert found["output_tokens_per_s_of_repeats"] == [1.0, 0.25, 0.1]
    assert found["output_tokens_per_s"] == 0.25
    assert found["ttft_ms"]["p50"] == 4000.0
    assert found["num_completed"] == 3
    assert "goodput_per_s" not in found


def test_where_nothing_was_completed_or_streamed() -> None:
    found = summarize([[REFUSED]])
    assert (found["seconds"], found["requests_per_s"], found["ttft_ms"]) == (0.0, 0.0, None)
    assert found["num_failed"] == 1
    assert summarize([[replace(LONG, gaps=None)]])["itl_ms"] is None


def test_goodput() -> None:
    assert parse_goodput(["ttft:200", "e2el:1e3"]) == {"ttft": 200.0, "e2el": 1000.0}
    assert meets(LONG, {"ttft": 2000.0, "tpot": 1500.0, "e2el": 8000.0})
    for name, limit in (("ttft", 1999.0), ("tpot", 1499.0), ("e2el", 7999.0)):
        assert not meets(LONG, {name: limit})
    assert meets(SHORT, {"tpot": 1e-9})  # it has none
    assert not meets(ABORTED, {"ttft": 1e9})
    for wrong in ("ttft", "ttft:", "ttft:-1", "ttft:0", "ttft:inf", "itl:5", "tpot:nan"):
        with pytest.raises(OptionError, match="--goodput takes ttft, tpot, e2el"):
            parse_goodput([wrong])


def test_the_record_of_an_output() -> None:
    times = RequestMetrics(5.0, 5.5, 6.0, 9.0, num_cached_tokens=2, num_output_tokens=3)
    output = RequestOutput("a", None, [1, 2], [CompletionOutput(0, "", [7, 8, 9], "stop")], True,
                           times)  # fmt: skip
    expected = Record(2, 3, 4.0, 5.0, 6.0, 9.0, 2, (1.0, 2.0), "stop")
    assert record_of(output, 4.0, [1.0, 2.0]) == expected
    assert record_of(output) == replace(expected, due=5.0, gaps=None)
    failed = record_of(replace(output, error=RequestError("no room")))
    assert failed.error == "RequestError: no room"
    assert not failed.completed


TWINS: dict[str, dict[str, Any]] = {
    "TPOT counts the first token": {
        "tpot": property(lambda r: (r.finish - r.first_token) / r.num_output)
    },
    "TPOT from the request's begin": {
        "tpot": property(lambda r: (r.finish - r.sent) / max(r.num_output - 1, 1))
    },
    "TTFT from the due time": {"ttft": property(lambda r: r.first_token and r.first_token - r.due)},
    "E2E from the due time": {"e2e": property(lambda r: r.finish and r.finish - r.due)},
    "aborted requests count": {"completed": property(lambda r: r.error is None)},
    "waiting is the queue's": {"wait": property(lambda r: 0.0)},
}


@pytest.mark.parametrize("name", TWINS)
def test_a_wrong_formula_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = summarize([RUN], {"ttft": 3000.0})
    for attribute, twin in TWINS[name].items():
        monkeypatch.setattr(Record, attribute, twin)
    wrong = summarize([RUN], {"ttft": 3000.0})
    assert wrong != right
    with pytest.raises(AssertionError):
        test_a_whole_run()


@pytest.mark.parametrize("method", ["lower", "nearest", "hazen"])
def test_a_wrong_percentile_is_seen(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = np.percentile
    monkeypatch.setattr(metrics.np, "percentile", lambda x, p: right(x, p, method=method))
    with pytest.raises(AssertionError):
        test_percentiles()
