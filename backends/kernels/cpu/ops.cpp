// The ops' schemas. One translation unit: torch's headers take longer to compile than our code.
#include "experts_ops.h"
#include "linear.h"
#include "paged_attention.h"

#include <torch/library.h>

// Found in the file before it is loaded, so it must lie there in one piece: read through a volatile
// pointer, else the compiler also scatters it over the code.
extern "C" __attribute__((used)) const char inlay_cpu_build_stamp[] = INLAY_BUILD_STAMP;

namespace {
std::string build_stamp() {
  const char* volatile stamp = inlay_cpu_build_stamp;
  return stamp;
}
}  // namespace

TORCH_LIBRARY(inlay_cpu, m) {
  m.def(
      "paged_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor slot_mapping, Tensor block_table, Tensor seq_lens, Tensor query_start_loc, "
      "float scale, int window, float softcap, Tensor? sinks, bool causal=True, int chunk=0, "
      "Tensor? slopes=None) -> Tensor");
  m.def(
      "paged_attention_converted(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, "
      "Tensor(b!) v_cache, Tensor(c!)? k_scales, Tensor(d!)? v_scales, Tensor slot_mapping, "
      "Tensor block_table, Tensor seq_lens, Tensor query_start_loc, float scale, int window, "
      "float softcap, Tensor? sinks, bool causal=True, int chunk=0, Tensor? slopes=None) "
      "-> Tensor");
  m.def("pack_linear(Tensor weight) -> Tensor");
  m.def("linear(Tensor x, Tensor handle, Tensor? bias, int out_features) -> Tensor");
  m.def("pack_experts(Tensor weight, bool transposed=False, bool interleaved=False) -> Tensor");
  m.def(
      "experts(Tensor x, Tensor top_k_index, Tensor top_k_weights, Tensor up, Tensor down, "
      "Tensor? up_bias, Tensor? down_bias, Tensor? norm_weight, str activation=\"silu\", "
      "bool gated=True, float alpha=1.0, float gate_limit=0.0, float up_limit=0.0, "
      "bool limit_activated=False, float up_offset=0.0, float gate_softcap=0.0, "
      "float up_softcap=0.0, float norm_eps=0.0) -> Tensor");
  m.def("fix_rows(Tensor(a!) handle, int rows) -> ()");
  m.def("packed_nbytes(Tensor handle) -> int");
  m.def("packed_format(Tensor handle) -> str");
  m.def("get_isa() -> str", &inlay::get_isa);
  m.def("set_isa(str name) -> ()", &inlay::set_isa);
  m.def("build_stamp() -> str", &build_stamp);
}

TORCH_LIBRARY_IMPL(inlay_cpu, CPU, m) {
  m.impl("paged_attention", &inlay::paged_attention);
  m.impl("paged_attention_converted", &inlay::paged_attention_converted);
  m.impl("pack_linear", &inlay::pack_linear);
  m.impl("linear", &inlay::linear);
  m.impl("pack_experts", &inlay::pack_experts);
  m.impl("experts", &inlay::experts);
  m.impl("fix_rows", &inlay::fix_rows);
  m.impl("packed_nbytes", &inlay::packed_nbytes);
  m.impl("packed_format", &inlay::packed_format);
}
