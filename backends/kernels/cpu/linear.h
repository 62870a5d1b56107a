// Linear layers over weights that were packed once, by us (small_matmul.h) or by oneDNN.
//
// A packed weight is opaque to torch's compilers, so the graph carries a handle: a small int64
// tensor whose memory is the head of a Packed and whose storage owns it.
#pragma once

#include "small_matmul.h"

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
  const uint16_t* pairs = nullptr;  // the packed memory, where small_matmul can read it
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

// oneDNN's packed memory, if small_matmul knows its layout. oneDNN's layouts are its own affair and
// differ between CPUs: every element is compared with the weight.
const uint16_t* readable_pairs(const Packed& p, const Tensor& weight) {
  static const auto data_ptr = find_op<int64_t(const Tensor&)>("mkldnn::data_ptr");
  static const auto nbytes = find_op<int64_t(const Tensor&)>("mkldnn::_nbytes");
  if (!p.onednn || weight.scalar_type() != at::kBFloat16 || !small_matmul_supported() ||
      p.out_features % kSmallMatmulBlock || p.in_features % 2 ||
      nbytes.call(p.weight) != static_cast<int64_t>(weight.nbytes()))
    return nullptr;
  const auto* packed = reinterpret_cast<const uint16_t*>(data_ptr.call(p.weight));
  const auto* plain = static_cast<const uint16_t*>(weight.const_data_ptr());
  std::atomic<bool> equal = true;
  parallel_over_blocks(p.out_features, p.in_features, [&](int64_t first, int64_t last) {
    if (!small_matmul_layout(packed, plain, p.in_features, first, last)) equal = false;
  });
  return equal ? packed : nullptr;
}

// Whether our own products are chosen: always where oneDNN has no AMX to offer (measured on Zen 4
// from 1 to 1,024 rows), then fixed or not, since they sum each row in one order; else up to `few`.
bool takes_rows(const Packed& p, int64_t rows, int64_t few) {
  static const bool always = !has_bfloat16_tiles();
  return p.pairs && (always || (!p.fixed_rows && rows <= few));
}

// Rows that go together: as many as leave room in a core's L2 for the weights that pass by.
int64_t rows_at_once(int64_t row_bytes) {
  constexpr int64_t kBytes = 384 << 10, kStep = 12, kMost = 192;
  return std::clamp<int64_t>(kBytes / row_bytes / kStep * kStep, 2 * kStep, kMost);
}

// Contiguous rows of x, apart by a number of bytes that puts them into different places of L1.
Tensor spread_rows(const Tensor& x) {
  const int64_t width = x.size(-1), line = 64 / x.element_size();
  if (x.numel() / width <= 4 || width * x.element_size() % 1024) return x.contiguous();
  Tensor spread = at::empty({x.numel() / width, width + line}, x.options()).narrow(1, 0, width);
  return spread.copy_(x.reshape({-1, width}));
}

Tensor multiply_rows(const Packed& p, const Tensor& x, const OptionalTensor& bias) {
  const Tensor rows = spread_rows(x);
  auto shape = x.sizes().vec();
  shape.back() = p.out_features;
  Tensor y = at::empty(shape, x.options());
  const Tensor flat_bias = bias ? bias->contiguous() : Tensor();
  const auto* b = bias ? static_cast<const uint16_t*>(flat_bias.const_data_ptr()) : nullptr;
  const int64_t num_rows = x.numel() / p.in_features;
  const int64_t stride = (rows.dim() > 1 ? rows.stride(-2) : p.in_features) * x.element_size();
  const SmallMatmul product{static_cast<const char*>(rows.const_data_ptr()), p.pairs, b,
                            static_cast<uint16_t*>(y.mutable_data_ptr()), num_rows, p.in_features,
                            p.out_features, stride};
  const int64_t blocks = p.out_features / kSmallMatmulBlock, at_once = rows_at_once(stride);
  const int64_t grain = kBytesPerTask / (kSmallMatmulBlock * p.in_features * x.element_size());
  at::parallel_for(0, blocks * ((num_rows + at_once - 1) / at_once), std::max<int64_t>(1, grain),
                   [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last;) {
      const int64_t row = unit / blocks * at_once, block = unit % blocks;
      const int64_t end = std::min(blocks, block + last - unit);
      small_matmul(product, row, std::min(num_rows, row + at_once), block, end);
      unit += end - block;
    }
  });
  return y;
}

// Whether all products with this weight are our own, so that it need not be oneDNN's to read.
bool packs_pairs(const Tensor& weight) {
  static const bool ours = small_matmul_supported() && !has_bfloat16_tiles();
  return ours && weight.scalar_type() == at::kBFloat16 &&
         weight.size(0) % kSmallMatmulBlock == 0 && weight.size(1) % 2 == 0;
}

Tensor pack_pairs(const Tensor& weight) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const Tensor memory = allocate_packed(static_cast<int64_t>(weight.nbytes()));
  auto* to = static_cast<uint32_t*>(memory.mutable_data_ptr());
  const auto* from = static_cast<const char*>(weight.const_data_ptr());
  parallel_over_blocks(outputs, inputs, [&](int64_t first, int64_t last) {
    for (int64_t n = first * kSmallMatmulBlock; n < last * kSmallMatmulBlock; n++) {
      const char* row = from + n * inputs * 2;
      uint32_t* at = to + n / kSmallMatmulBlock * kSmallMatmulBlock * (inputs / 2);
      for (int64_t pair = 0; pair < inputs / 2; pair++)
        std::memcpy(at + pair * kSmallMatmulBlock + n % kSmallMatmulBlock, row + pair * 4, 4);
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
  const Tensor source = weight.detach().contiguous();
  if (packs_pairs(weight)) {
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
  return multiply(p, x, bias);
}

}  // namespace
}  // namespace inlay
