"""Boxes never overlap, wires go down, and a long wire keeps clear of the boxes it passes."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from inlay.report.layout import GAP, lay_out

DIAMOND = {"a": [], "b": ["a"], "c": ["b"], "d": ["c", "a"]}


def test_a_skip_connection() -> None:
    plan = lay_out(DIAMOND, dict.fromkeys(DIAMOND, 50.0))
    assert plan.rows == 4
    assert [plan.row[name] for name in "abcd"] == [0, 1, 2, 3]
    wire = plan.paths["a", "d"]
    assert len(wire) == 4
    for passed, name in zip(wire[1:3], "bc", strict=True):
        assert abs(passed - plan.centre[name]) >= 50 / 2


def test_a_side_chain_stands_above_its_user() -> None:
    plan = lay_out({**DIAMOND, "w": [], "x": ["w"], "y": ["d", "x"]}, dict.fromkeys("abcdwxy", 9.0))
    assert (plan.row["w"], plan.row["x"], plan.row["y"]) == (2, 3, 4)


def test_nothing_to_place() -> None:
    assert lay_out({}, {}).rows == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sets(st.integers(0, 30), max_size=3), min_size=1, max_size=14))
def test_boxes_keep_their_distance(reads: list[set[int]]) -> None:
    inputs = {str(i): [str(j) for j in sorted(row) if j < i] for i, row in enumerate(reads)}
    widths = {name: 20.0 + 7 * int(name) for name in inputs}
    plan = lay_out(inputs, widths)
    rows = defaultdict(list)
    for name, row in plan.row.items():
        rows[row].append((plan.centre[name] - widths[name] / 2, widths[name]))
        assert plan.centre[name] - widths[name] / 2 >= -1e-6
        assert plan.centre[name] + widths[name] / 2 <= plan.width + 1e-6
    for boxes in rows.values():
        boxes.sort()
        for (left, width), (right, _) in pairwise(boxes):
            assert left + width + GAP <= right + 1e-6
    for (source, user), wire in plan.paths.items():
        assert plan.row[source] < plan.row[user]
        assert len(wire) == plan.row[user] - plan.row[source] + 1
