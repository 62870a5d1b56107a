// Products with weights of 8 or 4 bits by AVX-512's dot instructions (VNNI, BF16; VBMI to widen).
//
// int8 activations become unsigned by adding 128, and 128 times the columns' sums are taken off.
// Otherwise x is bfloat16 and so become the weights, exactly: those of few rows in registers, as
// they stream by; for more rows a part of a block is widened once, into the cache. Both add up in
// one order: segments of a group, each from its first input to its last, then scaled and added.
#include "dot_rows.h"
#include "quantized.h"
#include "quantized_vec.h"
#include "widen_avx512.h"

namespace {

using inlay::kTileBytes;
using inlay::Part;
using inlay::Rows;
using inlay::tile_inputs;

constexpr int64_t kSegment = 1024;   // inputs, at most; what a widened part has
constexpr int kDirectRows = 4;       // widened in registers, again for each so many rows
constexpr int64_t kMinGroup = 8;     // inputs of the largest tile

bool takes(Format format, DType x, int64_t group_size, int64_t in_features) {
  if (format == Format::kIntegers) return x == DType::kInt8;
  if (x != DType::kBFloat16 && x != DType::kFloat8) return false;
  return group_size == in_features || group_size % kMinGroup == 0;
}

int64_t padded_inputs(int64_t in_features) { return (in_features + 7) / 8 * 8; }

int64_t data_bytes(Format format, int64_t in_features) {
  const int64_t bytes = padded_inputs(in_features) * (format == Format::kIntegers ? 1 : 2);
  return (bytes + 63) / 64 * 64;
}

// An odd number of cache lines: rows of a power of two would compete for a few places in L1.
int64_t row_bytes(Format format, int64_t in_features, int64_t groups) {
  int64_t lines = data_bytes(format, in_features) / 64;
  if (format != Format::kIntegers) lines += (groups * 4 + 63) / 64;
  return (lines | 1) * 64;
}

// A row's sums of groups, for weights with zero points; they lie behind its inputs.
float* group_sums(char* row, int64_t in_features) {
  return reinterpret_cast<float*>(row + data_bytes(Format::kInt8, in_features));
}

void sum_groups(const Rows& rows, char* row) {
  const auto* x = reinterpret_cast<const BFloat16*>(row);
  const int64_t size = rows.group_size;
  float* sums = group_sums(row, rows.in_features);
  for (int64_t k = 0; k < rows.in_features; k += size) {
    VecF total = {};
    for (int64_t i = 0; i < size; i += kLanes) {
      const int64_t count = size - i;
      total += count >= kLanes ? load(x + k + i) : load_first(x + k + i, (int)count);
    }
    sums[k / size] = _mm512_reduce_add_ps((__m512)total);
  }
}

void prepare(Format format, const Rows& rows, int64_t first, int64_t last) {
  const int64_t width = rows.in_features, padded = padded_inputs(width);
  for (int64_t row = first; row < last; ++row) {
    char* to = rows.to + row * rows.to_stride;
    const int64_t begin = row * width;
    if (format == Format::kIntegers) {
      for (int64_t k = 0; k < width; ++k) to[k] = static_cast<char>(rows.from[begin + k] ^ 0x80);
      memset(to + width, 0, padded - width);
      continue;
    }
    memset(to + width * 2, 0, (padded - width) * 2);
    if (rows.dtype == DType::kBFloat16) {
      memcpy(to, rows.from + begin * 2, width * 2);
    } else {
      for (int64_t k = 0; k < width; k += kLanes) {
        const VecF v = load_any(rows.dtype, rows.from, begin + k, width - k);
        store_some<BFloat16>(to, v, k, width - k);
      }
    }
    if (rows.group_size) sum_groups(rows, to);
  }
}

// --- int8 times int8 -------------------------------------------------------------------------

template <int Count>
INLAY_NOINLINE void multiply_integers(const QuantizedProduct& p, int64_t row, int64_t block) {
  const int64_t steps = (p.in_features + 3) / 4;
  __m512i sums[Count][2];
  for (int i = 0; i < 2; ++i) {
    const __m512i columns = _mm512_loadu_si512(p.column_sums + block * kCodeBlock + i * kLanes);
    for (auto& sum : sums) sum[i] = _mm512_sub_epi32(__m512i{}, _mm512_slli_epi32(columns, 7));
  }
  const auto* w = reinterpret_cast<const char*>(p.codes) + block * steps * kTileBytes;
  add_steps<IntegerDot, Count>(sums, p.x + row * p.x_stride, p.x_stride, w, steps);
  for (int r = 0; r < Count; ++r) {
    const VecF totals[2] = {(VecF)sums[r][0], (VecF)sums[r][1]};
    finish_row(p, row + r, block, totals);
  }
}

using Multiply = void (*)(const QuantizedProduct&, int64_t, int64_t);
constexpr Multiply kMultiplyIntegers[kDotRows] = INLAY_BY_ROWS(multiply_integers);

// --- weights to bfloat16 ---------------------------------------------------------------------

struct Segment {
  int64_t k, inputs, group;
};

// The segment that begins at input k.
INLAY_INLINE Segment segment_at(const QuantizedProduct& p, int64_t k) {
  const int64_t group = k / p.group_size, left = (group + 1) * p.group_size - k;
  return {k, left < kSegment ? left : kSegment, group};
}

// What a segment's sums of a block are multiplied with, and minus its zero points.
struct Factors {
  VecF scale[2], minus_zero[2];
};

INLAY_INLINE Factors load_factors(const QuantizedProduct& p, int64_t group, int64_t block) {
  Factors f;
  for (int i = 0; i < 2; ++i) {
    const int64_t column = block * kCodeBlock + i * kLanes, count = p.out_features - column;
    const int64_t at = group * p.out_features + column;
    f.scale[i] = load_any(p.scale_dtype, p.scale, at, count);
    const float middle = p.format == Format::kInt4 ? 8.f : 0.f;
    if (p.zero) f.minus_zero[i] = middle - load_any(DType::kInt8, p.zero, at, count);
  }
  return f;
}

// A row's sums of a segment begin at minus its zero points times the sum of its inputs; the first
// segment of a group takes the whole group's.
INLAY_INLINE void start_sums(const QuantizedProduct& p, const Segment& s, const Factors& f,
                             int64_t row, __m512 (&sums)[2]) {
  sums[0] = sums[1] = _mm512_setzero_ps();
  if (!p.zero || s.k != s.group * p.group_size) return;
  const float* of_groups = group_sums(const_cast<char*>(p.x) + row * p.x_stride, p.in_features);
  for (int i = 0; i < 2; ++i) sums[i] = (__m512)(f.minus_zero[i] * of_groups[s.group]);
}

INLAY_INLINE void add_scaled(const QuantizedProduct& p, const Segment& s, const Factors& f,
                             int64_t row, const __m512 (&sums)[2], VecF* totals) {
  const float x_scale =
      p.x_scale ? p.x_scale[row * p.x_scale_row + s.group * p.x_scale_group] : 1.f;
  for (int i = 0; i < 2; ++i)
    totals[i] = (VecF)_mm512_fmadd_ps(sums[i], (__m512)(f.scale[i] * x_scale), (__m512)totals[i]);
}

// Count rows of x times Blocks blocks, whose weights are widened in registers.
template <Format format, int Count, int Blocks>
INLAY_NOINLINE void multiply_direct(const QuantizedProduct& p, int64_t row, int64_t block) {
  using Wide = Widen<format>;
  const Wide widen;
  const int64_t bytes = inlay::block_bytes(format, p.in_features);
  const char* x = p.x + row * p.x_stride;
  const uint8_t* w = p.codes + block * bytes;
  VecF totals[Blocks][Count][2] = {};
  for (int64_t k = 0; k < p.in_features;) {
    const Segment s = segment_at(p, k);
    Factors factors[Blocks];
    __m512 sums[Blocks][Count][2];
    for (int b = 0; b < Blocks; ++b) {
      factors[b] = load_factors(p, s.group, block + b);
      for (int r = 0; r < Count; ++r) start_sums(p, s, factors[b], row + r, sums[b][r]);
    }
    for (int64_t end = k + s.inputs; k < end; k += 2 * Wide::kPairs, w += kTileBytes)
      for (int b = 0; b < Blocks; ++b)
        for (int i = 0; i < 2; ++i) {
          __m512i pairs[Wide::kPairs];
          widen(_mm512_loadu_si512(w + b * bytes + i * 64), pairs);
          for (int j = 0; j < Wide::kPairs; ++j)
            for (int r = 0; r < Count; ++r) {
              const __m512i v = broadcast4(x + r * p.x_stride + k * 2 + j * 4);
              sums[b][r][i] = BFloat16Dot::add(sums[b][r][i], pairs[j], v);
            }
        }
    for (int b = 0; b < Blocks; ++b)
      for (int r = 0; r < Count; ++r)
        add_scaled(p, s, factors[b], row + r, sums[b][r], totals[b][r]);
  }
  for (int b = 0; b < Blocks; ++b)
    for (int r = 0; r < Count; ++r) finish_row(p, row + r, block + b, totals[b][r]);
}

// A row alone waits for its sums, unless two blocks are summed at a time.
template <Format format>
void multiply_few(const QuantizedProduct& p, const Part& part) {
  static constexpr Multiply by_rows[kDirectRows] = {
      multiply_direct<format, 1, 1>, multiply_direct<format, 2, 1>, multiply_direct<format, 3, 1>,
      multiply_direct<format, 4, 1>};
  const int64_t rows = part.last_row - part.first_row;
  int64_t block = part.first_block;
  if (rows == 1)
    for (; block + 2 <= part.last_block; block += 2)
      multiply_direct<format, 1, 2>(p, part.first_row, block);
  for (; block < part.last_block; ++block) by_rows[rows - 1](p, part.first_row, block);
}

// Some segments of a block, widened.
struct Panel {
  alignas(64) char weights[kSegment * kCodeBlock * 2];
  Segment segments[kSegment / kMinGroup];
  Factors factors[kSegment / kMinGroup];
  int num_segments;
};

template <Format format>
INLAY_NOINLINE int64_t fill_panel(const QuantizedProduct& p, int64_t block, int64_t k, Panel& to) {
  using Wide = Widen<format>;
  const Wide widen;
  constexpr int64_t kInputs = 2 * Wide::kPairs;
  const int64_t begin = k;
  to.num_segments = 0;
  while (k < p.in_features) {
    const Segment s = segment_at(p, k);
    if (k + s.inputs - begin > kSegment) break;
    to.factors[to.num_segments] = load_factors(p, s.group, block);
    to.segments[to.num_segments++] = s;
    k += s.inputs;
  }
  const uint8_t* w = p.codes + block * inlay::block_bytes(format, p.in_features);
  char* out = to.weights;
  for (int64_t tile = begin / kInputs; tile * kInputs < k; ++tile)
    for (int i = 0; i < 2; ++i) {
      __m512i pairs[Wide::kPairs];
      widen(_mm512_loadu_si512(w + tile * kTileBytes + i * 64), pairs);
      for (int j = 0; j < Wide::kPairs; ++j)
        _mm512_store_si512(out + (tile - begin / kInputs) * Wide::kPairs * 128 + j * 128 + i * 64,
                           pairs[j]);
    }
  return k;
}

template <int Count>
INLAY_NOINLINE void multiply_panel(const QuantizedProduct& p, const Panel& panel, int64_t row,
                                   VecF (*totals)[2]) {
  for (int i = 0; i < panel.num_segments; ++i) {
    const Segment& s = panel.segments[i];
    __m512 sums[Count][2];
    for (int r = 0; r < Count; ++r) start_sums(p, s, panel.factors[i], row + r, sums[r]);
    const int64_t steps = (s.inputs + 1) / 2, offset = (s.k - panel.segments[0].k) / 2;
    add_steps<BFloat16Dot, Count>(sums, p.x + row * p.x_stride + s.k * 2, p.x_stride,
                                  panel.weights + offset * kTileBytes, steps);
    for (int r = 0; r < Count; ++r)
      add_scaled(p, s, panel.factors[i], row + r, sums[r], totals[r]);
  }
}

using MultiplyPanel = void (*)(const QuantizedProduct&, const Panel&, int64_t, VecF (*)[2]);
constexpr MultiplyPanel kMultiplyPanel[kDotRows] = INLAY_BY_ROWS(multiply_panel);

template <Format format>
void multiply_many(const QuantizedProduct& p, const Part& part) {
  Panel panel;
  VecF totals[inlay::kMaxPartRows][2];
  for (int64_t block = part.first_block; block < part.last_block; ++block) {
    memset(totals, 0, sizeof totals);
    for (int64_t k = 0; k < p.in_features;) {
      k = fill_panel<format>(p, block, k, panel);
      over_rows(part.first_row, part.last_row, [&](int64_t row, int count) {
        kMultiplyPanel[count - 1](p, panel, row, totals + (row - part.first_row));
      });
    }
    for (int64_t row = part.first_row; row < part.last_row; ++row)
      finish_row(p, row, block, totals[row - part.first_row]);
  }
}

template <Format format>
void multiply_widened(const QuantizedProduct& p, const Part& part) {
  if (part.last_row - part.first_row <= kDirectRows) return multiply_few<format>(p, part);
  multiply_many<format>(p, part);
}

void multiply(const QuantizedProduct& p, const Part& part) {
  switch (p.format) {
    case Format::kIntegers:
      for (int64_t block = part.first_block; block < part.last_block; ++block)
        over_rows(part.first_row, part.last_row, [&](int64_t row, int count) {
          kMultiplyIntegers[count - 1](p, row, block);
        });
      return;
    case Format::kInt8: return multiply_widened<Format::kInt8>(p, part);
    case Format::kInt4: return multiply_widened<Format::kInt4>(p, part);
    case Format::kFloat8: return multiply_widened<Format::kFloat8>(p, part);
  }
}

}  // namespace

namespace inlay::INLAY_ISA {
extern const ProductKernels product_kernels = {takes, row_bytes, prepare, multiply};
}
