// Products with weights of 8 or 4 bits on any CPU: some inputs of a block's weights are widened to
// float32, then multiplied with all rows. Integer sums are exact in float32 for that many inputs.
#include "quantized.h"
#include "quantized_vec.h"

namespace {

using inlay::Place;

constexpr int kDotRows = kLanes == 16 ? 8 : kLanes == 8 ? 3 : 1;  // what registers hold
constexpr int kPanel = 256;  // inputs widened at a time: 256 * 128 * 128 is exact in float32
constexpr int kRowsAtATime = 64;

// Weights as floats, by their bits.
struct Table {
  float values[256];
};

constexpr float float8_value(int bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  if ((bits & 127) == 127) return __builtin_nanf("");
  float value = exponent ? 8 + mantissa : 2 * mantissa;  // of 2^(exponent - 10)
  for (int e = exponent; e < 10; ++e) value /= 2;
  for (int e = exponent; e > 10; --e) value *= 2;
  return bits & 128 ? -value : value;
}

template <Format format>
constexpr Table make_table() {
  Table table{};
  for (int i = 0; i < 256; ++i)
    table.values[i] = format == Format::kFloat8 ? float8_value(i)
                      : format == Format::kInt4 ? (i & 15)
                      : format == Format::kInt8 ? i - 128
                                                : (i < 128 ? i : i - 256);
  return table;
}

template <Format format>
constexpr Table kTable = make_table<format>();

struct Places {
  Place at[8][kCodeBlock];
};

template <Format format>
constexpr Places make_places() {
  Places places{};
  for (int input = 0; input < (format == Format::kInt4 ? 8 : 4); ++input)
    for (int output = 0; output < kCodeBlock; ++output)
      places.at[input][output] = inlay::place(format, input, output);
  return places;
}

template <Format format>
constexpr Places kPlaces = make_places<format>();

// Weights of the inputs [k, k + count) less their zero, as [count][32].
template <Format format>
static void widen(const uint8_t* codes, int64_t k, int64_t count, const float* zero, float* panel) {
  constexpr int64_t kInputs = format == Format::kInt4 ? 8 : 4;
  const float* values = kTable<format>.values;
  for (int64_t i = k; i < k + count; ++i, panel += kCodeBlock) {
    const uint8_t* tile = codes + i / kInputs * kTileBytes;
    const Place* places = kPlaces<format>.at[i % kInputs];
    for (int c = 0; c < kCodeBlock; ++c) {
      const uint8_t bits = tile[places[c].byte] >> places[c].shift;
      panel[c] = values[format == Format::kInt4 ? bits & 15 : bits] - zero[c];
    }
  }
}

static void load_zeros(const QuantizedProduct& p, int64_t group, int64_t block, float* zeros) {
  for (int i = 0; i < kBlockVecs; ++i) {
    const int64_t at = block * kCodeBlock + i * kLanes, count = p.out_features - at;
    VecF v = splat(p.format == Format::kInt4 ? 8.f : 0.f);
    if (p.zero) v = load_any(DType::kInt8, p.zero + group * p.out_features, at, count);
    store(zeros + i * kLanes, v);
  }
}

template <int Count>
INLAY_NOINLINE static void dot(const float* x, int64_t stride, const float* panel, int64_t inputs,
                               VecF (*sums)[kBlockVecs]) {
  VecF total[Count][kBlockVecs] = {};
  for (int64_t k = 0; k < inputs; ++k)
    for (int r = 0; r < Count; ++r)
      for (int i = 0; i < kBlockVecs; ++i)
        total[r][i] += splat(x[r * stride + k]) * load(panel + k * kCodeBlock + i * kLanes);
  for (int r = 0; r < Count; ++r)
    for (int i = 0; i < kBlockVecs; ++i) sums[r][i] = total[r][i];
}

using Dot = void (*)(const float*, int64_t, const float*, int64_t, VecF (*)[kBlockVecs]);
constexpr Dot kDots[8] = {dot<1>, dot<kDotRows < 2 ? kDotRows : 2>, dot<kDotRows < 3 ? 1 : 3>,
                          dot<kDotRows < 4 ? 1 : 4>, dot<kDotRows < 5 ? 1 : 5>,
                          dot<kDotRows < 6 ? 1 : 6>, dot<kDotRows < 7 ? 1 : 7>,
                          dot<kDotRows < 8 ? 1 : 8>};

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

template <Format format>
static void multiply_rows(const QuantizedProduct& p, int64_t block, int64_t first, int64_t count,
                          float* panel) {
  VecF totals[kRowsAtATime][kBlockVecs] = {}, sums[kDotRows][kBlockVecs];
  float zeros[kCodeBlock];
  const int64_t stride = p.x_stride / static_cast<int64_t>(sizeof(float));
  const uint8_t* codes = p.codes + block * inlay::block_bytes(format, p.in_features);
  int64_t inputs;
  for (int64_t k = 0; k < p.in_features; k += inputs) {
    const int64_t group = k / p.group_size, left = (group + 1) * p.group_size - k;
    inputs = left < kPanel ? left : kPanel;
    load_zeros(p, group, block, zeros);
    widen<format>(codes, k, inputs, zeros, panel);
    for (int64_t row = 0; row < count; row += kDotRows) {
      const int64_t rows = count - row < kDotRows ? count - row : kDotRows;
      const float* x = reinterpret_cast<const float*>(p.x) + (first + row) * stride + k;
      kDots[rows - 1](x, stride, panel, inputs, sums);
      for (int64_t r = 0; r < rows; ++r)
        accumulate(p, first + row + r, group, block, sums[r], totals[row + r]);
    }
  }
  for (int64_t row = 0; row < count; ++row) finish_row(p, first + row, block, totals[row]);
}

template <Format format>
static void multiply_part(const QuantizedProduct& p, const Part& part) {
  float panel[kPanel * kCodeBlock];
  for (int64_t row = part.first_row; row < part.last_row; row += kRowsAtATime) {
    const int64_t left = part.last_row - row, count = left < kRowsAtATime ? left : kRowsAtATime;
    for (int64_t block = part.first_block; block < part.last_block; ++block)
      multiply_rows<format>(p, block, row, count, panel);
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

int64_t row_bytes(Format, int64_t in_features, int64_t) { return in_features * sizeof(float); }

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
