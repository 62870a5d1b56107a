// Paged attention in tiles with an online softmax (Dao et al., 2022; Milakov & Gimelshein, 2018).
//
// A row is one query token of one head. A work item's rows share a KV head; they go through the
// request's tiles of kTile tokens together, a few rows at a time in registers: scores with vectors
// across tokens (K is stored transposed), then P V with vectors across the head. All sums are
// float32 and every row's order of operations depends on nothing but its own position.
// This is the float32 arithmetic, for every dtype; attention_dots.h has that of bfloat16.
#include "attention.h"
#include "vec.h"

namespace {

using inlay::AttentionArgs;
using inlay::DType;
using inlay::kGroup;
using inlay::kMaxRows;
using inlay::kTile;
using inlay::Span;
using inlay::WorkItem;

constexpr int kBlockRows = 6;                       // rows x vectors fill the register file
constexpr int kScoreVecs = kLanes == 16 ? 4 : 2;
constexpr int kValueVecs = kScoreVecs;
constexpr int kGroups = kTile / kGroup;
constexpr int kDirectRows = 8;  // up to this many rows, converting a tile first does not pay
constexpr int kDecays = 16;     // kBlockRows, in whole vectors
constexpr float kInf = __builtin_inff();
alignas(64) constexpr int32_t kCount[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

INLAY_INLINE int imin(int a, int b) { return a < b ? a : b; }
INLAY_INLINE int imax(int a, int b) { return a > b ? a : b; }
INLAY_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
INLAY_INLINE float finite(float x) { return x == -kInf ? 0.f : x; }  // -inf - -inf would be NaN
INLAY_INLINE int padded(int n) { return (n + kGroup - 1) / kGroup * kGroup; }

// Running softmax of some rows: maximum, denominator (one partial sum per lane), weighted V sum.
struct State {
  float *max, *sum, *acc;
  int acc_stride;

  State(float* memory, int rows, const AttentionArgs& a)
      : max(memory), sum(max + padded(rows)), acc(sum + rows * kLanes), acc_stride(padded(a.dv)) {}
  void reset(int rows) {
    for (int r = 0; r < rows; ++r) max[r] = -kInf;
    memset(sum, 0, rows * kLanes * sizeof(float));
    memset(acc, 0, rows * acc_stride * sizeof(float));
  }
};

int64_t state_floats(const AttentionArgs& a, int rows) {
  return padded(rows) + int64_t{rows} * (kLanes + padded(a.dv));
}

// An element of a tile that was converted into scratch memory.
struct Converted { float value; };
INLAY_INLINE VecF load_part(const Converted* p, int) { return load(&p->value); }
INLAY_INLINE void store(Converted* p, VecF v) { store(&p->value, v); }

template <class T>
constexpr bool kInCache = true;
template <>
constexpr bool kInCache<Converted> = false;

template <class T>
constexpr bool kTokenScales = false;
template <>
constexpr bool kTokenScales<Int8> = true;
template <class T>
constexpr bool kLayerScale = false;
template <>
constexpr bool kLayerScale<Float8> = true;

template <class T>
struct Groups {
  const T *k[kGroups], *v[kGroups];  // of each kGroup tokens
  int64_t scale[kGroups];            // where the scales of a group's tokens begin
};

// A tile of K and V as the register blocks see it. What is in the cache has to come from memory:
// while one tile is computed the next is fetched, line by line, since the CPU's own prefetcher
// starts anew in every block (decode is a quarter faster so).
template <class T>
struct Tile {
  Groups<T> here, next;
  int64_t k_stride, v_stride;  // between (pairs of) elements of the head, (pairs of) tokens
  int start;
};

// scores[r][t] = q[.][r] . k[t] for R rows and kScoreVecs vectors of tokens from `first` on.
template <class T, int R>
INLAY_NOINLINE static void score_block(const float* q, int rows, int d, const Tile<T>& tile,
                                       int first, float* scores) {
  const T *k[kScoreVecs], *next[kScoreVecs];
  for (int j = 0; j < kScoreVecs; ++j) {
    const int t = first + j * kLanes;
    k[j] = tile.here.k[t / kGroup] + t % kGroup * kPair<T>;
    next[j] = tile.next.k[t / kGroup] + t % kGroup * kPair<T>;
  }
  VecF sums[R][kScoreVecs] = {};
  for (int i = 0; i < d; ++i) {
    const int64_t at = i / kPair<T> * tile.k_stride;
    VecF keys[kScoreVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kScoreVecs; ++j) {
      keys[j] = load_part(k[j] + at, i % kPair<T>);
      if (kInCache<T> && (sizeof(T) == 4 || i % 2 == 0)) prefetch(next[j] + at);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      VecF query = splat(q[i * rows + r]);
#pragma GCC unroll 4
      for (int j = 0; j < kScoreVecs; ++j) sums[r][j] += query * keys[j];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kScoreVecs; ++j)
      store(scores + r * kTile + first + j * kLanes, sums[r][j]);
}

// acc[r] = acc[r] * decay[r] + sum over t in [begin, end) of p[r][t] * v[t], for C vectors.
template <class T, int R, int C>
INLAY_NOINLINE static void value_block(const float* p, const Tile<T>& tile, int column, int begin,
                                       int end, const float* decay, float* acc, int acc_stride) {
  VecF sums[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j)
      sums[r][j] = load(acc + r * acc_stride + j * kLanes) * splat(decay[r]);
  while (begin < end) {
    constexpr int pair = kPair<T>;
    const int stop = imin(end, begin / kGroup * kGroup + kGroup);
    for (; begin < stop; ++begin) {
      const int64_t offset = begin % kGroup / pair * tile.v_stride + column * pair;
      const T* v = tile.here.v[begin / kGroup] + offset;
      const T* next = tile.next.v[begin / kGroup] + offset;
      VecF values[C];
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) {
        values[j] = load_part(v + j * kLanes * pair, begin % pair);
        if (kInCache<T> && begin % pair == 0 && j * kLanes * pair * sizeof(T) % 64 == 0)
          prefetch(next + j * kLanes * pair);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        VecF weight = splat(p[r * kTile + begin]);
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) sums[r][j] += weight * values[j];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) store(acc + r * acc_stride + j * kLanes, sums[r][j]);
}

INLAY_INLINE Span visible(const AttentionArgs& a, const WorkItem& w, int row) {
  return inlay::visible(a, w.first_position + row / a.group(), w.seq_len);
}

INLAY_INLINE VecF round_to_bfloat16(VecF value) {
  const VecI bits = (VecI)value;
  return (VecF)((bits + 0x7fff + ((bits >> 16) & 1)) & ~0xffff);
}

// What some models do to a row's scores: the soft-cap, then ALiBi (Press et al., 2022).
INLAY_NOINLINE static void adjust_scores(const AttentionArgs& a, const WorkItem& w, int row,
                                         int start, float* scores) {
  const float slope = a.slopes ? a.slopes[w.kv_head * a.group() + row % a.group()] : 0.f;
  const VecI first = load_as<VecI>(kCount) + (start - w.first_position - row / a.group());
  for (int t = 0; t < kTile; t += kLanes) {
    VecF score = load(scores + t);
    if (a.softcap > 0) score = a.softcap * tanh_of(score / a.softcap);
    if (a.bfloat16_bias) {
      const VecI token = load_as<VecI>(kCount) + (start + t);
      const VecF position = round_to_bfloat16(__builtin_convertvector(token, VecF));
      score += round_to_bfloat16(slope * position);
    } else if (a.slopes) {
      score += slope * __builtin_convertvector(first + t, VecF);
    }
    store(scores + t, score);
  }
}

// Masks the scores of R rows and moves their maxima; decay[r] is the factor for what was summed
// before.
template <int R>
INLAY_INLINE void mask_block(const Span* spans, int start, float* scores, float* max,
                             float* decay) {
  static_assert(kBlockRows <= kDecays);
  VecI first = load_as<VecI>(kCount) + start;
  for (int r = 0; r < R; ++r) {
    float* s = scores + r * kTile;
    const bool whole = spans[r].lo <= start && spans[r].hi >= start + kTile;
    VecF top = splat(-kInf);
    for (int t = 0; t < kTile; t += kLanes) {
      VecF score = load(s + t);
      if (!whole) {
        const VecI token = first + t;
        score = (token >= spans[r].lo) & (token < spans[r].hi) ? score : splat(-kInf);
        store(s + t, score);
      }
      top = ::max(top, score);
    }
    const float highest = reduce_max(top), before = max[r];
    max[r] = highest > before ? highest : before;
    decay[r] = before - finite(max[r]);
  }
  for (int r = 0; r < R; r += kLanes) store(decay + r, exp_nonpositive(load(decay + r)));
}

// Turns masked scores into weights in place.
template <int R>
INLAY_INLINE void weigh_block(float* scores, const float* max, float* sum, const float* decay) {
  for (int r = 0; r < R; ++r) {
    float* s = scores + r * kTile;
    const float base = finite(max[r]);
    VecF total = load(sum + r * kLanes) * decay[r];
    for (int t = 0; t < kTile; t += kLanes) {
      const VecF weight = exp_nonpositive(load(s + t) - base);
      store(s + t, weight);
      total += weight;
    }
    store(sum + r * kLanes, total);
  }
}

template <class T, int R>
static void attend_block(const AttentionArgs& a, const WorkItem& w, const Tile<T>& tile, int row,
                         const float* q, State state) {
  float scores[kBlockRows * kTile], decay[kDecays] = {};
  Span spans[R];
  for (int r = 0; r < R; ++r) spans[r] = visible(a, w, w.row_begin + row + r);
  const int begin = imax(spans[0].lo - tile.start, 0);
  const int end = imin(spans[R - 1].hi - tile.start, kTile);
  if (begin >= end) return;
  for (int t = 0; t < kTile; t += kScoreVecs * kLanes)
    score_block<T, R>(q + row, w.row_end - w.row_begin, a.d, tile, t, scores);
  if (a.softcap > 0 || a.slopes)
    for (int r = 0; r < R; ++r)
      adjust_scores(a, w, w.row_begin + row + r, tile.start, scores + r * kTile);
  mask_block<R>(spans, tile.start, scores, state.max + row, decay);
  weigh_block<R>(scores, state.max + row, state.sum + row * kLanes, decay);
  float* acc = state.acc + row * state.acc_stride;
  const int width = state.acc_stride / kLanes;
  int c = 0;
  for (; c + kValueVecs <= width; c += kValueVecs)
    value_block<T, R, kValueVecs>(scores, tile, c * kLanes, begin, end, decay, acc + c * kLanes,
                                  state.acc_stride);
  for (; c < width; ++c)
    value_block<T, R, 1>(scores, tile, c * kLanes, begin, end, decay, acc + c * kLanes,
                         state.acc_stride);
}

template <class T>
static void attend_rows(const AttentionArgs& a, const WorkItem& w, const Tile<T>& tile,
                        const float* q, State state) {
  const int rows = w.row_end - w.row_begin, blocks = (rows + kBlockRows - 1) / kBlockRows;
  for (int b = 0; b < blocks; ++b) {  // blocks of even size: 8 rows are 4 + 4, not 6 + 2
    const int row = rows * b / blocks;
    switch (rows * (b + 1) / blocks - row) {
      case 1: attend_block<T, 1>(a, w, tile, row, q, state); break;
      case 2: attend_block<T, 2>(a, w, tile, row, q, state); break;
      case 3: attend_block<T, 3>(a, w, tile, row, q, state); break;
      case 4: attend_block<T, 4>(a, w, tile, row, q, state); break;
      case 5: attend_block<T, 5>(a, w, tile, row, q, state); break;
      default: attend_block<T, 6>(a, w, tile, row, q, state);
    }
  }
}

// Groups outside [lo, hi) may have no block: they point at a group that has one, and are masked.
template <class T>
static Groups<T> find_groups(const AttentionArgs& a, const WorkItem& w, int start, int lo, int hi) {
  Groups<T> groups;
  for (int g = 0; g < kGroups; ++g) {
    const int first = lo / kGroup * kGroup, last = (hi - 1) / kGroup * kGroup;
    const int nearest = imin(imax(start + g * kGroup, first), last);
    const int64_t block = a.block_table[w.request * a.max_blocks + nearest / a.block_size];
    const int64_t head = block * a.kv_heads + w.kv_head, offset = nearest % a.block_size;
    groups.scale[g] = head * a.block_size + offset;
    groups.k[g] = (const T*)a.k_cache + groups.scale[g] * a.dk();
    groups.v[g] = (const T*)a.v_cache + groups.scale[g] * a.dv;
  }
  return groups;
}

// What scales keys of kLanes tokens, the first of them at this place; one token's values.
template <class T>
INLAY_INLINE VecF k_scale(const AttentionArgs& a, int64_t place) {
  if constexpr (kTokenScales<T>) return load(a.k_scales + place);
  else return splat(kLayerScale<T> ? *a.k_scales : 1.f);
}
template <class T>
INLAY_INLINE float v_scale(const AttentionArgs& a, int64_t place) {
  return kTokenScales<T> ? a.v_scales[place] : kLayerScale<T> ? *a.v_scales : 1.f;
}

template <class T>
static Tile<Converted> convert_tile(const AttentionArgs& a, const Tile<T>& in, int lo, int hi,
                                    float* scratch) {
  constexpr int pair = kPair<T>;
  Converted *k = (Converted*)scratch, *v = k + a.d * kTile;
  const int width = padded(a.dv);
  Tile<Converted> out{{}, {}, kTile, width, in.start};
  for (int g = 0; g < kGroups; ++g) {
    out.here.k[g] = k + g * kGroup;
    out.here.v[g] = v + g * kGroup * width;
    const int start = in.start + g * kGroup;
    if (start + kGroup <= lo || start >= hi) continue;
    for (int t = 0; t < kGroup; t += kLanes) {
      const VecF scale = k_scale<T>(a, in.here.scale[g] + t);
      for (int i = 0; i < a.d; ++i) {
        const T* from = in.here.k[g] + i / pair * in.k_stride + t * pair;
        store(k + i * kTile + g * kGroup + t, load_part(from, i % pair) * scale);
      }
    }
    for (int t = imax(lo - start, 0); t < imin(hi - start, kGroup); ++t) {
      Converted* to = v + (g * kGroup + t) * width;
      const T* from = in.here.v[g] + t / pair * in.v_stride;
      const float scale = v_scale<T>(a, in.here.scale[g] + t);
      int c = 0;
      for (; c + kLanes <= a.dv; c += kLanes)
        store(to + c, load_part(from + c * pair, t % pair) * scale);
      for (; c < width; c += kLanes)
        store(to + c, load_first_part(from + c * pair, t % pair, imax(0, a.dv - c)) * scale);
    }
  }
  return out;
}

// into = the softmax over what both have seen.
void merge(State into, State from, int rows) {
  for (int r = 0; r < rows; ++r) {
    const float top = into.max[r] > from.max[r] ? into.max[r] : from.max[r];
    const float base = finite(top);
    const VecF x = exp_nonpositive(splat(into.max[r] - base));
    const VecF y = exp_nonpositive(splat(from.max[r] - base));
    float *sum = into.sum + r * kLanes, *acc = into.acc + r * into.acc_stride;
    const float* other = from.acc + r * into.acc_stride;
    into.max[r] = top;
    store(sum, load(sum) * x + load(from.sum + r * kLanes) * y);
    for (int c = 0; c < into.acc_stride; c += kLanes)
      store(acc + c, load(acc + c) * x + load(other + c) * y);
  }
}

template <class T>
static void write_rows(const AttentionArgs& a, const WorkItem& w, State state) {
  for (int row = w.row_begin; row < w.row_end; ++row) {
    const int r = row - w.row_begin, head = w.kv_head * a.group() + row % a.group();
    float numerator = 1.f, denominator = 0.f;
    for (int i = 0; i < kLanes; ++i) denominator += state.sum[r * kLanes + i];
    if (a.sinks) {
      const float sink = a.sinks[head], top = sink > state.max[r] ? sink : state.max[r];
      numerator = exp_nonpositive(splat(state.max[r] - top))[0];
      denominator = denominator * numerator + exp_nonpositive(splat(sink - top))[0];
    }
    const float factor = numerator / denominator;
    T* out = (T*)a.out + (int64_t{w.first_token + row / a.group()} * a.q_heads + head) * a.dv;
    const float* acc = state.acc + r * state.acc_stride;
    for (int c = 0; c < a.dv; c += kLanes) {
      const VecF value = load(acc + c) * factor;
      if (c + kLanes <= a.dv) store(out + c, value);
      else store_first(out + c, value, a.dv - c);
    }
  }
}

// q [d, rows], scaled: a register block's rows lie side by side. staging: kTile * d floats.
template <class T>
static void load_queries(const AttentionArgs& a, const WorkItem& w, float* q, float* staging) {
  const int rows = w.row_end - w.row_begin;
  for (int first = 0; first < rows; first += kTile) {
    const int count = imin(rows - first, kTile);
    for (int r = 0; r < count; ++r) {
      const int row = w.row_begin + first + r, head = w.kv_head * a.group() + row % a.group();
      const T* from = (const T*)a.q + (w.first_token + row / a.group()) * a.q_token_stride +
                      head * a.q_head_stride;
      float* to = staging + r * a.d;
      int i = 0;
      for (; i + kLanes <= a.d; i += kLanes) store(to + i, load(from + i) * a.scale);
      if (i < a.d) store_first(to + i, load_first(from + i, a.d - i) * a.scale, a.d - i);
    }
    for (int i = 0; i < a.d; ++i)
      for (int r = 0; r < count; ++r) q[i * rows + first + r] = staging[r * a.d + i];
  }
}

#if defined(__AVX512BF16__)
#include "attention_dots.h"
#else
bool uses_dots(const AttentionArgs&) { return false; }
void load_query_pairs(const AttentionArgs&, const WorkItem&, float*) {}
void attend_split_by_dots(const AttentionArgs&, const WorkItem&, int, const float*, float*,
                          State) {}
#endif

template <class T>
static void attend_split(const AttentionArgs& a, const WorkItem& w, int split, const float* q,
                         float* tile_memory, State state) {
  const int rows = w.row_end - w.row_begin;
  const int lo = imax(visible(a, w, w.row_begin).lo, split * inlay::kSplit);
  const int hi = imin(visible(a, w, w.row_end - 1).hi, (split + 1) * inlay::kSplit);
  constexpr bool scaled = kTokenScales<T> || kLayerScale<T>;
  const bool direct = !scaled && rows <= kDirectRows && a.dv % kGroup == 0;
  int start = lo / kTile * kTile;
  constexpr int pair = kPair<T>;
  Tile<T> tile{{}, find_groups<T>(a, w, start, lo, hi), pair * kGroup, pair * a.dv, start};
  for (; start < hi; start += kTile) {
    tile.start = start;
    tile.here = tile.next;
    if (start + kTile < hi) tile.next = find_groups<T>(a, w, start + kTile, lo, hi);
    if constexpr (!scaled) {
      if (direct) {
        attend_rows<T>(a, w, tile, q, state);
        continue;
      }
    }
    attend_rows<Converted>(a, w, convert_tile<T>(a, tile, lo, hi, tile_memory), q, state);
  }
}

static void attend_split(const AttentionArgs& a, const WorkItem& w, int split, const float* q,
                         float* tile_memory, State state) {
  if (uses_dots(a)) return attend_split_by_dots(a, w, split, q, tile_memory, state);
  switch (a.cache_dtype) {
    case DType::kFloat32: return attend_split<float>(a, w, split, q, tile_memory, state);
    case DType::kBFloat16: return attend_split<BFloat16>(a, w, split, q, tile_memory, state);
    case DType::kFloat16: return attend_split<Float16>(a, w, split, q, tile_memory, state);
    case DType::kFloat8: return attend_split<Float8>(a, w, split, q, tile_memory, state);
    case DType::kInt8: return attend_split<Int8>(a, w, split, q, tile_memory, state);
  }
}

// T: of queries and outputs.
template <class T>
static void attend_typed(const AttentionArgs& a, const WorkItem& w, float* scratch) {
  const int rows = w.row_end - w.row_begin;
  float *q = scratch, *tile_memory = q + padded(rows * a.d);
  float* states = tile_memory + kTile * (a.d + padded(a.dv));
  State total(w.partial ? w.partial : states, rows, a);
  State next(states + state_floats(a, rows), rows, a);
  if (uses_dots(a)) load_query_pairs(a, w, q);
  else load_queries<T>(a, w, q, tile_memory);
  total.reset(rows);
  attend_split(a, w, w.first_split, q, tile_memory, total);
  for (int split = w.first_split + 1; split <= w.last_split; ++split) {
    next.reset(rows);
    attend_split(a, w, split, q, tile_memory, next);
    merge(total, next, rows);
  }
  if (!w.partial) write_rows<T>(a, w, total);
}

template <class T>
static void finish_typed(const AttentionArgs& a, const WorkItem& w, float* partials) {
  const int rows = w.row_end - w.row_begin;
  State total(partials, rows, a);
  for (int split = w.first_split + 1; split <= w.last_split; ++split)
    merge(total, State(partials + (split - w.first_split) * state_floats(a, rows), rows, a), rows);
  write_rows<T>(a, w, total);
}

int64_t scratch_floats(const AttentionArgs& a) {
  return padded(kMaxRows * a.d) + kTile * (a.d + padded(a.dv)) + 2 * state_floats(a, kMaxRows);
}

void attend(const AttentionArgs& a, const WorkItem& w, float* scratch) {
  switch (a.dtype) {
    case DType::kFloat32: return attend_typed<float>(a, w, scratch);
    case DType::kBFloat16: return attend_typed<BFloat16>(a, w, scratch);
    default: return attend_typed<Float16>(a, w, scratch);
  }
}

void finish(const AttentionArgs& a, const WorkItem& w, float* partials) {
  switch (a.dtype) {
    case DType::kFloat32: return finish_typed<float>(a, w, partials);
    case DType::kBFloat16: return finish_typed<BFloat16>(a, w, partials);
    default: return finish_typed<Float16>(a, w, partials);
  }
}

}  // namespace

namespace inlay::INLAY_ISA {
extern const Kernels kernels = {state_floats, scratch_floats, attend, finish};
}
