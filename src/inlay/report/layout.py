"""Place the nodes of a directed acyclic graph in rows, inputs above users.

Layered drawing after Sugiyama, Tagawa & Toda (1981): rows by longest path, a dummy on each row
that an edge crosses, order within rows by barycentres, then places near one's neighbours.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

GAP = 18.0
LANE = 10.0
"""Width that an edge takes on a row which it only crosses."""
SWEEPS = 12

Key = Hashable


@dataclass(frozen=True)
class Layout:
    """rows: number of them; width: of all. row and centre: of each node. paths: for each edge
    the centres on the rows from its source to its user."""

    rows: int
    width: float
    row: Mapping[str, int]
    centre: Mapping[str, float]
    paths: Mapping[tuple[str, str], Sequence[float]]


def lay_out(inputs: Mapping[str, Sequence[str]], widths: Mapping[str, float]) -> Layout:
    """inputs: node -> the nodes it reads, in an order where these come first."""
    row = _rows(inputs)
    chains: dict[tuple[str, str], list[Key]] = {}
    grid: list[list[Key]] = [[] for _ in range(max(row.values(), default=-1) + 1)]
    size: dict[Key, float] = {}
    for node, sources in inputs.items():
        grid[row[node]].append(node)
        size[node] = widths[node]
        for source in dict.fromkeys(sources):
            crossed: list[Key] = [
                (source, node, between) for between in range(row[source] + 1, row[node])
            ]
            for between, dummy in enumerate(crossed, row[source] + 1):
                grid[between].append(dummy)
                size[dummy] = LANE
            chains[source, node] = [source, *crossed, node]
    above, below = _neighbours(chains, grid)
    _order(grid, above, below)
    centre = _places(grid, size, above, below)
    left = min((centre[key] - size[key] / 2 for key in centre), default=0.0)
    right = max((centre[key] + size[key] / 2 for key in centre), default=0.0)
    return Layout(
        rows=len(grid),
        width=right - left,
        row=row,
        centre={node: centre[node] - left for node in inputs},
        paths={edge: [centre[key] - left for key in chain] for edge, chain in chains.items()},
    )


def _rows(inputs: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Longest path from a source; chains that hang on a user alone stand just above that user."""
    row: dict[str, int] = {}
    users: dict[str, list[str]] = {node: [] for node in inputs}
    hangs: dict[str, bool] = {}
    for node, sources in inputs.items():
        row[node] = max((row[source] + 1 for source in sources), default=0)
        for source in dict.fromkeys(sources):
            users[source].append(node)
    for node, sources in inputs.items():
        hangs[node] = all(hangs[source] and len(users[source]) == 1 for source in sources)
    for node in reversed(list(inputs)):
        if users[node] and hangs[node]:
            row[node] = min(row[user] for user in users[node]) - 1
    return row


def _neighbours(
    chains: Mapping[tuple[str, str], list[Key]], grid: list[list[Key]]
) -> tuple[dict[Key, list[Key]], dict[Key, list[Key]]]:
    above: dict[Key, list[Key]] = {key: [] for line in grid for key in line}
    below: dict[Key, list[Key]] = {key: [] for line in grid for key in line}
    for chain in chains.values():
        for upper, lower in pairwise(chain):
            above[lower].append(upper)
            below[upper].append(lower)
    return above, below


def _order(grid: list[list[Key]], above: dict[Key, list[Key]], below: dict[Key, list[Key]]) -> None:
    """Sort each row by the mean place of neighbours, down and up in turn."""
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        near = above if down else below
        place = {key: (i + 0.5) / len(line) for line in grid for i, key in enumerate(line)}
        for line in grid if down else reversed(grid):
            wish = {
                key: sum(place[other] for other in near[key]) / len(near[key])
                if near[key]
                else place[key]
                for key in line
            }
            line.sort(key=wish.__getitem__)
            place.update({key: (i + 0.5) / len(line) for i, key in enumerate(line)})


def _places(
    grid: list[list[Key]],
    size: dict[Key, float],
    above: dict[Key, list[Key]],
    below: dict[Key, list[Key]],
) -> dict[Key, float]:
    """Centres: each wants the mean of its neighbours' and keeps its distance in its row."""
    centre: dict[Key, float] = {}
    for line in grid:
        right = 0.0
        for key in line:
            centre[key] = right + size[key] / 2
            right += size[key] + GAP
    for sweep in range(2 * SWEEPS):
        for line in grid if sweep % 2 == 0 else reversed(grid):
            wish = [_wish(key, [*above[key], *below[key]], centre) for key in line]
            centre.update(zip(line, _apart(wish, [size[key] for key in line]), strict=True))
    return centre


def _wish(key: Key, near: list[Key], centre: Mapping[Key, float]) -> float:
    """The mean of the neighbours' centres; long edges pull on themselves, so they run straight."""
    weights = [4.0 if _is_dummy(key) and _is_dummy(other) else 1.0 for other in near]
    if not near:
        return centre[key]
    return sum(w * centre[o] for w, o in zip(weights, near, strict=True)) / sum(weights)


def _is_dummy(key: Key) -> bool:
    return isinstance(key, tuple)


def _apart(wish: list[float], size: list[float]) -> list[float]:
    """As near to the wishes as distances allow: the mean of pushing right and pushing left."""
    distance = [(a + b) / 2 + GAP for a, b in pairwise(size)]
    right, left = list(wish), list(wish)
    for i, gap in enumerate(distance, 1):
        right[i] = max(right[i], right[i - 1] + gap)
    for i in range(len(wish) - 2, -1, -1):
        left[i] = min(left[i], left[i + 1] - distance[i])
    return [(a + b) / 2 for a, b in zip(right, left, strict=True)]
