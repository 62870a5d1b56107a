// What can be asked of a packed weight, of whichever kind its handle is.
#pragma once

#include "quantized_experts.h"

namespace inlay {
namespace {

int64_t handle_kind(const Tensor& handle) {
  const bool like_one = handle.scalar_type() == at::kLong && handle.numel() == kHandleLength;
  return like_one ? *handle.const_data_ptr<int64_t>() : 0;
}

// From now on every product with this weight, or with each of these experts', has so many rows.
// Quantized products sum each row in one order however many there are: nothing changes for them.
void fix_rows(const Tensor& handle, int64_t rows) {
  TORCH_CHECK(rows >= 0, "inlay_cpu::fix_rows: rows must be at least 0, got ", rows);
  switch (handle_kind(handle)) {
    case kExpertsMagic:
      for (const auto& expert : resolve_experts("handle", handle).experts)
        expert->fixed_rows = rows;
      return;
    case kQuantizedMagic: resolve_codes("fix_rows", handle); return;
    case kQuantizedExpertsMagic: resolve_coded_experts("handle", handle); return;
    default: const_cast<Packed&>(resolve(handle)).fixed_rows = rows;
  }
}

int64_t packed_nbytes(const Packed& p) {
  static const auto nbytes = find_op<int64_t(const Tensor&)>("mkldnn::_nbytes");
  return p.onednn ? nbytes.call(p.weight) : static_cast<int64_t>(p.weight.nbytes());
}

int64_t packed_nbytes(const Tensor& handle) {
  int64_t total = 0;
  switch (handle_kind(handle)) {
    case kExpertsMagic:
      for (const auto& expert : resolve_experts("handle", handle).experts)
        total += packed_nbytes(*expert);
      return total;
    case kQuantizedMagic: return resolve_codes("packed_nbytes", handle).nbytes();
    case kQuantizedExpertsMagic:
      for (const auto& expert : resolve_coded_experts("handle", handle).experts)
        total += expert->nbytes();
      return total;
    default: return packed_nbytes(resolve(handle));
  }
}

const char* linear_format(const Packed& p) {
  return p.onednn ? "onednn" : p.pairs ? "pairs" : "plain";
}

std::string packed_format(const Tensor& handle) {
  switch (handle_kind(handle)) {
    case kExpertsMagic:
      return linear_format(*resolve_experts("handle", handle).experts[0]);
    case kQuantizedMagic: return format_name(resolve_codes("packed_format", handle).format);
    case kQuantizedExpertsMagic:
      return format_name(resolve_coded_experts("handle", handle).experts[0]->format);
    default: return linear_format(resolve(handle));
  }
}

}  // namespace
}  // namespace inlay
