// The tiles of attention.cpp by dot products of bfloat16 (AVX512_BF16), for bfloat16 queries over a
// cache of bfloat16, fp8 or int8. Products are exact and sums float32; softmax weights are rounded
// to bfloat16 before they meet the values, as flash kernels do, and it is the rounded ones that are
// summed where no scale comes between. Part of attention.cpp, inside its namespace.

// One pair of bfloat16 in each lane.
typedef __m512bh Pairs;
INLAY_INLINE Pairs load_pairs(const void* p) { return (Pairs)_mm512_loadu_si512(p); }
INLAY_INLINE Pairs splat_pair(uint32_t pair) { return (Pairs)_mm512_set1_epi32((int)pair); }
INLAY_INLINE VecF dot(VecF sum, Pairs x, Pairs y) {
  return (VecF)_mm512_dpbf16_ps((__m512)sum, x, y);
}

// A tile of bytes fits beside this one into the first cache, one of bfloat16 does not.
template <int size>
INLAY_INLINE void fetch(const char* p) {
  __builtin_prefetch(p, 0, size == 1 ? 3 : 2);
}

bool uses_dots(const AttentionArgs& a) {
  return a.dtype == DType::kBFloat16 && inlay::pair_of(a.cache_dtype) == 2;
}

// to [dk / 2, rows] pairs, not scaled: a register block's rows lie side by side.
void load_query_pairs(const AttentionArgs& a, const WorkItem& w, float* to) {
  const int rows = w.row_end - w.row_begin;
  uint32_t* pairs = (uint32_t*)to;
  for (int r = 0; r < rows; ++r) {
    const int row = w.row_begin + r, head = w.kv_head * a.group() + row % a.group();
    const BFloat16* from = (const BFloat16*)a.q +
                           (w.first_token + row / a.group()) * a.q_token_stride +
                           head * a.q_head_stride;
    for (int i = 0; i < a.d / 2; ++i) memcpy(pairs + i * rows + r, from + 2 * i, 4);
    if (a.d % 2) pairs[a.d / 2 * rows + r] = from[a.d - 1].bits;
  }
}

// e^x for x <= 0 within 1e-5 of itself, since it is rounded to 2^-9; 0 for what float32 has not.
INLAY_INLINE VecF exp_roughly(VecF x) {
  const __m512 least = _mm512_set1_ps(-200.f);
  const __m512 y = _mm512_max_ps(least, (__m512)(x * 1.44269504f));  // a NaN stays
  const __m512 n = _mm512_roundscale_ps(y, 0);
  const VecF f = (VecF)y - (VecF)n;
  VecF p = splat(9.58285201e-3f);
  p = p * f + 5.59064262e-2f;
  p = p * f + 2.40240991e-1f;
  p = p * f + 6.93124175e-1f;
  p = p * f + 1.f;
  return (VecF)_mm512_scalef_ps((__m512)p, n);
}

// scores[r][t] = q[.][r] . k[t] * scales[t] for a tile. Meanwhile the next one is fetched, whose
// elements in the cache have `size` bytes.
template <int R, int size>
INLAY_NOINLINE static void dot_scores(const uint32_t* q, int rows, int pairs,
                                      const Tile<BFloat16>& tile, const VecF* scales,
                                      float* scores) {
  const BFloat16* k[kGroups];
  const char* next[kGroups];
  for (int g = 0; g < kGroups; ++g) k[g] = tile.here.k[g], next[g] = (const char*)tile.next.k[g];
  VecF sums[R][kGroups] = {};
  for (int i = 0; i < pairs; ++i) {
    Pairs keys[kGroups];
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
      keys[g] = load_pairs(k[g] + i * 2 * kGroup);
      fetch<size>(next[g] + i * 2 * kGroup * size);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Pairs query = splat_pair(q[i * rows + r]);
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) sums[r][g] = dot(sums[r][g], keys[g], query);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g)
      store(scores + r * kTile + g * kGroup, sums[r][g] * scales[g]);
}

// One pair of tokens' values times R weights, added for C vectors; mask: which of them count.
template <int R, int C, int size>
INLAY_INLINE void add_values(const BFloat16* v, const char* next, const uint32_t* weights,
                             uint32_t mask, VecF (&sums)[R][C]) {
  Pairs values[C];
#pragma GCC unroll 4
  for (int j = 0; j < C; ++j) {
    values[j] = mask == ~0u ? load_pairs(v + j * 2 * kLanes)
                            : (Pairs)_mm512_maskz_loadu_epi16(mask, v + j * 2 * kLanes);
    fetch<size>(next + j * 2 * kLanes * size);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const Pairs weight = splat_pair(weights[r * (kTile / 2)]);
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) sums[r][j] = dot(sums[r][j], values[j], weight);
  }
}

// acc[r] = acc[r] * decay[r] + sum over t in [begin, end) of weights[r][t] * v[t], for C vectors.
template <int R, int C, int size>
INLAY_NOINLINE static void dot_values(const uint32_t* weights, const Tile<BFloat16>& tile,
                                      int column, int begin, int end, const float* decay,
                                      float* acc, int acc_stride) {
  VecF sums[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j)
      sums[r][j] = load(acc + r * acc_stride + j * kLanes) * splat(decay[r]);
  const auto add = [&](int pair, uint32_t mask) __attribute__((always_inline)) {
    const int64_t at = pair % (kGroup / 2) * tile.v_stride + 2 * column;
    const int g = pair / (kGroup / 2);
    const char* next = (const char*)tile.next.v[g] + at * size;
    add_values<R, C, size>(tile.here.v[g] + at, next, weights + pair, mask, sums);
  };
  // What was never written may be NaN, also beside a token that was.
  int pair = begin / 2;
  if (begin % 2) add(pair++, 0xaaaaaaaau);
  for (; pair < end / 2; ++pair) add(pair, ~0u);
  if (pair < (end + 1) / 2) add(pair, 0x55555555u);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) store(acc + r * acc_stride + j * kLanes, sums[r][j]);
}

// Turns masked scores of R rows into weights times values' scales: pairs of bfloat16 [R, kTile / 2].
template <class T, int R>
INLAY_INLINE void weigh_pairs(const float* scores, const float* max, const VecF* scales,
                              const float* decay, float* sum, uint32_t* weights) {
  const Pairs ones = splat_pair(0x3f803f80u);
  for (int r = 0; r < R; ++r) {
    const float base = finite(max[r]);
    VecF total = load(sum + r * kLanes) * decay[r];
    for (int g = 0; g < kGroups; g += 2) {
      const float* s = scores + r * kTile + g * kGroup;
      VecF low = exp_roughly(load(s) - base), high = exp_roughly(load(s + kGroup) - base);
      if constexpr (kTokenScales<T> || kLayerScale<T>) {
        total += low + high;
        low *= scales[g], high *= scales[g + 1];
      }
      const Pairs both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
      if constexpr (!kTokenScales<T> && !kLayerScale<T>) total = dot(total, both, ones);
      _mm512_storeu_si512(weights + r * (kTile / 2) + g * (kGroup / 2), (__m512i)both);
    }
    store(sum + r * kLanes, total);
  }
}

// A tile's scales: of scores, and of values (0 where nothing was written).
struct TileScales {
  VecF k[kGroups], v[kGroups];
};

template <class T>
static TileScales find_scales(const AttentionArgs& a, const Tile<T>& tile, int begin, int end) {
  TileScales scales;
  for (int g = 0; g < kGroups; ++g) {
    const int64_t place = tile.here.scale[g], next = tile.next.scale[g];
    scales.k[g] = k_scale<T>(a, place) * a.scale;
    if constexpr (kTokenScales<T>) {
      prefetch(a.k_scales + next), prefetch(a.v_scales + next);
      const VecI token = load_as<VecI>(kCount) + g * kGroup;
      const VecF v = load(a.v_scales + place);
      scales.v[g] = (token >= begin) & (token < end) ? v : VecF{};
    } else {
      scales.v[g] = splat(v_scale<T>(a, 0));
    }
  }
  return scales;
}

// T: of the cache, whose tile this was.
template <class T, int R>
static void dot_block(const AttentionArgs& a, const WorkItem& w, const Tile<BFloat16>& tile,
                      const TileScales& scales, int row, const uint32_t* q, State state) {
  float scores[kBlockRows * kTile], decay[kDecays] = {};
  uint32_t weights[kBlockRows * kTile / 2];
  Span spans[R];
  for (int r = 0; r < R; ++r) spans[r] = visible(a, w, w.row_begin + row + r);
  const int begin = imax(spans[0].lo - tile.start, 0);
  const int end = imin(spans[R - 1].hi - tile.start, kTile);
  if (begin >= end) return;
  dot_scores<R, sizeof(T)>(q + row, w.row_end - w.row_begin, a.dk() / 2, tile, scales.k, scores);
  if (a.softcap > 0 || a.slopes)
    for (int r = 0; r < R; ++r)
      adjust_scores(a, w, w.row_begin + row + r, tile.start, scores + r * kTile);
  float *max = state.max + row, *acc = state.acc + row * state.acc_stride;
  mask_block<R>(spans, tile.start, scores, max, decay);
  weigh_pairs<T, R>(scores, max, scales.v, decay, state.sum + row * kLanes, weights);
  const int width = state.acc_stride / kLanes;
  int c = 0;
  for (; c + kValueVecs <= width; c += kValueVecs)
    dot_values<R, kValueVecs, sizeof(T)>(weights, tile, c * kLanes, begin, end, decay,
                                     acc + c * kLanes, state.acc_stride);
  for (; c < width; ++c)
    dot_values<R, 1, sizeof(T)>(weights, tile, c * kLanes, begin, end, decay, acc + c * kLanes,
                            state.acc_stride);
}

template <class T>
static void dot_rows(const AttentionArgs& a, const WorkItem& w, const Tile<BFloat16>& tile,
                     const TileScales& scales, const uint32_t* q, State state) {
  const int rows = w.row_end - w.row_begin, blocks = (rows + kBlockRows - 1) / kBlockRows;
  for (int b = 0; b < blocks; ++b) {
    const int row = rows * b / blocks;
    switch (rows * (b + 1) / blocks - row) {
      case 1: dot_block<T, 1>(a, w, tile, scales, row, q, state); break;
      case 2: dot_block<T, 2>(a, w, tile, scales, row, q, state); break;
      case 3: dot_block<T, 3>(a, w, tile, scales, row, q, state); break;
      case 4: dot_block<T, 4>(a, w, tile, scales, row, q, state); break;
      case 5: dot_block<T, 5>(a, w, tile, scales, row, q, state); break;
      default: dot_block<T, 6>(a, w, tile, scales, row, q, state);
    }
  }
}

// bfloat16 of every magnitude that seven bits can say: its low and high bytes.
struct Widening {
  __m512i low[2], high[2];
};

INLAY_INLINE uint16_t widened_magnitude(Int8, int magnitude) {
  const float value = (float)magnitude;
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits >> 16;
}
INLAY_INLINE uint16_t widened_magnitude(Float8, int magnitude) {
  const VecU code = VecU{} + (uint32_t)magnitude;
  return ((VecU)float8_values(code))[0] >> 16;
}

INLAY_INLINE uint16_t widened_magnitude(BFloat16, int) { return 0; }  // is wide

template <class T>
static Widening find_widening() {
  alignas(64) uint8_t low[128], high[128];
  for (int i = 0; i < 128; ++i) {
    const uint16_t bits = widened_magnitude(T{}, i);
    low[i] = bits & 0xff, high[i] = bits >> 8;
  }
  Widening table;
  memcpy(&table.low, low, 128);
  memcpy(&table.high, high, 128);
  return table;
}

// 64 elements from one place to another as bfloat16.
template <class T>
INLAY_INLINE void widen(const Widening& table, __m512i codes, uint16_t* to) {
  // In this order unpacking, which is done by quarters, gives them in sequence.
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  codes = _mm512_permutexvar_epi64(order, codes);
  const __m512i index = kTokenScales<T> ? _mm512_abs_epi8(codes) : codes;  // bit 7 is not looked at
  const __m512i low = _mm512_permutex2var_epi8(table.low[0], index, table.low[1]);
  const __m512i high = _mm512_ternarylogic_epi64(
      _mm512_permutex2var_epi8(table.high[0], index, table.high[1]), codes,
      _mm512_set1_epi8((char)0x80), 0xf8);  // with the sign
  _mm512_storeu_si512(to, _mm512_unpacklo_epi8(low, high));
  _mm512_storeu_si512(to + 32, _mm512_unpackhi_epi8(low, high));
}

template <class T>
static void widen_all(const Widening& table, const T* from, int count, uint16_t* to) {
  int i = 0;
  for (; i + 64 <= count; i += 64) widen<T>(table, _mm512_loadu_si512(from + i), to + i);
  if (i == count) return;
  alignas(64) uint16_t rest[64];
  const uint64_t mask = (uint64_t{1} << (count - i)) - 1;
  widen<T>(table, _mm512_maskz_loadu_epi8(mask, from + i), rest);
  memcpy(to + i, rest, (count - i) * sizeof(uint16_t));
}

template <>
void widen_all<BFloat16>(const Widening&, const BFloat16* from, int count, uint16_t* to) {
  memcpy(to, from, count * sizeof(uint16_t));
}

// The groups of a tile that rows in [lo, hi) see, as bfloat16, values padded to whole vectors.
template <class T>
static Tile<BFloat16> widen_tile(const AttentionArgs& a, const Widening& table, const Tile<T>& in,
                                 int lo, int hi, float* scratch) {
  const int dk = a.dk(), width = padded(a.dv);
  uint16_t *k = (uint16_t*)scratch, *v = k + dk * kTile;
  Tile<BFloat16> out{{}, {}, 2 * kGroup, 2 * width, in.start};  // only fetches what is next
  for (int g = 0; g < kGroups; ++g, k += dk * kGroup, v += width * kGroup) {
    out.here.k[g] = (const BFloat16*)k, out.here.v[g] = (const BFloat16*)v;
    out.next.k[g] = (const BFloat16*)in.next.k[g], out.next.v[g] = (const BFloat16*)in.next.v[g];
    const int start = in.start + g * kGroup;
    if (start + kGroup <= lo || start >= hi) continue;
    widen_all<T>(table, in.here.k[g], dk * kGroup, k);
    if (width == a.dv) {
      widen_all<T>(table, in.here.v[g], width * kGroup, v);
      continue;
    }
    for (int t = 0; t < kGroup; t += 2) {
      widen_all<T>(table, in.here.v[g] + t * a.dv, 2 * a.dv, v + t * width);
      memset(v + t * width + 2 * a.dv, 0, 2 * (width - a.dv) * sizeof(uint16_t));
    }
  }
  return out;
}

template <class T>
static void dot_split(const AttentionArgs& a, const WorkItem& w, int split, const uint32_t* q,
                      float* tile_memory, State state) {
  const int lo = imax(visible(a, w, w.row_begin).lo, split * inlay::kSplit);
  const int hi = imin(visible(a, w, w.row_end - 1).hi, (split + 1) * inlay::kSplit);
  int start = lo / kTile * kTile;
  Tile<T> tile{{}, find_groups<T>(a, w, start, lo, hi), 2 * kGroup, 2 * a.dv, start};
  static const Widening table = find_widening<T>();
  for (; start < hi; start += kTile) {
    tile.start = start;
    tile.here = tile.next;
    if (start + kTile < hi) tile.next = find_groups<T>(a, w, start + kTile, lo, hi);
    const TileScales scales =
        find_scales<T>(a, tile, imax(lo - start, 0), imin(hi - start, kTile));
    if constexpr (sizeof(T) == 2) {
      if (a.dv % kGroup == 0) {
        dot_rows<T>(a, w, tile, scales, q, state);
        continue;
      }
    }
    dot_rows<T>(a, w, widen_tile<T>(a, table, tile, lo, hi, tile_memory), scales, q, state);
  }
}

void attend_split_by_dots(const AttentionArgs& a, const WorkItem& w, int split, const float* q,
                          float* tile_memory, State state) {
  const uint32_t* pairs = (const uint32_t*)q;
  switch (a.cache_dtype) {
    case DType::kFloat8: return dot_split<Float8>(a, w, split, pairs, tile_memory, state);
    case DType::kInt8: return dot_split<Int8>(a, w, split, pairs, tile_memory, state);
    default: return dot_split<BFloat16>(a, w, split, pairs, tile_memory, state);
  }
}
