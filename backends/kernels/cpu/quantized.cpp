// Products with weights of 8 or 4 bits on any CPU, in float32: of few rows weights are widened in
// registers, for more some inputs of a block once, into the cache. Both add up in one order. Integer
// sums are exact in float32 for that many inputs.
#include "over_rows.h"
#include "quantized.h"
#include "quantized_vec.h"

namespace {

constexpr int kVecs = 2;                        // that are summed at a time
constexpr int kDotRows = kLanes == 16 ? 8 : 6;  // what registers hold, with so many sums each
constexpr int kFewRows = 4;
constexpr int kPanel = 256;  // inputs of a part: 256 * 128 * 128 is exact in float32
constexpr int kRowsAtATime = 64;

// A pair of inputs of kFloat8, in the upper half of each output's lane.
INLAY_INLINE VecI float8_pairs(const uint8_t* tile, int pair, int vec) {
  const uint8_t* from = tile + vec * kLanes * 4;
#if defined(__AVX512F__)
  const __m512i bytes = _mm512_loadu_si512(from), zero = _mm512_setzero_si512();
  return (VecI)(pair ? _mm512_unpackhi_epi16(zero, bytes) : _mm512_unpacklo_epi16(zero, bytes));
#elif defined(__AVX2__)
  const __m256i bytes = load_as<__m256i>(from), zero = _mm256_setzero_si256();
  return (VecI)(pair ? _mm256_unpackhi_epi16(zero, bytes) : _mm256_unpacklo_epi16(zero, bytes));
#else
  return (VecI)(__builtin_convertvector(load_as<VecH>(from + pair * 8), VecU) << 16);
#endif
}

// e4m3 whose bits are a lane's uppermost.
INLAY_INLINE VecF float8_on_top(VecI bits) {
  const VecU magnitude = (VecU)bits >> 4 & 0x07f00000u;
  const VecU value = (VecU)float8_magnitudes(magnitude) | ((VecU)bits & 0x80000000u);
  return (VecF)(value | (VecU)(magnitude == 0x07f00000u));
}

// An input of a tile, as kLanes outputs' floats.
template <Format format>
INLAY_INLINE VecF number(const uint8_t* tile, int input, int vec) {
  if (format == Format::kFloat8) {
    const VecI pairs = float8_pairs(tile, input / 2, vec);
    return float8_on_top(input % 2 ? pairs : pairs << 8);
  }
  const VecU bytes = load_as<VecU>(tile + vec * kLanes * 4);
  if (format == Format::kIntegers)
    return __builtin_convertvector((VecI)(bytes << (24 - 8 * input)) >> 24, VecF);
  if (format == Format::kInt4)
    return __builtin_convertvector((VecI)(bytes >> (input % 4 * 8 + input / 4 * 4) & 15), VecF);
  return __builtin_convertvector((VecI)(bytes >> (8 * input) & 255) - 128, VecF);
}

// Inputs [k, k + count) of a block, group by group.
struct Span {
  int64_t k, count, group;
};

INLAY_INLINE Span span_at(const QuantizedProduct& p, int64_t k) {
  const int64_t group = k / p.group_size, left = (group + 1) * p.group_size - k;
  return {k, left < kPanel ? left : kPanel, group};
}

static void load_zeros(const QuantizedProduct& p, int64_t group, int64_t block, float* zeros) {
  for (int i = 0; i < kBlockVecs; ++i) {
    const int64_t at = block * kCodeBlock + i * kLanes, count = p.out_features - at;
    VecF v = splat(p.format == Format::kInt4 ? 8.f : 0.f);
    if (p.zero) v = load_any(DType::kInt8, p.zero + group * p.out_features, at, count);
    store(zeros + i * kLanes, v);
  }
}

// Adds a group's sums, or a part's, to a row's.
INLAY_INLINE void accumulate(const QuantizedProduct& p, int64_t row, int64_t group, int64_t block,
                             const VecF* sums, VecF* totals) {
  for (int i = 0; i < kBlockVecs; ++i) {
    if (p.format == Format::kIntegers) {
      totals[i] = (VecF)((VecI)totals[i] + __builtin_convertvector(sums[i], VecI));
      continue;
    }
    const int64_t at = block * kCodeBlock + i * kLanes, count = p.out_features - at;
    const int64_t begin = group * p.out_features;
    VecF scale = load_any(p.scale_dtype, p.scale, begin + at, count);
    if (p.x_scale) scale *= p.x_scale[row * p.x_scale_row + group * p.x_scale_group];
    totals[i] += sums[i] * scale;
  }
}

// One input's products, added to the sums of some rows.
template <int Count>
INLAY_INLINE void add_input(VecF (&sums)[Count][kVecs], const float* x, int64_t stride,
                            const VecF (&w)[kVecs]) {
#pragma GCC unroll 8
  for (int r = 0; r < Count; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) add_product(sums[r][v], splat(x[r * stride]), w[v]);
}

template <Format format, int Count>
INLAY_INLINE void add_coded(VecF (&sums)[Count][kVecs], const float* x, int64_t stride,
                            const uint8_t* tile, int input, int first,
                            const VecF (&zero)[kVecs]) {
  VecF w[kVecs];
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; ++v) {
    w[v] = number<format>(tile, input, first + v);
    if (format == Format::kInt8 || format == Format::kInt4) w[v] -= zero[v];
  }
  add_input(sums, x + input, stride, w);
}

// Sums of a span that begins with a tile, for a block's vectors [first, first + kVecs).
template <Format format, int Count>
INLAY_NOINLINE static void dot_codes(const float* x, int64_t stride, const uint8_t* tile,
                                     int64_t inputs, int first, const float* zeros,
                                     VecF (*to)[kBlockVecs]) {
  constexpr int kInputs = inlay::tile_inputs(format);
  VecF sums[Count][kVecs] = {}, zero[kVecs];
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; ++v) zero[v] = load(zeros + (first + v) * kLanes);
  for (; inputs >= kInputs; inputs -= kInputs, x += kInputs, tile += kTileBytes) {
    if (kVecs < kBlockVecs) prefetch_step(tile);
#pragma GCC unroll 8
    for (int i = 0; i < kInputs; ++i) add_coded<format>(sums, x, stride, tile, i, first, zero);
  }
  for (int i = 0; i < inputs; ++i) add_coded<format>(sums, x, stride, tile, i, first, zero);
#pragma GCC unroll 8
  for (int r = 0; r < Count; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) to[r][first + v] = sums[r][v];
}

template <Format format, int Count>
static void multiply_few(const QuantizedProduct& p, int64_t block, int64_t row) {
  VecF totals[Count][kBlockVecs] = {}, sums[Count][kBlockVecs];
  float zeros[kCodeBlock];
  const int64_t stride = p.x_stride / static_cast<int64_t>(sizeof(float));
  const float* x = reinterpret_cast<const float*>(p.x) + row * stride;
  const uint8_t* codes = p.codes + block * inlay::block_bytes(format, p.in_features);
  Span s;
  for (int64_t k = 0; k < p.in_features; k += s.count) {
    s = span_at(p, k);
    load_zeros(p, s.group, block, zeros);
    const uint8_t* tile = codes + k / inlay::tile_inputs(format) * kTileBytes;
    for (int first = 0; first < kBlockVecs; first += kVecs)
      dot_codes<format, Count>(x + k, stride, tile, s.count, first, zeros, sums);
#pragma GCC unroll 8
    for (int r = 0; r < Count; ++r)
      accumulate(p, row + r, s.group, block, sums[r], totals[r]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < Count; ++r) finish_row(p, row + r, block, totals[r]);
}

// Weights of a span less their zero, as [vectors / kVecs][inputs][kVecs].
template <Format format>
static void widen(const uint8_t* codes, const Span& s, const float* zeros, float* panel) {
  constexpr int64_t kInputs = inlay::tile_inputs(format);
  for (int first = 0; first < kBlockVecs; first += kVecs)
    for (int64_t i = s.k; i < s.k + s.count; ++i)
      for (int v = first; v < first + kVecs; ++v, panel += kLanes) {
        const uint8_t* tile = codes + i / kInputs * kTileBytes;
        store(panel, number<format>(tile, static_cast<int>(i % kInputs), v) -
                         load(zeros + v * kLanes));
      }
}

template <int Count>
INLAY_NOINLINE static void dot_panel(const float* x, int64_t stride, const float* panel,
                                     int64_t inputs, int first, VecF (*to)[kBlockVecs]) {
  VecF sums[Count][kVecs] = {};
  for (int64_t k = 0; k < inputs; ++k, panel += kVecs * kLanes) {
    VecF w[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) w[v] = load(panel + v * kLanes);
    add_input(sums, x + k, stride, w);
  }
#pragma GCC unroll 8
  for (int r = 0; r < Count; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) to[r][first + v] = sums[r][v];
}

using DotPanel = void (*)(const float*, int64_t, const float*, int64_t, int, VecF (*)[kBlockVecs]);
constexpr DotPanel kDotPanel[8] = {dot_panel<1>, dot_panel<2>, dot_panel<3>,
                                   dot_panel<4>, dot_panel<5>, dot_panel<6>,
                                   dot_panel<kDotRows < 7 ? 1 : 7>,
                                   dot_panel<kDotRows < 8 ? 1 : 8>};

template <Format format>
static void multiply_many(const QuantizedProduct& p, int64_t block, int64_t first, int64_t count,
                          float* panel) {
  VecF totals[kRowsAtATime][kBlockVecs] = {}, sums[kDotRows][kBlockVecs];
  float zeros[kCodeBlock];
  const int64_t stride = p.x_stride / static_cast<int64_t>(sizeof(float));
  const uint8_t* codes = p.codes + block * inlay::block_bytes(format, p.in_features);
  Span s;
  for (int64_t k = 0; k < p.in_features; k += s.count) {
    s = span_at(p, k);
    load_zeros(p, s.group, block, zeros);
    widen<format>(codes, s, zeros, panel);
    over_rows<kDotRows>(0, count, [&](int64_t row, int rows) {
      const float* x = reinterpret_cast<const float*>(p.x) + (first + row) * stride + k;
      for (int v = 0; v < kBlockVecs; v += kVecs)
        kDotPanel[rows - 1](x, stride, panel + v * kLanes * s.count, s.count, v, sums);
      for (int r = 0; r < rows; ++r)
        accumulate(p, first + row + r, s.group, block, sums[r], totals[row + r]);
    });
  }
  for (int64_t row = 0; row < count; ++row) finish_row(p, first + row, block, totals[row]);
}

template <Format format>
static void multiply_part(const QuantizedProduct& p, const Part& part) {
  static constexpr void (*few[kFewRows])(const QuantizedProduct&, int64_t, int64_t) = {
      multiply_few<format, 1>, multiply_few<format, 2>, multiply_few<format, 3>,
      multiply_few<format, 4>};
  const bool whole_tiles =
      p.group_size == p.in_features || p.group_size % inlay::tile_inputs(format) == 0;
  const int64_t rows = part.last_row - part.first_row;
  if (rows <= kFewRows && whole_tiles) {
    for (int64_t block = part.first_block; block < part.last_block; ++block)
      few[rows - 1](p, block, part.first_row);
    return;
  }
  float panel[kPanel * kCodeBlock];
  for (int64_t row = part.first_row; row < part.last_row; row += kRowsAtATime) {
    const int64_t left = part.last_row - row, count = left < kRowsAtATime ? left : kRowsAtATime;
    for (int64_t block = part.first_block; block < part.last_block; ++block)
      multiply_many<format>(p, block, row, count, panel);
  }
}

void multiply(const QuantizedProduct& p, const Part& part) {
  switch (p.format) {
    case Format::kIntegers: return multiply_part<Format::kIntegers>(p, part);
    case Format::kInt8: return multiply_part<Format::kInt8>(p, part);
    case Format::kInt4: return multiply_part<Format::kInt4>(p, part);
    case Format::kFloat8: return multiply_part<Format::kFloat8>(p, part);
  }
}

bool takes(Format, DType, int64_t, int64_t) { return true; }

// An odd number of cache lines: rows of a power of two would compete for a few places in L1.
int64_t row_bytes(Format, int64_t in_features, int64_t) {
  return ((in_features * int64_t{sizeof(float)} + 63) / 64 | 1) * 64;
}

void prepare(Format, const Rows& rows, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row)
    for (int64_t k = 0; k < rows.in_features; k += kLanes) {
      const int64_t count = rows.in_features - k;
      const VecF v = load_any(rows.dtype, rows.from, row * rows.in_features + k, count);
      store_some<float>(rows.to + row * rows.to_stride, v, k, count);
    }
}

// The largest magnitude, NaN if there is one.
static float largest(const Rows& rows, int64_t row) {
  VecF most = {};
  for (int64_t k = 0; k < rows.in_features; k += kLanes) {
    const VecF v = load_any(rows.dtype, rows.from, row * rows.in_features + k,
                            rows.in_features - k);
    const VecF size = v < 0.f ? -v : v;
    most = ((size > most) | (size != size)) ? size : most;
  }
  float result = 0.f;
  for (int i = 0; i < kLanes; ++i)
    if (most[i] > result || most[i] != most[i]) result = most[i];
  return result;
}

// The nearest integers, even ones of two as near; for magnitudes up to 2^22.
INLAY_INLINE VecI to_integers(VecF v) {
  const float magic = 12582912.f;
  return __builtin_convertvector((v + magic) - magic, VecI);
}

// The bits of the nearest e4m3; magnitudes up to 448.
INLAY_INLINE VecI to_float8(VecF v) {
  const VecU u = (VecU)v, sign = u >> 24 & 0x80, magnitude = u & 0x7fffffff;
  const VecU normal = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
  const VecU subnormal = (VecU)((VecF)magnitude + 16384.f) - 0x46800000;  // 2^14 + n 2^-9
  return (VecI)((magnitude < 0x3c800000 ? subnormal : normal) | sign);
}

void quantize(DType to, const Rows& rows, float* scales, int64_t first, int64_t last) {
  const bool integers = to == DType::kInt8;
  const float most = integers ? 127.f : 448.f;
  for (int64_t row = first; row < last; ++row) {
    const float amax = largest(rows, row), inverse = amax > 1e-30f ? most / amax : 0.f;
    scales[row] = amax / most;
    for (int64_t k = 0; k < rows.in_features; k += kLanes) {
      const int64_t count = rows.in_features - k;
      VecF v = load_any(rows.dtype, rows.from, row * rows.in_features + k, count);
      v = rounded(v * inverse);
      v = v > most ? splat(most) : v < -most ? splat(-most) : v;
      const VecB bits = __builtin_convertvector(integers ? to_integers(v) : to_float8(v), VecB);
      memcpy(rows.to + row * rows.to_stride + k, &bits, count < kLanes ? count : kLanes);
    }
  }
}

}  // namespace

namespace inlay::INLAY_ISA {
extern const QuantizedKernels quantized_kernels = {quantize, {takes, row_bytes, prepare, multiply}};
}
