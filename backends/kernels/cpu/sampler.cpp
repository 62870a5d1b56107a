// One row of logits -> a token: runtime/draws.py's draw_row, which explains it, in vectors.
//
// The noise is that of runtime/noise.py, bit by bit; weights are exp's within 2 ulp, and their sums
// are float64.
#include "sampler.h"
#include "vec.h"

#include <math.h>
#include <stdlib.h>

namespace {

using inlay::DrawArgs;
using inlay::Drawn;

constexpr float kInf = __builtin_inff();
constexpr int kBlocks = 32, kFew = 256;  // as draws.py's BLOCKS and FEW
constexpr int kStride = 4 * kLanes;      // tokens that are looked at together where few matter
alignas(64) constexpr int32_t kCount[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

typedef double VecD __attribute__((vector_size(kLanes * 8)));

INLAY_INLINE int64_t padded(int64_t n) { return (n + kStride - 1) / kStride * kStride; }
INLAY_INLINE float reduce_min(VecF v) { return -reduce_max(-v); }

// Tokens to choose from, padded to kStride with logits of -inf. ids: null where they are 0, 1, ...
struct Set {
  float *logits, *weights, *times;
  int32_t* ids;
  int64_t count;

  Set(float* memory, int64_t size)
      : logits(memory), weights(logits + padded(size)), times(weights + padded(size)),
        ids(nullptr), count(size) {}
  VecI tokens(int64_t i) const {
    return ids ? load_as<VecI>(ids + i) : load_as<VecI>(kCount) + (int32_t)i;
  }
};

int64_t scratch_floats(int64_t size) { return 7 * padded(size); }

// The largest, NaN if any is; `keep`: the row goes to `to` on the way, padded.
template <bool keep, class T>
float find_peak(const T* from, int64_t size, float* to) {
  VecF top = splat(-kInf), odd = VecF{};
  for (int64_t i = 0; i < size; i += kLanes) {
    VecF x;
    if (i + kLanes <= size) {
      x = load(from + i);
    } else {
      for (int j = 0; j < kLanes; ++j) {
        T one[kLanes] = {from[i + j < size ? i + j : i]};
        x[j] = i + j < size ? load(one)[0] : -kInf;
      }
    }
    if (keep) store(to + i, x);
    top = max(top, x);
    odd = x == x ? odd : splat(1.f);
  }
  if (keep)
    for (int64_t i = (size + kLanes - 1) / kLanes * kLanes; i < padded(size); ++i) to[i] = -kInf;
  return reduce_max(odd) > 0 ? NAN : reduce_max(top);
}

// Where a value is first; it is there.
template <class T>
int64_t first_of(const T* values, int64_t count, float wanted) {
  int64_t i = 0;
  for (; i + kStride <= count; i += kStride) {
    VecF hit = VecF{};
    for (int j = 0; j < kStride; j += kLanes)
      hit = load(values + i + j) == wanted ? splat(1.f) : hit;
    if (reduce_max(hit) > 0) break;
  }
  for (; i < count; ++i) {
    T one[kLanes] = {values[i]};
    if (load(one)[0] == wanted) return i;
  }
  return 0;
}

// Logits relative to the peak over the temperature.
void scale_row(Set& set, const DrawArgs& args, float peak) {
  for (int64_t i = 0; i < padded(set.count); i += kLanes) {
    VecF x = load(set.logits + i) - peak;
    if (args.temperature != 1.f) x /= args.temperature;
    store(set.logits + i, x < args.log_min_p ? splat(-kInf) : x);
  }
}

double weigh(Set& set) {
  VecD sum = {};
  for (int64_t i = 0; i < padded(set.count); i += kLanes) {
    const VecF weight = exp_nonpositive(load(set.logits + i));
    store(set.weights + i, weight);
    sum += __builtin_convertvector(weight, VecD);
  }
  double total = 0;
  for (int j = 0; j < kLanes; ++j) total += sum[j];
  return total;
}

double weight_above(const Set& set, float logit) {
  VecD sum = {};
  for (int64_t i = 0; i < padded(set.count); i += kLanes) {
    const VecF weight = load(set.logits + i) > logit ? load(set.weights + i) : VecF{};
    sum += __builtin_convertvector(weight, VecD);
  }
  double total = 0;
  for (int j = 0; j < kLanes; ++j) total += sum[j];
  return total;
}

// noise.py's uniforms: the hash lowbias32 with the key's halves.
INLAY_INLINE VecF uniforms(VecI tokens, uint32_t low, uint32_t high) {
  VecU h = (VecU)tokens + low;
  h ^= h >> 16;
  h *= 0x7FEB352Du;
  h ^= h >> 15;
  h ^= high;
  h *= 0x846CA68Bu;
  h ^= h >> 16;
  h = (h & 0x7FFFFFFFu) | 1u;
  return __builtin_convertvector((VecI)h, VecF) * 0x1p-31f;
}

// times = uniform / weight; the least of them.
float set_times(Set& set, int64_t key) {
  const uint32_t low = (uint32_t)key, high = (uint32_t)((uint64_t)key >> 32);
  VecF least = splat(kInf);
  for (int64_t i = 0; i < padded(set.count); i += kLanes) {
    const VecF time = uniforms(set.tokens(i), low, high) / load(set.weights + i);
    store(set.times + i, time);
    least = time < least ? time : least;
  }
  return reduce_min(least);
}

// Passes over what is no likelier than this; the least time of the rest.
float pass_over(Set& set, float logit) {
  VecF least = splat(kInf);
  for (int64_t i = 0; i < padded(set.count); i += kLanes) {
    VecF time = load(set.times + i);
    time = load(set.logits + i) <= logit ? splat(kInf) : time;
    store(set.times + i, time);
    least = time < least ? time : least;
  }
  return reduce_min(least);
}

// The token of a set that wins the race of draws.py. allowed: what is likelier than a token weighs
// less, if it may win.
int64_t race(Set& set, int64_t key, double allowed) {
  const auto is_in = [&](int64_t i) {
    return allowed == (double)kInf || weight_above(set, set.logits[i]) < allowed;
  };
  float least = set_times(set, key);
  int64_t first = first_of(set.times, set.count, least);
  while (!is_in(first)) {
    least = pass_over(set, set.logits[first]);
    first = first_of(set.times, set.count, least);
  }
  const auto uniform = [&](int64_t i) {
    const VecI token = VecI{} + (int32_t)(set.ids ? set.ids[i] : i);
    return (double)uniforms(token, (uint32_t)key, (uint32_t)((uint64_t)key >> 32))[0];
  };
  const double v = uniform(first), delay = v < 1 ? -log1p(-v) : (double)kInf;
  const float bound = (float)(delay / (double)set.weights[first] * (1 + 1e-4));
  int64_t best = first;
  double highest = -(double)kInf;
  for (int64_t i = 0; i < padded(set.count); i += kStride) {
    VecF near = splat(kInf);
    for (int j = 0; j < kStride; j += kLanes) near = -max(-near, -load(set.times + i + j));
    if (reduce_min(near) > bound) continue;
    for (int64_t at = i; at < i + kStride && at < set.count; ++at) {
      if (!(set.times[at] <= bound)) continue;
      const double reached = (double)set.logits[at] - log(-log1p(-uniform(at)));
      if (reached > highest && (at == first || is_in(at))) highest = reached, best = at;
    }
  }
  return set.ids ? set.ids[best] : best;
}

int descending(const void* a, const void* b) {
  const float x = *(const float*)a, y = *(const float*)b;
  return x < y ? 1 : x > y ? -1 : 0;
}

// The k-th largest of these, which are put in another order. (Hoare's selection.)
float kth_largest(float* values, int64_t count, int64_t k) {
  int64_t lo = 0, hi = count - 1, target = k - 1;
  while (hi - lo > 32) {
    const float a = values[lo], b = values[(lo + hi) / 2], c = values[hi];
    const float pivot = a > b ? (b > c ? b : a > c ? c : a) : (a > c ? a : b > c ? c : b);
    int64_t i = lo, j = hi;
    while (i <= j) {
      while (values[i] > pivot) ++i;
      while (values[j] < pivot) --j;
      if (i <= j) {
        const float swapped = values[i];
        values[i++] = values[j];
        values[j--] = swapped;
      }
    }
    if (target <= j) hi = j;
    else if (target >= i) lo = i;
    else return values[target];
  }
  qsort(values + lo, hi - lo + 1, sizeof(float), descending);
  return values[target];
}

// From which logit on there are few tokens, at least kFew; -inf where the vocabulary is small.
float few_from(const Set& set, float* maxima) {
  const int64_t size = set.count / kBlocks;
  if (size < 2 * kFew) return -kInf;
  for (int64_t i = 0; i < size; ++i) maxima[i] = set.logits[i];
  for (int b = 1; b < kBlocks; ++b) {
    const float* block = set.logits + b * size;
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes)
      store(maxima + i, max(load(maxima + i), load(block + i)));
    for (; i < size; ++i) maxima[i] = block[i] > maxima[i] ? block[i] : maxima[i];
  }
  return kth_largest(maxima, size, kFew);
}

// The tokens of at least this logit.
Set keep_from(const Set& set, float least, float* memory) {
  Set kept(memory, set.count);
  kept.ids = (int32_t*)(kept.times + padded(set.count));
  int64_t count = 0;
  for (int64_t i = 0; i < padded(set.count); i += kStride) {
    VecF top = splat(-kInf);
    for (int j = 0; j < kStride; j += kLanes) top = max(top, load(set.logits + i + j));
    if (reduce_max(top) < least) continue;
    for (int64_t at = i; at < i + kStride && at < set.count; ++at) {
      if (set.logits[at] < least) continue;
      kept.logits[count] = set.logits[at];
      kept.ids[count++] = (int32_t)(set.ids ? set.ids[at] : at);
    }
  }
  kept.count = count;
  for (int64_t i = count; i < padded(count); ++i) kept.logits[i] = -kInf, kept.ids[i] = 0;
  return kept;
}

// The top-k set, ties of its last with it. memory: where it goes.
Set top_k_set(const Set& set, int64_t top_k, float* memory) {
  const int64_t k = top_k < set.count ? top_k : set.count;
  float least = few_from(set, memory);
  Set few = keep_from(set, least, memory);
  if (few.count < k) few = keep_from(set, -kInf, memory);
  memcpy(few.weights, few.logits, few.count * sizeof(float));
  least = kth_largest(few.weights, few.count, k);
  int64_t count = 0;
  for (int64_t i = 0; i < few.count; ++i)
    if (few.logits[i] >= least) few.logits[count] = few.logits[i], few.ids[count++] = few.ids[i];
  few.count = count;
  for (int64_t i = count; i < padded(count); ++i) few.logits[i] = -kInf, few.ids[i] = 0;
  return few;
}

template <class T>
Drawn draw_typed(const DrawArgs& args, float* scratch) {
  const T* logits = (const T*)args.logits;
  Set set(scratch, args.size);
  const float peak = args.is_greedy ? find_peak<false>(logits, args.size, scratch)
                                    : find_peak<true>(logits, args.size, set.logits);
  if (!(peak > -kInf && peak < kInf)) return {0, peak};
  if (args.is_greedy) return {first_of(logits, args.size, peak), peak};
  scale_row(set, args, peak);
  if (args.top_k > 0) set = top_k_set(set, args.top_k, scratch + 3 * padded(args.size));
  const double allowed = args.top_p * weigh(set);
  return {race(set, args.key, args.top_p < 1 ? allowed : (double)kInf), peak};
}

Drawn draw(const DrawArgs& args, float* scratch) {
  if (args.is_wide) return draw_typed<float>(args, scratch);
  return args.is_half ? draw_typed<Float16>(args, scratch) : draw_typed<BFloat16>(args, scratch);
}

}  // namespace

namespace inlay::INLAY_ISA {
extern const SamplerKernels sampler_kernels = {scratch_floats, draw};
}
