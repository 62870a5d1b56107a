// Weights of experts, packed one by one, and products of rows that are grouped by expert.
//
// Only the chosen experts' weights are read. Rows go through our own kernel, all experts' blocks
// in one parallel loop; where it does not take them through oneDNN, an expert at a time. A token's
// result depends on no other token but through the kind of product that its experts' rows take.
#pragma once

#include "linear.h"

#include <ATen/ops/cat.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace inlay {
namespace {

constexpr int64_t kExpertsMagic = 0x31305850584C4E49;  // "INLXPX01"
constexpr int64_t kSmallExpertRows = 16;               // of one expert; beyond it AMX wins

// As Packed: the head of it is what a handle shows.
struct alignas(64) PackedExperts {
  int64_t magic = kExpertsMagic;
  int64_t address = reinterpret_cast<int64_t>(this);
  int64_t out_features, in_features;
  std::vector<std::unique_ptr<Packed>> experts;

  at::ScalarType dtype() const { return experts[0]->weight.scalar_type(); }
};

const PackedExperts& resolve_experts(const char* name, const Tensor& handle) {
  const int64_t* head = handle.scalar_type() == at::kLong && handle.numel() == kHandleLength
                            ? handle.const_data_ptr<int64_t>()
                            : nullptr;
  TORCH_CHECK(head && head[0] == kExpertsMagic && head[1] == reinterpret_cast<int64_t>(head),
              "inlay_cpu::experts: ", name, " must be the very tensor that "
              "inlay_cpu::pack_experts returned, got ", handle.scalar_type(), " ", handle.sizes());
  return *reinterpret_cast<const PackedExperts*>(head);
}

Tensor pack_experts(const Tensor& weight, bool transposed, bool interleaved) {
  TORCH_CHECK(weight.dim() == 3 && weight.numel() > 0, "inlay_cpu::pack_experts: weight must be "
              "[experts, out_features, in_features], the last two swapped where transposed, got ",
              weight.sizes());
  auto packed = std::make_unique<PackedExperts>();
  for (int64_t expert = 0; expert < weight.size(0); expert++) {
    Tensor one = weight.select(0, expert);
    if (transposed) one = one.t();
    if (interleaved) {
      const auto every_second = [&](int64_t first) { return one.slice(0, first, std::nullopt, 2); };
      one = at::cat({every_second(0), every_second(1)});
    }
    packed->experts.push_back(make_packed(one));
  }
  packed->out_features = packed->experts[0]->out_features;
  packed->in_features = packed->experts[0]->in_features;
  return make_handle(std::move(packed));
}

// The rows of one expert: `rows` of them, and copies of the first up to `padded`, which nobody
// reads. oneDNN sets itself up anew for every number of rows, so there are few of those.
struct Group {
  int32_t expert;
  int64_t begin, rows, padded;

  bool small(const PackedExperts& w) const {
    return takes_rows(*w.experts[expert], rows, kSmallExpertRows);
  }
};

// Eight steps an octave, so an eighth of the rows at most is padding; never one row, for which
// oneDNN sums in another order than for more.
int64_t padded_rows(int64_t rows) {
  int64_t step = 1;
  while (16 * step <= rows) step *= 2;
  return std::max<int64_t>(2, (rows + step - 1) / step * step);
}

struct Grouping {
  std::vector<Group> groups;
  std::vector<int32_t> expert_of_row, row_of_pair;
  std::vector<int64_t> token_of_row;

  int64_t rows() const { return static_cast<int64_t>(token_of_row.size()); }
};

Grouping group_by_expert(const Tensor& top_k_index, int64_t num_experts) {
  const int64_t top_k = top_k_index.size(1), num_pairs = top_k_index.numel();
  const Tensor flat = top_k_index.contiguous();
  const int64_t* expert_of_pair = flat.const_data_ptr<int64_t>();
  std::vector<int64_t> counts(num_experts), next(num_experts);
  const auto valid = [&](int64_t expert) { return expert >= 0 && expert < num_experts; };
  for (int64_t pair = 0; pair < num_pairs; pair++)
    if (valid(expert_of_pair[pair])) counts[expert_of_pair[pair]]++;
  Grouping grouping;
  int64_t begin = 0;
  for (int64_t expert = 0; expert < num_experts; expert++) {
    if (!counts[expert]) continue;
    const int64_t padded = padded_rows(counts[expert]);
    grouping.groups.push_back({static_cast<int32_t>(expert), begin, counts[expert], padded});
    auto& experts = grouping.expert_of_row;
    experts.insert(experts.end(), padded, static_cast<int32_t>(expert));
    next[expert] = begin;
    begin += padded;
  }
  grouping.token_of_row.resize(begin);
  grouping.row_of_pair.assign(num_pairs, -1);
  for (int64_t pair = 0; pair < num_pairs; pair++) {
    if (!valid(expert_of_pair[pair])) continue;
    const int64_t row = next[expert_of_pair[pair]]++;
    grouping.token_of_row[row] = pair / top_k;
    grouping.row_of_pair[pair] = static_cast<int32_t>(row);
  }
  for (const Group& g : grouping.groups)
    for (int64_t row = g.begin + g.rows; row < g.begin + g.padded; row++)
      grouping.token_of_row[row] = grouping.token_of_row[g.begin];
  return grouping;
}

// A row each of all groups' products, and the tensors that hold them.
struct Products {
  std::vector<const void*> rows;
  std::vector<Tensor> owners;
};

void multiply_small(const Grouping& grouping, const PackedExperts& w, const Tensor& x,
                    const Tensor& y) {
  std::vector<const Group*> groups;
  for (const Group& g : grouping.groups)
    if (g.small(w)) groups.push_back(&g);
  const MatmulKernel& kernel = *w.experts[0]->kernel;
  const MatmulRows rows = matmul_rows(*w.experts[0], x);
  struct Job {
    const Group* group;
    int64_t first, last;
  };
  std::vector<Job> jobs;
  for (const Group* g : groups) {
    const RowParts parts(g->rows, rows.stride);
    for (int64_t part = 0; part < parts.count; part++)
      jobs.push_back({g, parts.begin(part), parts.begin(part + 1)});
  }
  auto* to = static_cast<uint16_t*>(y.mutable_data_ptr());
  share_blocks(static_cast<int64_t>(jobs.size()), num_pair_blocks(w.out_features),
               pair_block_bytes(w.in_features), [&](int64_t job, int64_t first, int64_t last) {
    const Group& g = *jobs[job].group;
    const SmallMatmul product{rows.data() + g.begin * rows.stride, w.experts[g.expert]->pairs,
                              nullptr, to + g.begin * w.out_features, g.rows, w.in_features,
                              w.out_features, rows.stride};
    kernel.multiply(product, jobs[job].first, jobs[job].last, first, last);
  });
}

Products multiply_groups(const Grouping& grouping, const PackedExperts& w, const Tensor& x) {
  Products result;
  result.rows.resize(grouping.rows());
  const auto place = [&](const Group& g, const Tensor& y, int64_t first) {
    const auto* memory = static_cast<const char*>(y.const_data_ptr());
    for (int64_t row = 0; row < g.padded; row++)
      result.rows[g.begin + row] = memory + (first + row) * w.out_features * y.element_size();
  };
  const auto& groups = grouping.groups;
  const bool any_small =
      std::any_of(groups.begin(), groups.end(), [&](auto& g) { return g.small(w); });
  if (any_small) {
    const Tensor y = at::empty({grouping.rows(), w.out_features}, x.options());
    multiply_small(grouping, w, x, y);
    for (const Group& g : grouping.groups)
      if (g.small(w)) place(g, y, g.begin);
    result.owners.push_back(y);
  }
  for (const Group& g : grouping.groups) {
    if (g.small(w)) continue;
    const Tensor rows = x.narrow(0, g.begin, g.padded);
    const Tensor y = multiply(*w.experts[g.expert], rows, std::nullopt).contiguous();
    place(g, y, 0);
    result.owners.push_back(y);
  }
  return result;
}

Tensor gather_rows(const Grouping& grouping, const Tensor& x) {
  const Tensor source = x.contiguous();
  Tensor rows = at::empty({grouping.rows(), x.size(1)}, x.options());
  const int64_t row_bytes = x.size(1) * x.element_size();
  const auto* from = static_cast<const char*>(source.const_data_ptr());
  auto* to = static_cast<char*>(rows.mutable_data_ptr());
  at::parallel_for(0, grouping.rows(), std::max<int64_t>(1, kBytesPerTask / row_bytes),
                   [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++)
      std::memcpy(to + row * row_bytes, from + grouping.token_of_row[row] * row_bytes, row_bytes);
  });
  return rows;
}

}  // namespace
}  // namespace inlay
