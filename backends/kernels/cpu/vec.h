// One vector of floats, of the width that this translation unit is compiled for.
// Everything is static: attention.cpp is compiled once for each instruction set, and an inline
// function that the linker merged could bring AVX-512 code to a CPU without it. For the same
// reason neither file includes a C++ library header that has templates.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float VecF __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecH __attribute__((vector_size(kLanes * 2)));
typedef uint8_t VecB __attribute__((vector_size(kLanes)));

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };
struct Float8 { uint8_t bits; };  // e4m3fn: no infinities, NaN with all bits set
struct Int8 { int8_t value; };

#define INLAY_INLINE static inline __attribute__((always_inline))
#define INLAY_NOINLINE __attribute__((noinline))  // leaves all registers to an inner loop

template <class To, class From>
INLAY_INLINE To load_as(const From* p) {
  To v;
  memcpy(&v, p, sizeof(v));
  return v;
}

INLAY_INLINE VecF splat(float x) { return x - VecF{}; }  // x + 0 would cost an addition
INLAY_INLINE VecF max(VecF a, VecF b) { return a > b ? a : b; }

// sum += a * b. In assembly where registers are few, since GCC puts the sum into another register,
// runs out of them and keeps sums in memory.
INLAY_INLINE void add_product(VecF& sum, VecF a, VecF b) {
#if defined(__FMA__) && !defined(__AVX512F__)
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
#else
  sum += a * b;
#endif
}

// The two cache lines of a weight's next step but some, into L1: where only one of them is read in
// a pass, a CPU's own prefetcher does not follow.
INLAY_INLINE void prefetch_step(const void* weights) {
  constexpr int kAhead = 2048;
  __builtin_prefetch(static_cast<const char*>(weights) + kAhead);
  __builtin_prefetch(static_cast<const char*>(weights) + kAhead + 64);
}

INLAY_INLINE VecF load(const float* p) { return load_as<VecF>(p); }
INLAY_INLINE void store(float* p, VecF v) { memcpy(p, &v, sizeof(v)); }

INLAY_INLINE void store(BFloat16* p, VecF v) {
  VecU u = (VecU)v;
  VecU rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  VecH h = __builtin_convertvector(v == v ? rounded : (VecU{} + 0x7fc0), VecH);
  memcpy(p, &h, sizeof(h));
}

#if defined(__AVX512F__)
INLAY_INLINE VecF load(const BFloat16* p) {
  return (VecF)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
INLAY_INLINE VecF load(const Float16* p) {
  return (VecF)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
INLAY_INLINE void store(Float16* p, VecF v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
INLAY_INLINE float reduce_max(VecF v) { return _mm512_reduce_max_ps((__m512)v); }
#else
#if defined(__AVX2__)
INLAY_INLINE VecF load(const BFloat16* p) {
  return (VecF)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
INLAY_INLINE VecF load(const Float16* p) {
  return (VecF)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
INLAY_INLINE void store(Float16* p, VecF v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
INLAY_INLINE VecF load(const BFloat16* p) {
  return (VecF)(__builtin_convertvector(load_as<VecH>(p), VecU) << 16);
}
// After F. Giesen, "half_to_float" and "float_to_half_fast3_rtne" (public domain).
INLAY_INLINE VecF load(const Float16* p) {
  VecU h = __builtin_convertvector(load_as<VecH>(p), VecU);
  VecU sign = (h & 0x8000) << 16, magnitude = h & 0x7fff;
  VecU finite = (VecU)((VecF)(magnitude << 13) * 0x1p112f);
  VecU special = (magnitude << 13) | 0x7f800000;
  return (VecF)((magnitude >= 0x7c00 ? special : finite) | sign);
}
INLAY_INLINE void store(Float16* p, VecF v) {
  VecU u = (VecU)v, sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  VecU normal = (magnitude + 0xc8000fff + ((magnitude >> 13) & 1)) >> 13;
  VecU subnormal = (VecU)((VecF)magnitude + 0.5f) - 0x3f000000;
  VecU special = magnitude > 0x7f800000 ? (VecU{} + 0x7e00) : (VecU{} + 0x7c00);
  VecU result = magnitude < 0x38800000 ? subnormal : normal;
  result = magnitude >= 0x47800000 ? special : result;
  VecH h = __builtin_convertvector(result | sign, VecH);
  memcpy(p, &h, sizeof(h));
}
#endif
INLAY_INLINE float reduce_max(VecF v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}
#endif

// The values of e4m3 magnitudes in bits 20 to 26. Without denormal numbers, which a CPU may be told
// to take for zero: what has no leading one gets it, and loses it again.
INLAY_INLINE VecF float8_magnitudes(VecU m) {
  const VecF normal = (VecF)(m + (120u << 23)), small = (VecF)(m + (121u << 23)) - 0x1p-6f;
  return m < 0x00800000u ? small : normal;
}

INLAY_INLINE VecF float8_values(VecU u) {
  VecU sign = (u & 0x80) << 24, magnitude = u & 0x7f;
  VecU finite = (VecU)float8_magnitudes(magnitude << 20);
  return (VecF)((magnitude == 0x7f ? (VecU{} + 0x7fc00000) : finite) | sign);
}

INLAY_INLINE VecF load(const Int8* p) {
  const VecI wide = (VecI)__builtin_convertvector(load_as<VecB>(p), VecU);
  return __builtin_convertvector(wide << 24 >> 24, VecF);
}
INLAY_INLINE VecF load(const Float8* p) {
  return float8_values(__builtin_convertvector(load_as<VecB>(p), VecU));
}

// How many elements lie side by side that one sum takes one after the other: tokens' values, or
// elements of a key. Pairs are what dot products of bfloat16 want.
template <class T>
constexpr int kPair = 1;
template <>
constexpr int kPair<BFloat16> = 2;
template <>
constexpr int kPair<Float8> = 2;
template <>
constexpr int kPair<Int8> = 2;

// The part-th of each of kLanes pairs (or singles).
INLAY_INLINE VecF load_part(const float* p, int) { return load(p); }
INLAY_INLINE VecF load_part(const Float16* p, int) { return load(p); }
INLAY_INLINE VecF load_part(const BFloat16* p, int part) {
  return (VecF)((load_as<VecU>(p) << (part ? 0 : 16)) & 0xffff0000u);
}
INLAY_INLINE VecF load_part(const Float8* p, int part) {
  return float8_values(__builtin_convertvector(load_as<VecH>(p), VecU) >> (8 * part) & 0xff);
}
INLAY_INLINE VecF load_part(const Int8* p, int part) {
  const VecI both = (VecI)__builtin_convertvector(load_as<VecH>(p), VecU);
  return __builtin_convertvector(both << (24 - 8 * part) >> 24, VecF);
}

template <class T>
INLAY_INLINE VecF load_first_part(const T* p, int part, int count) {
  T padded[kPair<T> * kLanes] = {};
  memcpy(padded, p, kPair<T> * count * sizeof(T));
  return load_part(padded, part);
}

template <class T>
INLAY_INLINE VecF load_first(const T* p, int count) {
  T padded[kLanes] = {};
  memcpy(padded, p, count * sizeof(T));
  return load(padded);
}

template <class T>
INLAY_INLINE void store_first(T* p, VecF v, int count) {
  T padded[kLanes];
  store(padded, v);
  memcpy(p, padded, count * sizeof(T));
}

// e^x for x <= 0, within 2 ulp; exactly 0 below -87.3, where float32 leaves its normal range.
// Range reduction and polynomial as in Cephes' expf.
INLAY_INLINE VecF exp_nonpositive(VecF x) {
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  VecF shifted = x * 1.44269504088896341f + magic;
  VecF n = shifted - magic;
  VecF r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  VecF y = splat(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.f;
  VecI exponent = (VecI)shifted << 23;
  y = (VecF)((VecI)y + exponent);
  return x < -87.3f ? VecF{} : y;
}

// tanh: Cephes' odd polynomial near 0, elsewhere through e^(-2|x|).
INLAY_INLINE VecF tanh_of(VecF x) {
  VecF a = x < 0.f ? -x : x;
  VecF e = exp_nonpositive(a * -2.f);
  VecF far = (1.f - e) / (1.f + e);
  VecF z = x * x;
  VecF y = splat(-5.70498872745e-3f);
  y = y * z + 2.06390887954e-2f;
  y = y * z - 5.37397155531e-2f;
  y = y * z + 1.33314422036e-1f;
  y = y * z - 3.33332819422e-1f;
  y = y * z * x + x;
  return a < 0.625f ? y : (x < 0.f ? -far : far);
}

}  // namespace
