// Weights of 8 and 4 bits by AVX2's products of 16-bit integers, two of which go into a 32-bit sum.
//
// Of integer activations sums are exact. In segments of at most 128 inputs bfloat16 and float16 x
// becomes 16-bit numbers times a power of two: as in dot_split.h, but for one number where that has
// two bytes. Numbers that are not below 1/128 of the segment's largest are exact in bfloat16, others
// are off by 2^-15 of it at most. A segment's sum is exact; zero points come off by the sum of x.
#include "over_rows.h"
#include "quantized_vec.h"

namespace {

constexpr int64_t kSegmentInputs = 128;  // 128 * 32767 * 255 is below 2^31
constexpr int64_t kMinGroup = 8;
constexpr int kRows = 6;  // with 2 vectors of sums each

struct Segment {
  float unit;
  int32_t sum;  // of x
};

INLAY_INLINE int64_t segment_inputs(int64_t group_size) {
  return group_size < kSegmentInputs ? group_size : kSegmentInputs;
}

// A row: 16-bit numbers padded with zeros to whole tiles, in each 4 inputs 0 2 1 3; then its segments.
INLAY_INLINE int64_t plane_bytes(int64_t in_features) { return (in_features + 7) / 8 * 16; }

bool takes(Format format, DType x, int64_t group_size, int64_t in_features) {
  if (format == Format::kIntegers) return x == DType::kInt8;
  const bool groups = group_size == in_features || group_size % kMinGroup == 0;
  return format != Format::kFloat8 && groups && (x == DType::kBFloat16 || x == DType::kFloat16);
}

// An odd number of cache lines: rows of a power of two would compete for a few places in L1.
int64_t row_bytes(Format format, int64_t in_features, int64_t group_size) {
  const int64_t size = segment_inputs(group_size);
  const int64_t segments = in_features / group_size * ((group_size + size - 1) / size);
  const int64_t bytes = plane_bytes(in_features) +
                        (format == Format::kIntegers ? 0 : segments * int64_t{sizeof(Segment)});
  return ((bytes + 63) / 64 | 1) * 64;
}

INLAY_INLINE void store_numbers(char* to, __m128i numbers) {
  constexpr int order = _MM_SHUFFLE(3, 1, 2, 0);
  numbers = _mm_shufflehi_epi16(_mm_shufflelo_epi16(numbers, order), order);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), numbers);
}

// The magnitudes' largest by their bits: as integers they have the same order, with NaN above all.
static uint32_t largest_bits(const Rows& rows, int64_t at, int64_t count) {
  __m256i most = _mm256_setzero_si256();
  for (int64_t i = 0; i < count; i += kLanes) {
    const VecU bits = (VecU)load_any(rows.dtype, rows.from, at + i, count - i) & 0x7fffffff;
    most = _mm256_max_epu32(most, (__m256i)bits);
  }
  uint32_t largest = 0;
  for (int i = 0; i < kLanes; ++i) largest = ((VecU)most)[i] > largest ? ((VecU)most)[i] : largest;
  return largest;
}

INLAY_INLINE float from_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }

// x [count] in units of a power of two; the largest has 15 bits.
static Segment split_segment(const Rows& rows, int64_t at, int64_t count, char* to) {
  const uint32_t largest = largest_bits(rows, at, count), exponent = largest >> 23;
  const bool finite = exponent < 255, tiny = exponent < 15;
  const float unit = !finite ? from_bits(largest) : tiny ? 0.f : from_bits((exponent - 14) << 23);
  const float inverse = !finite || tiny ? 0.f : from_bits((254 + 14 - exponent) << 23);
  VecI sum = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const VecF v = load_any(rows.dtype, rows.from, at + i, count - i) * inverse;
    const __m256i n = _mm256_cvtps_epi32((__m256)v);
    sum += (VecI)n;
    store_numbers(to + i * 2,
                  _mm_packs_epi32(_mm256_castsi256_si128(n), _mm256_extracti128_si256(n, 1)));
  }
  int32_t total = 0;
  for (int i = 0; i < kLanes; ++i) total += sum[i];
  return {unit, total};
}

static void split_row(const Rows& rows, int64_t row, char* to) {
  const int64_t width = rows.in_features, size = segment_inputs(rows.group_size);
  auto* segment = reinterpret_cast<Segment*>(to + plane_bytes(width));
  for (int64_t group = 0; group < width; group += rows.group_size)
    for (int64_t k = 0; k < rows.group_size; k += size) {
      const int64_t left = rows.group_size - k, at = group + k;
      *segment++ = split_segment(rows, row * width + at, left < size ? left : size, to + at * 2);
    }
}

static void widen_row(const char* from, int64_t width, char* to) {
  for (int64_t k = 0; k < width; k += 8) {
    int64_t bytes = 0;
    memcpy(&bytes, from + k, width - k < 8 ? width - k : 8);
    store_numbers(to + k * 2, _mm_cvtepi8_epi16(_mm_cvtsi64_si128(bytes)));
  }
}

void prepare(Format format, const Rows& rows, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    char* to = rows.to + row * rows.to_stride;
    if (format == Format::kIntegers) widen_row(rows.from + row * rows.in_features, rows.in_features, to);
    else split_row(rows, row, to);
  }
}

// Of 4 bytes of each of 8 outputs: inputs 0 and 2 of a tile, then 1 and 3; of 4-bit numbers also 4
// and 6, then 5 and 7.
template <Format format, int part>
INLAY_INLINE __m256i numbers(__m256i w) {
  if (format == Format::kIntegers)
    return _mm256_srai_epi16(part ? w : _mm256_slli_epi16(w, 8), 8);
  if (format == Format::kInt8)
    return part ? _mm256_srli_epi16(w, 8) : _mm256_and_si256(w, _mm256_set1_epi16(255));
  if (part == 3) return _mm256_srli_epi16(w, 12);
  return _mm256_and_si256(_mm256_srli_epi16(w, part == 0 ? 0 : part == 1 ? 8 : 4),
                          _mm256_set1_epi16(15));
}

// sum += a times b; see add_product of vec.h.
INLAY_INLINE void add_pairs(__m256i& sum, __m256i a, __m256i b) {
  const __m256i products = _mm256_madd_epi16(a, b);
  asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(products));
}

template <Format format, int part, int Count, int Vecs>
INLAY_INLINE void add_part(__m256i (&sums)[Count][Vecs], const char* x, int64_t stride,
                           const uint8_t* w) {
  __m256i n[Vecs];
#pragma GCC unroll 8
  for (int v = 0; v < Vecs; ++v)
    n[v] = numbers<format, part>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w) + v));
#pragma GCC unroll 8
  for (int r = 0; r < Count; ++r) {
    int32_t pair;
    memcpy(&pair, x + r * stride + part * 4, sizeof pair);
    const __m256i both = _mm256_set1_epi32(pair);
#pragma GCC unroll 8
    for (int v = 0; v < Vecs; ++v) add_pairs(sums[r][v], n[v], both);
  }
}

template <Format format, int Count, int Vecs>
INLAY_INLINE void add_tiles(__m256i (&sums)[Count][Vecs], const char* x, int64_t stride,
                            const uint8_t* w, int64_t tiles) {
  for (; tiles > 0; --tiles, w += kTileBytes, x += 2 * inlay::tile_inputs(format)) {
    prefetch_step(w);
    add_part<format, 0>(sums, x, stride, w);
    add_part<format, 1>(sums, x, stride, w);
    if (format != Format::kInt4) continue;
    add_part<format, 2>(sums, x, stride, w);
    add_part<format, 3>(sums, x, stride, w);
  }
}

// The zero point that makes packed numbers signed.
INLAY_INLINE int middle_of(Format format) { return format == Format::kInt4 ? 8 : 128; }

// A group's scales of some vectors of outputs, and what comes off a sum for the zero points of
// unsigned numbers.
template <int Vecs>
struct Factors {
  VecF scales[Vecs];
  VecI zeros[Vecs];

  Factors(const QuantizedProduct& p, int64_t group, int64_t first) {
#pragma GCC unroll 8
    for (int v = 0; v < Vecs; ++v) {
      const int64_t column = first + v * kLanes, count = p.out_features - column;
      const int64_t at = group * p.out_features + column;
      scales[v] = load_any(p.scale_dtype, p.scale, at, count);
      zeros[v] = VecI{} + middle_of(p.format);
      if (!p.zero) continue;
      const VecF given = load_any(DType::kInt8, p.zero, at, count);
      zeros[v] = (VecI)_mm256_cvtps_epi32((__m256)given) + (p.format == Format::kInt8 ? 128 : 0);
    }
  }
  VecF scale(int v) const { return scales[v]; }
  VecI zero(int v, int32_t sum) const { return zeros[v] * sum; }
};

// The same of whole vectors of symmetric weights, whose scales are read where they are used.
template <class T>
struct SymmetricFactors {
  const T* from;
  int middle;

  SymmetricFactors(const QuantizedProduct& p, int64_t group, int64_t first)
      : from(static_cast<const T*>(p.scale) + group * p.out_features + first),
        middle(middle_of(p.format)) {}
  VecF scale(int v) const { return load(from + v * kLanes); }
  VecI zero(int, int32_t sum) const { return (VecI{} + sum) * middle; }  // of any sum: NaN's too
};

constexpr int64_t kGroupsAhead = 8;

// A group's scales are far from those of the group before: the CPU does not see them coming. Behind
// the last group come those of the next block.
INLAY_INLINE void prefetch_scales(const QuantizedProduct& p, int64_t group, int64_t column) {
  const int64_t groups = p.in_features / p.group_size;
  if (group >= groups) {
    group = group - groups < groups ? group - groups : groups - 1;
    column += kCodeBlock;
  }
  const int size = p.scale_dtype == DType::kFloat32 ? 4 : 2;
  __builtin_prefetch(static_cast<const char*>(p.scale) + (group * p.out_features + column) * size);
}

// Sums of a block's vectors [first, first + Vecs), of integer activations.
template <int Count, int Vecs>
INLAY_NOINLINE void multiply_integers(const QuantizedProduct& p, int64_t row, int64_t block,
                                      int first, VecF (*to)[kBlockVecs]) {
  constexpr auto format = Format::kIntegers;
  const uint8_t* w = p.codes + block * inlay::block_bytes(format, p.in_features) + first * 32;
  constexpr int64_t inputs = inlay::tile_inputs(format);
  __m256i sums[Count][Vecs] = {};
  add_tiles<format>(sums, p.x + row * p.x_stride, p.x_stride, w,
                    (p.in_features + inputs - 1) / inputs);
#pragma GCC unroll 8
  for (int r = 0; r < Count; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < Vecs; ++v) to[r][first + v] = (VecF)sums[r][v];
}

// The same, of weight-only formats.
template <Format format, class F, int Count, int Vecs>
INLAY_NOINLINE void multiply_groups(const QuantizedProduct& p, int64_t row, int64_t block,
                                    int first, VecF (*to)[kBlockVecs]) {
  const int64_t stride = p.x_stride, size = segment_inputs(p.group_size);
  constexpr int64_t inputs = inlay::tile_inputs(format);
  const char* x = p.x + row * stride;
  const char* segments = x + plane_bytes(p.in_features);
  const uint8_t* w = p.codes + block * inlay::block_bytes(format, p.in_features) + first * 32;
  VecF totals[Count][Vecs] = {};
  for (int64_t group = 0, k = 0; k < p.in_features; ++group) {
    const F f(p, group, block * kCodeBlock + first * kLanes);
    prefetch_scales(p, group + kGroupsAhead, block * kCodeBlock + first * kLanes);
    for (const int64_t group_end = k + p.group_size; k < group_end; segments += sizeof(Segment)) {
      const int64_t end = k + size < group_end ? k + size : group_end;
      const int64_t tiles = (end - k + inputs - 1) / inputs;
      __m256i sums[Count][Vecs] = {};
      add_tiles<format>(sums, x + k * 2, stride, w, tiles);
#pragma GCC unroll 8
      for (int r = 0; r < Count; ++r) {
        Segment s;
        memcpy(&s, segments + r * stride, sizeof s);
#pragma GCC unroll 8
        for (int v = 0; v < Vecs; ++v) {
          const VecI n = (VecI)sums[r][v] - f.zero(v, s.sum);
          totals[r][v] += __builtin_convertvector(n, VecF) * (f.scale(v) * s.unit);
        }
      }
      w += tiles * kTileBytes;
      k = end;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Count; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < Vecs; ++v) to[r][first + v] = totals[r][v];
}

template <Format format, int Count, int Vecs>
INLAY_INLINE void multiply_vectors(const QuantizedProduct& p, int64_t row, int64_t block, int first,
                                   VecF (*to)[kBlockVecs]) {
  const bool plain = !p.zero && (block + 1) * kCodeBlock <= p.out_features;
  if (format == Format::kIntegers)
    multiply_integers<Count, Vecs>(p, row, block, first, to);
  else if (plain && p.scale_dtype == DType::kBFloat16)
    multiply_groups<format, SymmetricFactors<BFloat16>, Count, Vecs>(p, row, block, first, to);
  else if (plain && p.scale_dtype == DType::kFloat32)
    multiply_groups<format, SymmetricFactors<float>, Count, Vecs>(p, row, block, first, to);
  else
    multiply_groups<format, Factors<Vecs>, Count, Vecs>(p, row, block, first, to);
}

// Few rows take a block at once, so that the weights stream by line by line.
template <Format format, int Count>
void multiply_block(const QuantizedProduct& p, int64_t row, int64_t block) {
  constexpr int step = Count <= 2 ? kBlockVecs : kBlockVecs / 2;
  VecF totals[Count][kBlockVecs];
  for (int first = 0; first < kBlockVecs; first += step)
    multiply_vectors<format, Count, step>(p, row, block, first, totals);
#pragma GCC unroll 8
  for (int r = 0; r < Count; ++r) finish_row(p, row + r, block, totals[r]);
}

template <Format format>
void multiply_part(const QuantizedProduct& p, const Part& part) {
  static constexpr void (*by_rows[kRows])(const QuantizedProduct&, int64_t, int64_t) = {
      multiply_block<format, 1>, multiply_block<format, 2>, multiply_block<format, 3>,
      multiply_block<format, 4>, multiply_block<format, 5>, multiply_block<format, 6>};
  for (int64_t block = part.first_block; block < part.last_block; ++block)
    over_rows<kRows>(part.first_row, part.last_row, [&](int64_t row, int count) {
      by_rows[count - 1](p, row, block);
    });
}

void multiply(const QuantizedProduct& p, const Part& part) {
  switch (p.format) {
    case Format::kIntegers: return multiply_part<Format::kIntegers>(p, part);
    case Format::kInt8: return multiply_part<Format::kInt8>(p, part);
    case Format::kInt4: return multiply_part<Format::kInt4>(p, part);
    case Format::kFloat8: return;  // not taken
  }
}

}  // namespace

namespace inlay::INLAY_ISA {
extern const ProductKernels product_kernels = {takes, row_bytes, prepare, multiply};
}
