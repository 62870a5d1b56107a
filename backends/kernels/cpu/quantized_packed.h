// Weights of 8 or 4 bits, packed into blocks and tiles (see quantized.h), and products with them.
#pragma once

#include "isa.h"
#include "linear.h"

#include <ATen/ops/zeros.h>

#include <cstring>

namespace inlay {
namespace {

constexpr int64_t kQuantizedMagic = 0x3130544E51504C49;  // "ILPQNT01"

// As Packed: the head of it is what a handle shows.
struct alignas(64) PackedCodes {
  int64_t magic = kQuantizedMagic;
  int64_t address = reinterpret_cast<int64_t>(this);
  int64_t out_features, in_features;
  Format format;
  Tensor codes;        // uint8
  Tensor column_sums;  // int32 [out_features, rounded up to blocks] of kIntegers

  int64_t num_blocks() const { return (out_features + kCodeBlock - 1) / kCodeBlock; }
  int64_t nbytes() const {
    return static_cast<int64_t>(codes.nbytes() + (column_sums.defined() ? column_sums.nbytes() : 0));
  }
};

const char* format_name(Format format) {
  switch (format) {
    case Format::kIntegers: return "int8";
    case Format::kInt8: return "int8_weight_only";
    case Format::kInt4: return "int4_weight_only";
    default: return "fp8";
  }
}

const PackedCodes& resolve_codes(const char* op, const Tensor& handle) {
  const int64_t* head = handle.scalar_type() == at::kLong && handle.numel() == kHandleLength
                            ? handle.const_data_ptr<int64_t>()
                            : nullptr;
  TORCH_CHECK(head && head[0] == kQuantizedMagic && head[1] == reinterpret_cast<int64_t>(head),
              "inlay_cpu::", op, ": handle must be the very tensor that inlay_cpu::pack_int8 or "
              "pack_weight_only returned, got ", handle.scalar_type(), " ", handle.sizes());
  return *reinterpret_cast<const PackedCodes*>(head);
}

// Four bytes of an output's numbers, as they lie in a tile.
uint32_t arrange(Format format, uint32_t bytes) {
  if (format == Format::kInt8) return bytes ^ 0x80808080;
  if (format != Format::kInt4) return bytes;
  // The numbers of inputs 0 ... 7 from the lowest bits on, to 0 4 1 5 2 6 3 7.
  const uint32_t first = bytes & 0xffff, last = bytes >> 16;
  const auto spread = [](uint32_t x) {  // 4 numbers, one to a byte
    x = (x | x << 8) & 0x00ff00ff;
    return (x | x << 4) & 0x0f0f0f0f;
  };
  return spread(first) | spread(last) << 4;
}

// One output's numbers of 4 or 8 bits into its column of a block.
void pack_column(Format format, const uint8_t* from, int64_t num_bytes, int column,
                 uint8_t* block) {
  const int64_t at = place(format, 0, column).byte, second = place(format, 2, column).byte;
  for (int64_t i = 0; i < num_bytes; i += 4, block += kTileBytes) {
    uint32_t bytes = 0;
    std::memcpy(&bytes, from + i, std::min<int64_t>(4, num_bytes - i));
    bytes = arrange(format, bytes);
    if (format == Format::kFloat8) {
      std::memcpy(block + at, &bytes, 2);
      std::memcpy(block + second, reinterpret_cast<const char*>(&bytes) + 2, 2);
    } else {
      std::memcpy(block + at, &bytes, 4);
    }
  }
}

Tensor sum_columns(const Tensor& weight, int64_t padded) {
  Tensor sums = at::zeros({padded}, at::TensorOptions(at::kInt));
  auto* to = sums.mutable_data_ptr<int32_t>();
  const auto* from = static_cast<const int8_t*>(weight.const_data_ptr());
  const int64_t inputs = weight.size(1);
  at::parallel_for(0, weight.size(0), 64, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; n++) {
      int32_t sum = 0;
      for (int64_t k = 0; k < inputs; k++) sum += from[n * inputs + k];
      to[n] = sum;
    }
  });
  return sums;
}

std::unique_ptr<PackedCodes> make_codes(Format format, const Tensor& weight) {
  const Tensor source = weight.contiguous();
  auto packed = std::make_unique<PackedCodes>();
  packed->format = format;
  packed->out_features = weight.size(0);
  packed->in_features = weight.size(1) * (format == Format::kInt4 ? 2 : 1);
  const int64_t bytes = block_bytes(format, packed->in_features);
  packed->codes = allocate_packed(packed->num_blocks() * bytes);
  auto* to = packed->codes.mutable_data_ptr<uint8_t>();
  const auto* from = static_cast<const uint8_t*>(source.const_data_ptr());
  at::parallel_for(0, packed->num_blocks(), std::max<int64_t>(1, kBytesPerTask / bytes),
                   [&](int64_t first, int64_t last) {
    std::memset(to + first * bytes, 0, (last - first) * bytes);
    const int64_t end = std::min(last * kCodeBlock, packed->out_features);
    for (int64_t n = first * kCodeBlock; n < end; n++)
      pack_column(format, from + n * source.size(1), source.size(1),
                  static_cast<int>(n % kCodeBlock), to + n / kCodeBlock * bytes);
  });
  use_huge_pages(reinterpret_cast<int64_t>(to), packed->codes.numel());
  if (format == Format::kIntegers)
    packed->column_sums = sum_columns(source, packed->num_blocks() * kCodeBlock);
  return packed;
}

void check_weight(const char* op, const Tensor& weight, int64_t dims) {
  TORCH_CHECK(weight.dim() == dims && weight.numel() > 0, "inlay_cpu::", op, ": weight must be [",
              dims == 3 ? "experts, " : "", "out_features, in_features], got ", weight.sizes());
}

Format weight_only_format(const char* op, at::ScalarType dtype) {
  TORCH_CHECK(dtype == at::kChar || dtype == at::kByte || dtype == at::kFloat8_e4m3fn,
              "inlay_cpu::", op, ": weight must be int8, uint8 (two 4-bit numbers each) or "
              "float8_e4m3fn, got ", dtype);
  return dtype == at::kChar ? Format::kInt8
         : dtype == at::kByte ? Format::kInt4
                              : Format::kFloat8;
}

Tensor pack_int8(const Tensor& weight) {
  check_weight("pack_int8", weight, 2);
  TORCH_CHECK(weight.scalar_type() == at::kChar, "inlay_cpu::pack_int8: weight must be int8, got ",
              weight.scalar_type());
  return make_handle(make_codes(Format::kIntegers, weight));
}

Tensor pack_weight_only(const Tensor& weight) {
  check_weight("pack_weight_only", weight, 2);
  const Format format = weight_only_format("pack_weight_only", weight.scalar_type());
  return make_handle(make_codes(format, weight));
}

DType dtype_of(const char* op, const char* name, at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return DType::kFloat32;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kFloat16;
    case at::kChar: return DType::kInt8;
    case at::kFloat8_e4m3fn: return DType::kFloat8;
    default: TORCH_CHECK(false, "inlay_cpu::", op, ": ", name, " has dtype ", dtype);
  }
}

const ProductKernels& product_kernels(const QuantizedProduct& p, DType x) {
  const Isa& best = *isa();
  const bool taken =
      best.products && best.products->takes(p.format, x, p.group_size, p.in_features);
  return taken ? *best.products : best.quantized->products;
}

// Rows of x as a kernel wants them.
struct PreparedRows {
  Tensor memory;
  int64_t stride;
  const ProductKernels* kernels;
};

PreparedRows prepare_rows(const QuantizedProduct& p, DType dtype, const void* x, int64_t rows) {
  const ProductKernels& kernels = product_kernels(p, dtype);
  const int64_t stride = kernels.row_bytes(p.format, p.in_features, p.group_size);
  Tensor memory = at::empty({rows * stride}, at::TensorOptions(at::kByte));
  const Rows job{dtype, static_cast<const char*>(x), static_cast<char*>(memory.mutable_data_ptr()),
                 p.in_features, stride, p.group_size};
  at::parallel_for(0, rows, std::max<int64_t>(1, kBytesPerTask / stride),
                   [&](int64_t first, int64_t last) {
    kernels.prepare(p.format, job, first, last);
  });
  return {memory, stride, &kernels};
}

// Products of some weights, block by block, in one parallel loop.
void multiply_all(const std::vector<QuantizedProduct>& products, const ProductKernels& kernels) {
  if (products.empty()) return;
  const QuantizedProduct& any = products[0];
  struct Job {
    const QuantizedProduct* product;
    int64_t first, last;
  };
  std::vector<Job> jobs;
  for (const QuantizedProduct& p : products) {
    const RowParts parts(p.rows, any.x_stride);
    for (int64_t part = 0; part < parts.count; part++)
      jobs.push_back({&p, parts.begin(part), parts.begin(part + 1)});
  }
  share_blocks(static_cast<int64_t>(jobs.size()), (any.out_features + kCodeBlock - 1) / kCodeBlock,
               block_bytes(any.format, any.in_features),
               [&](int64_t job, int64_t first, int64_t last) {
    kernels.multiply(*jobs[job].product, {jobs[job].first, jobs[job].last, first, last});
  });
}

}  // namespace
}  // namespace inlay
