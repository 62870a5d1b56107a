// Linear layers over weights that were packed once, by us (small_matmul.h) or by oneDNN.
//
// A packed weight is opaque to torch's compilers, so the graph carries a handle: a small int64
// tensor whose memory is the head of a Packed and whose storage owns it.
#pragma once

#include "isa.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/List.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>

#if defined(INLAY_X86)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace inlay {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kMagic = 0x31304B4341504C49;  // "ILPACK01"
constexpr int64_t kHandleLength = 4;

template <class Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Signature>();
}

// 64-byte alignment, as compiled segments expect of their inputs: no copy of the handle is made.
struct alignas(64) Packed {
  int64_t magic = kMagic;
  int64_t address = reinterpret_cast<int64_t>(this);
  int64_t out_features, in_features;
  Tensor weight;
  bool onednn;
  const uint16_t* pairs = nullptr;  // the packed memory, where our kernel can read it
  const MatmulKernel* kernel = nullptr;
  int64_t fixed_rows = 0;           // of every product, see fix_rows; 0: as many as come
};

const Packed& resolve(const Tensor& handle) {
  const int64_t* head = handle.scalar_type() == at::kLong && handle.numel() == kHandleLength
                            ? handle.const_data_ptr<int64_t>()
                            : nullptr;
  TORCH_CHECK(head && head[0] == kMagic, "inlay_cpu::linear: handle must be a tensor made by "
              "inlay_cpu::pack_linear, got ", handle.scalar_type(), " ", handle.sizes());
  TORCH_CHECK(head[1] == reinterpret_cast<int64_t>(head), "inlay_cpu::linear: this handle is a "
              "copy of another; pass the tensor that inlay_cpu::pack_linear returned, or pack the "
              "weight again");
  return *reinterpret_cast<const Packed*>(head);
}

bool onednn_takes(at::ScalarType dtype) {
  static const bool bf16 = find_op<bool()>("mkldnn::_is_mkldnn_bf16_supported").call();
  static const bool fp16 = find_op<bool()>("mkldnn::_is_mkldnn_fp16_supported").call();
  return dtype == at::kFloat || (dtype == at::kBFloat16 && bf16) || (dtype == at::kHalf && fp16);
}

// Put packed memory on huge pages where the kernel can (Linux 6.1): reading a weight of many MB
// through 4 KB pages costs a third of the bandwidth in address translation. Failure costs only that.
void use_huge_pages(int64_t address, int64_t num_bytes) {
#if defined(__linux__)
  constexpr int64_t kHugePage = 2 << 20;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, unknown to older headers
  const int64_t first = (address + kHugePage - 1) / kHugePage * kHugePage;
  const int64_t last = (address + num_bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, kCollapse);
#endif
}

// Memory for packed weights, many in a row: those of less than a few MB get huge pages too, and no
// page is read for its half. It is given back when the last weight in it is gone.
struct Slab {
  explicit Slab(int64_t bytes) : size(bytes), memory(std::aligned_alloc(kAlignment, bytes)) {
    TORCH_CHECK(memory, "inlay_cpu: no memory for ", bytes, " bytes of packed weights");
#if defined(__linux__)
    madvise(memory, size, MADV_HUGEPAGE);
#endif
  }
  ~Slab() { std::free(memory); }
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;

  static constexpr int64_t kAlignment = 2 << 20;
  int64_t size, used = 0;
  void* memory;
};

Tensor allocate_packed(int64_t num_bytes) {
  constexpr int64_t kSlab = 32 << 20, kLine = 64;
  static std::mutex mutex;
  static std::weak_ptr<Slab> last;
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<Slab> slab = last.lock();
  if (!slab || slab->size - slab->used < num_bytes) {
    const int64_t least = (num_bytes + Slab::kAlignment - 1) / Slab::kAlignment * Slab::kAlignment;
    slab = std::make_shared<Slab>(std::max(kSlab, least));
    last = slab;
  }
  void* at = static_cast<char*>(slab->memory) + slab->used;
  slab->used += (num_bytes + kLine - 1) / kLine * kLine;
  return at::from_blob(at, {num_bytes}, [slab](void*) {}, at::TensorOptions(at::kByte));
}

constexpr int64_t kBytesPerTask = 1 << 16;  // less is not worth waking a thread

template <class Body>
void parallel_over_blocks(int64_t out_features, int64_t in_features, const Body& body) {
  const int64_t block_bytes = kSmallMatmulBlock * in_features * int64_t{sizeof(uint16_t)};
  at::parallel_for(0, out_features / kSmallMatmulBlock,
                   std::max<int64_t>(1, kBytesPerTask / block_bytes), body);
}

// Calls body(first, last) for pieces of [0, count), at least `grain` large each. Whoever is free takes
// the next: pieces do not take alike long, nor are threads alike fast.
template <class Body>
void share(int64_t count, int64_t grain, const Body& body) {
  constexpr int64_t kPieces = 16;  // of a thread: what the last one to end keeps others waiting for
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), (count + grain - 1) / grain);
  const int64_t piece = std::max(grain, count / (threads * kPieces + 1));
  std::atomic<int64_t> next = 0;
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    if (end - begin == threads) return body(0, count);  // nobody to share with
    for (int64_t first; (first = next.fetch_add(piece)) < count;)
      body(first, std::min(count, first + piece));
  });
}

// Calls body(job, first, last) for all blocks of all jobs, some blocks at a time.
template <class Body>
void share_blocks(int64_t jobs, int64_t blocks, int64_t block_bytes, const Body& body) {
  if (jobs == 0) return;
  share(jobs * blocks, std::max<int64_t>(1, kBytesPerTask / block_bytes),
        [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last;) {
      const int64_t block = unit % blocks, end = std::min(blocks, block + last - unit);
      body(unit / blocks, block, end);
      unit += end - block;
    }
  });
}

// Whether this CPU has AMX's bfloat16 products, which oneDNN uses and we do not.
bool has_bfloat16_tiles() {
#if defined(INLAY_X86)
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & 1u << 22);
#else
  return false;
#endif
}

bool whole_blocks(const Tensor& weight) {
  return weight.size(0) % kSmallMatmulBlock == 0 && weight.size(1) % 2 == 0;
}

// Whether packed holds weight [N, K] as small_matmul.h says, for the blocks [first, last).
bool is_pairs(const uint16_t* packed, const uint16_t* weight, int64_t in_features, int64_t first,
              int64_t last) {
  uint16_t differ = 0;
  const uint16_t* at = packed + first * kSmallMatmulBlock * in_features;
  for (int64_t block = first; block < last && !differ; block++)
    for (int64_t k = 0; k < in_features; k += 2)
      for (int64_t n = 0; n < kSmallMatmulBlock; n++, at += 2) {
        const uint16_t* row = weight + (block * kSmallMatmulBlock + n) * in_features + k;
        differ |= (at[0] ^ row[0]) | (at[1] ^ row[1]);
      }
  return !differ;
}

// oneDNN's packed memory, if our kernel knows its layout. oneDNN's layouts are its own affair and
// differ between CPUs: every element is compared with the weight.
const uint16_t* readable_pairs(const Packed& p, const Tensor& weight) {
  static const auto data_ptr = find_op<int64_t(const Tensor&)>("mkldnn::data_ptr");
  static const auto nbytes = find_op<int64_t(const Tensor&)>("mkldnn::_nbytes");
  if (!p.onednn || weight.scalar_type() != at::kBFloat16 || !p.kernel || !whole_blocks(weight) ||
      nbytes.call(p.weight) != static_cast<int64_t>(weight.nbytes()))
    return nullptr;
  const auto* packed = reinterpret_cast<const uint16_t*>(data_ptr.call(p.weight));
  const auto* plain = static_cast<const uint16_t*>(weight.const_data_ptr());
  std::atomic<bool> equal = true;
  parallel_over_blocks(p.out_features, p.in_features, [&](int64_t first, int64_t last) {
    if (!is_pairs(packed, plain, p.in_features, first, last)) equal = false;
  });
  return equal ? packed : nullptr;
}

// Whether our own products are chosen: always where oneDNN has no AMX to offer (measured on Zen 4
// from 1 to 1,024 rows), then fixed or not, since they sum each row in one order; else up to `few`.
bool takes_rows(const Packed& p, int64_t rows, int64_t few) {
  return p.pairs && (!p.onednn || !has_bfloat16_tiles() || (!p.fixed_rows && rows <= few));
}

constexpr int64_t kRowStep = 12;  // a multiple of what kernels take at a time

// Rows that go together: as many as leave room in a core's L2 for the weights that pass by.
int64_t rows_at_once(int64_t row_bytes) {
  constexpr int64_t kBytes = 384 << 10, kMost = 192;
  return std::clamp<int64_t>(kBytes / row_bytes / kRowStep * kRowStep, 2 * kRowStep, kMost);
}

// Parts of rows that go together, alike large but for a kernel's step.
struct RowParts {
  int64_t rows, count;

  RowParts(int64_t num_rows, int64_t row_bytes) : rows(num_rows) {
    const int64_t most = rows_at_once(row_bytes);
    count = (rows + most - 1) / most;
  }
  int64_t begin(int64_t part) const {
    const int64_t steps = (rows + kRowStep - 1) / kRowStep;
    return std::min(rows, steps * part / count * kRowStep);
  }
};

// Rows of x as a kernel takes them.
struct MatmulRows {
  Tensor memory;
  int64_t stride;  // in bytes

  const char* data() const { return static_cast<const char*>(memory.const_data_ptr()); }
};

MatmulRows widen_rows(const Tensor& x) {
  constexpr int64_t kLine = 64 / sizeof(float);
  const Tensor from = x.contiguous();
  const int64_t width = x.size(-1), rows = x.numel() / width;
  // An odd number of cache lines: rows of a power of two would compete for a few places in L1.
  const int64_t stride = ((width + kLine - 1) / kLine | 1) * kLine;
  const Tensor wide = at::empty({rows, stride}, x.options().dtype(at::kFloat));
  const auto* bits = static_cast<const uint16_t*>(from.const_data_ptr());
  auto* to = static_cast<uint32_t*>(wide.mutable_data_ptr());
  at::parallel_for(0, rows, std::max<int64_t>(1, kBytesPerTask / stride),
                   [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      for (int64_t k = 0; k < width; k++)
        to[row * stride + k] = static_cast<uint32_t>(bits[row * width + k]) << 16;
      if (width % 2) to[row * stride + width] = 0;
    }
  });
  return {wide, stride * int64_t{sizeof(float)}};
}

// Contiguous rows of x, apart by a number of bytes that puts them into different places of L1.
MatmulRows spread_rows(const Tensor& x) {
  const int64_t width = x.size(-1), rows = x.numel() / width, size = x.element_size();
  const int64_t line = 64 / size;
  if (rows <= 4 || width * size % 1024) return {x.contiguous(), width * size};
  Tensor spread = at::empty({rows, width + line}, x.options()).narrow(1, 0, width);
  return {spread.copy_(x.reshape({-1, width})), (width + line) * size};
}

MatmulRows matmul_rows(const Packed& p, const Tensor& x) {
  return p.kernel->widened ? widen_rows(x) : spread_rows(x);
}

// How many rows there are to compute: the last ones may repeat the one before them, as padding does.
// No product depends on the other rows.
int64_t distinct_rows(const void* rows, int64_t count, int64_t row_bytes, int64_t stride) {
  const auto* last = static_cast<const char*>(rows) + (count - 1) * stride;
  while (count > 1 && !std::memcmp(last, last - stride, row_bytes)) count--, last -= stride;
  return count;
}

// The rows that were not computed.
void repeat_last_row(void* rows, int64_t computed, int64_t count, int64_t row_bytes) {
  auto* last = static_cast<char*>(rows) + (computed - 1) * row_bytes;
  for (int64_t row = computed; row < count; row++)
    std::memcpy(last + (row + 1 - computed) * row_bytes, last, row_bytes);
}

int64_t num_pair_blocks(int64_t out_features) {
  return (out_features + kSmallMatmulBlock - 1) / kSmallMatmulBlock;
}

int64_t pair_block_bytes(int64_t in_features) {
  return kSmallMatmulBlock * ((in_features + 1) / 2) * 4;
}

Tensor multiply_rows(const Packed& p, const Tensor& x, const OptionalTensor& bias) {
  auto shape = x.sizes().vec();
  shape.back() = p.out_features;
  Tensor y = at::empty(shape, x.options());
  const int64_t num_rows = x.numel() / p.in_features;
  if (num_rows == 0) return y;
  const MatmulRows rows = matmul_rows(p, x);
  const int64_t row_bytes = p.in_features * (p.kernel->widened ? sizeof(float) : sizeof(uint16_t));
  const int64_t computed = distinct_rows(rows.data(), num_rows, row_bytes, rows.stride);
  const Tensor flat_bias = bias ? bias->contiguous() : Tensor();
  const auto* b = bias ? static_cast<const uint16_t*>(flat_bias.const_data_ptr()) : nullptr;
  const SmallMatmul product{rows.data(), p.pairs, b, static_cast<uint16_t*>(y.mutable_data_ptr()),
                            computed, p.in_features, p.out_features, rows.stride};
  const RowParts parts(computed, rows.stride);
  share_blocks(parts.count, num_pair_blocks(p.out_features), pair_block_bytes(p.in_features),
               [&](int64_t part, int64_t first, int64_t last) {
    p.kernel->multiply(product, parts.begin(part), parts.begin(part + 1), first, last);
  });
  repeat_last_row(product.y, computed, num_rows, p.out_features * int64_t{sizeof(uint16_t)});
  return y;
}

// Whether all products with this weight are our own, so that it need not be oneDNN's to read.
bool packs_pairs(const Tensor& weight, const MatmulKernel* kernel) {
  if (weight.scalar_type() != at::kBFloat16 || !kernel) return false;
  return kernel->widened || (!has_bfloat16_tiles() && whole_blocks(weight));
}

Tensor pack_pairs(const Tensor& weight) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const int64_t blocks = num_pair_blocks(outputs), block_bytes = pair_block_bytes(inputs);
  const Tensor memory = allocate_packed(blocks * block_bytes);
  auto* to = static_cast<char*>(memory.mutable_data_ptr());
  const auto* from = static_cast<const char*>(weight.const_data_ptr());
  at::parallel_for(0, blocks, std::max<int64_t>(1, kBytesPerTask / block_bytes),
                   [&](int64_t first, int64_t last) {
    if (!whole_blocks(weight)) std::memset(to + first * block_bytes, 0, (last - first) * block_bytes);
    const int64_t end = std::min(outputs, last * kSmallMatmulBlock);
    for (int64_t n = first * kSmallMatmulBlock; n < end; n++) {
      const char* row = from + n * inputs * 2;
      char* at = to + n / kSmallMatmulBlock * block_bytes + n % kSmallMatmulBlock * 4;
      for (int64_t pair = 0; pair < inputs / 2; pair++)
        std::memcpy(at + pair * kSmallMatmulBlock * 4, row + pair * 4, 4);
      if (inputs % 2) std::memcpy(at + inputs / 2 * kSmallMatmulBlock * 4, row + inputs * 2 - 2, 2);
    }
  });
  use_huge_pages(reinterpret_cast<int64_t>(to), memory.numel());
  return memory.view(at::kBFloat16);
}

std::unique_ptr<Packed> make_packed(const Tensor& weight) {
  const auto dtype = weight.scalar_type();
  TORCH_CHECK(weight.dim() == 2 && weight.numel() > 0, "inlay_cpu::pack_linear: weight must be "
              "[out_features, in_features], got ", weight.sizes());
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
              "inlay_cpu::pack_linear: weight must be float32, bfloat16 or float16, got ", dtype);
  static const auto reorder =
      find_op<Tensor(const Tensor&, std::optional<c10::SymInt>)>("mkldnn::_reorder_linear_weight");
  auto packed = std::make_unique<Packed>();
  packed->out_features = weight.size(0);
  packed->in_features = weight.size(1);
  packed->onednn = onednn_takes(dtype);
  packed->kernel = isa()->matmul;
  const Tensor source = weight.detach().contiguous();
  if (packs_pairs(weight, packed->kernel)) {
    packed->onednn = false;
    packed->weight = pack_pairs(source);
    packed->pairs = static_cast<const uint16_t*>(packed->weight.const_data_ptr());
    return packed;
  }
  packed->weight = packed->onednn ? reorder.call(source, std::nullopt)
                   : source.is_same(weight) || source.is_alias_of(weight) ? source.clone()
                                                                          : source;
  if (packed->onednn) {
    static const auto data_ptr = find_op<int64_t(const Tensor&)>("mkldnn::data_ptr");
    static const auto nbytes = find_op<int64_t(const Tensor&)>("mkldnn::_nbytes");
    use_huge_pages(data_ptr.call(packed->weight), nbytes.call(packed->weight));
  }
  packed->pairs = readable_pairs(*packed, source);
  return packed;
}

template <class P>
Tensor make_handle(std::unique_ptr<P> packed) {
  int64_t* head = &packed->magic;
  auto free = [owner = packed.release()](void*) { delete owner; };
  return at::from_blob(head, {kHandleLength}, free, at::TensorOptions(at::kLong));
}

Tensor pack_linear(const Tensor& weight) { return make_handle(make_packed(weight)); }

Tensor multiply_whole(const Packed& p, const Tensor& x, const OptionalTensor& bias) {
  if (!p.onednn) return at::linear(x, p.weight, bias);
  using Pointwise = Tensor(const Tensor&, const Tensor&, const OptionalTensor&,
                           c10::string_view, c10::List<std::optional<at::Scalar>>,
                           std::optional<c10::string_view>);
  static const auto pointwise = find_op<Pointwise>("mkldnn::_linear_pointwise");
  static const c10::List<std::optional<at::Scalar>> no_scalars;
  return pointwise.call(x, p.weight, bias, "none", no_scalars, "");
}

// Products of one number of rows, the last one's padded: libraries choose a kernel, and with it an
// order of summation, by that number. What the padding holds is not read.
Tensor multiply_fixed(const Packed& p, const Tensor& x, const OptionalTensor& bias) {
  auto shape = x.sizes().vec();
  shape.back() = p.out_features;
  Tensor y = at::empty(shape, x.options());
  const Tensor from = x.reshape({-1, p.in_features}), to = y.view({-1, p.out_features});
  for (int64_t begin = 0; begin < from.size(0); begin += p.fixed_rows) {
    const int64_t count = std::min(p.fixed_rows, from.size(0) - begin);
    Tensor rows = from.narrow(0, begin, count);
    if (count < p.fixed_rows) {
      const Tensor padded = at::zeros({p.fixed_rows, p.in_features}, x.options());
      padded.narrow(0, 0, count).copy_(rows);
      rows = padded;
    }
    to.narrow(0, begin, count).copy_(multiply_whole(p, rows, bias).narrow(0, 0, count));
  }
  return y;
}

Tensor multiply(const Packed& p, const Tensor& x, const OptionalTensor& bias) {
  const int64_t num_rows = x.numel() / p.in_features;
  if (takes_rows(p, num_rows, 4)) return multiply_rows(p, x, bias);
  return p.fixed_rows ? multiply_fixed(p, x, bias) : multiply_whole(p, x, bias);
}

Tensor linear(const Tensor& x, const Tensor& handle, const OptionalTensor& bias,
              int64_t out_features) {
  const Packed& p = resolve(handle);
  TORCH_CHECK(x.dim() > 0 && x.size(-1) == p.in_features && out_features == p.out_features,
              "inlay_cpu::linear: the packed weight is [", p.out_features, ", ", p.in_features,
              "], got x ", x.sizes(), " and out_features ", out_features);
  TORCH_CHECK(x.scalar_type() == p.weight.scalar_type(), "inlay_cpu::linear: x must have the "
              "weight's dtype ", p.weight.scalar_type(), ", got ", x.scalar_type());
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == p.out_features &&
                        bias->scalar_type() == x.scalar_type()),
              "inlay_cpu::linear: bias must be [", p.out_features, "] and ", x.scalar_type(),
              " like x, got ", bias ? bias->sizes() : at::IntArrayRef(), " ",
              bias ? bias->scalar_type() : x.scalar_type());
  return multiply(p, x, bias);
}

}  // namespace
}  // namespace inlay
