"""Draw tokens on a GPU: `draw_row` of `runtime/draws.py` for each row, without typical_p.

Gumbel-max with the counter-based noise of `runtime/noise.py`: the token with the largest
logit + noise among those that top-k, top-p and min-p leave. The sets are closed upwards, which
saves sorting and bisecting:

- top-k: the k-th largest logit by a radix search, 8 bits of it in each of 4 passes.
- top-p: the winner among all is taken if those likelier than it weigh less than top_p; else it and
  all that are less likely are outside the set, and the next winner is looked for among the rest.
  That is log2(1 / top_p) rounds more than one, in the mean or fewer.

One program for each row, which reads the row from the L2 cache 1 to 10 times; nothing is read back
by the host. Sums of weights are taken block by block in float32, over blocks in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from inlay.backends.kernels.triton.launch import Launch

BLOCK = 4096


@triton.jit
def _splitmix64(x):
    x += 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _gumbel(low, high, token_ids):
    """`noise.gumbel`, to some units in float32's last place.

    -log1p(-v) is 2 atanh(v / (2 - v)): a series keeps its digits where v is small, as winners' are.
    """
    h = token_ids.to(tl.uint32) + low
    h ^= h >> 16
    h *= 0x7FEB352D
    h ^= h >> 15
    h ^= high
    h *= 0x846CA68B
    h ^= h >> 16
    v = ((h & 0x7FFFFFFF) | 1).to(tl.int32).to(tl.float32) * 4.656612873077393e-10
    z = v / (2.0 - v)
    z2 = z * z
    series = 1.0 / 15 + z2 * (1.0 / 17)
    series = 1.0 / 11 + z2 * (1.0 / 13 + z2 * series)
    series = 1.0 / 7 + z2 * (1.0 / 9 + z2 * series)
    series = 1.0 + z2 * (1.0 / 3 + z2 * (1.0 / 5 + z2 * series))
    delay = tl.where(v < 0.5, 2.0 * z * series, -tl.log(1.0 - v))
    return -tl.log(delay)


@triton.jit
def _scaled(row, at, vocab, peak, temperature, log_min_p):
    """Logits over temperature, 0 the largest; -inf for what min_p leaves out, and past the end."""
    logits = tl.load(row + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
    scaled = (logits - peak) / temperature
    return tl.where(scaled < log_min_p, float("-inf"), scaled)


@triton.jit
def _code(scaled):
    """Bits of the magnitude: the larger the logit, the smaller the code."""
    return tl.maximum(-scaled, 0.0).to(tl.int32, bitcast=True)


@triton.jit
def _kth_code(row, vocab, top_k, peak, temperature, log_min_p, BLOCK: tl.constexpr):
    """The code of the k-th largest logit, 0 < k <= vocab."""
    rest = top_k.to(tl.int32)
    prefix = rest * 0
    bins = tl.arange(0, 256)
    for digit in range(4):
        shift = 24 - 8 * digit
        counts = tl.zeros((256,), dtype=tl.int32)
        for start in range(0, vocab, BLOCK):
            at = start + tl.arange(0, BLOCK)
            code = _code(_scaled(row, at, vocab, peak, temperature, log_min_p))
            # Shifted twice, since a shift by 32 bits is none.
            same = ((code >> shift) >> 8) == prefix
            counts += tl.histogram((code >> shift) & 255, 256, mask=same & (at < vocab))
        reached = tl.cumsum(counts, 0)
        bucket = tl.sum((reached < rest).to(tl.int32), 0)
        rest -= tl.sum(tl.where(bins < bucket, counts, 0), 0)
        prefix = (prefix << 8) | bucket
    return prefix


@triton.jit
def _mass(row, vocab, above, last_code, peak, temperature, log_min_p, BLOCK: tl.constexpr):
    """The weights of tokens in the top-k set whose scaled logit is above this one, float64."""
    total = tl.zeros((1,), dtype=tl.float64)
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        scaled = _scaled(row, at, vocab, peak, temperature, log_min_p)
        counted = (scaled > above) & (_code(scaled) <= last_code)
        total += tl.sum(tl.where(counted, tl.exp(scaled), 0.0), 0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize_on_alignment=["slots", "positions"])  # rows of one tensor, any offset
def draw_kernel(
    logits,
    slots,
    positions,
    integers,
    floats,
    tokens,
    peaks,
    stride,
    num_slots,
    vocab,
    BLOCK: tl.constexpr,
):
    """One row: logits [N, V] -> tokens int64 [N], peaks float32 [N]; the rest as in `Sampler`."""
    place = tl.program_id(0)
    row = logits + place.to(tl.int64) * stride
    slot = tl.load(slots + place)
    lanes = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_at = lanes
    has_nan = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, vocab, BLOCK):
        at = start + lanes
        values = tl.load(row + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        has_nan |= (values != values).to(tl.int32)
        best_at = tl.where(values > best, at, best_at)
        best = tl.maximum(best, values)
    peak = tl.max(best, 0)
    winner = tl.min(tl.where(best == peak, best_at, vocab), 0)
    peak = tl.where(tl.max(has_nan, 0) > 0, float("nan"), peak)
    tl.store(peaks + place, peak)
    is_finite = tl.abs(peak) < float("inf")
    if (tl.load(integers + 2 * num_slots + slot) == 0) & is_finite:
        top_k = tl.load(integers + num_slots + slot)
        temperature = tl.load(floats + slot).to(tl.float32)
        top_p = tl.load(floats + num_slots + slot)
        log_min_p = tl.load(floats + 2 * num_slots + slot).to(tl.float32)
        position = tl.load(positions + place).to(tl.uint64, bitcast=True)
        key = tl.load(integers + slot).to(tl.uint64, bitcast=True)
        key = _splitmix64(_splitmix64(key) + position * 0x9E3779B97F4A7C15)
        low, high = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
        last_code = 0x7F800000
        if top_k > 0:
            at_most = tl.minimum(top_k, vocab)
            last_code = _kth_code(row, vocab, at_most, peak, temperature, log_min_p, BLOCK)
        allowed = top_p * 0.0
        if top_p < 1:
            allowed = top_p * _mass(
                row, vocab, float("-inf"), last_code, peak, temperature, log_min_p, BLOCK
            )
        bound = float("-inf")
        searching = True
        while searching:
            best = tl.full((BLOCK,), float("-inf"), tl.float32)
            best_at = tl.zeros((BLOCK,), dtype=tl.int32) + vocab
            best_scaled = best
            for start in range(0, vocab, BLOCK):
                at = start + lanes
                scaled = _scaled(row, at, vocab, peak, temperature, log_min_p)
                noisy = scaled + _gumbel(low, high, at)
                is_in = (scaled > bound) & (_code(scaled) <= last_code)
                is_better = is_in & (noisy > best)
                best = tl.where(is_better, noisy, best)
                best_at = tl.where(is_better, at, best_at)
                best_scaled = tl.where(is_better, scaled, best_scaled)
            is_first = best == tl.max(best, 0)
            winner = tl.min(tl.where(is_first, best_at, vocab), 0)
            chosen = is_first & (best_at == winner)
            bound = tl.max(tl.where(chosen, best_scaled, float("-inf")), 0)
            if top_p < 1:
                likelier = _mass(row, vocab, bound, last_code, peak, temperature, log_min_p, BLOCK)
                searching = (likelier >= allowed) & (bound < 0)
            else:
                searching = False
        winner = tl.where(winner < vocab, winner, 0)
    tl.store(tokens + place, winner.to(tl.int64))


def draw_tokens(
    logits: Tensor, slots: Tensor, positions: Tensor, integers: Tensor, floats: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens int64 [N], and the rows' largest logits float32 [N], NaN where any of a row is.

    logits [N, V] of any float dtype, rows contiguous; slots and positions int64 [N];
    integers int64 [3, slots] and floats float64 [4, slots] as `runtime/sampler.py` has them.
    """
    tokens = slots.new_empty(len(logits))
    peaks = logits.new_empty(len(logits), dtype=torch.float32)
    if len(logits):
        plan_draw(logits, slots, positions, integers, floats, tokens, peaks).run()
    return tokens, peaks


def plan_draw(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    integers: Tensor,
    floats: Tensor,
    tokens: Tensor,
    peaks: Tensor,
) -> Launch:
    args = {
        "logits": logits,
        "slots": slots,
        "positions": positions,
        "integers": integers,
        "floats": floats,
        "tokens": tokens,
        "peaks": peaks,
        "stride": logits.stride(0),
        "num_slots": integers.shape[1],
        "vocab": logits.shape[1],
        "BLOCK": BLOCK,
    }
    return Launch(draw_kernel, (len(logits),), args, 16, 2)
