// The Python module fastcircuit._C. Tensors arrive as addresses: fastcircuit/ops/cpu.py has checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <string>
#include <tuple>
#include <vector>

#include "isa.h"
#include "masked_read.h"
#include "mlp.h"
#include "norm.h"
#include "norm_projection.h"
#include "packed_attention.h"
#include "peak.h"

namespace py = pybind11;
using namespace fastcircuit;

namespace {

const char* const kIsaNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

// How many rows follow each other, the distance between such groups, and between the rows of one.
using Strides = std::tuple<int64_t, int64_t, int64_t>;

// Of packed_attention: heads, key/value heads, tokens, width of a head; number of sequences, the longest, and the
// addresses of their starts and of every head's key/value head; query, key, value; rotary width, cos, sin.
using Sizes = std::tuple<int64_t, int64_t, int64_t, int64_t>;
using Sequences = std::tuple<int64_t, int64_t, uintptr_t, uintptr_t>;
using Addresses = std::tuple<uintptr_t, uintptr_t, uintptr_t>;
using Rotary = std::tuple<int64_t, uintptr_t, uintptr_t>;

// Of mlp: a weight, its strides from input to input and from output to output, and its bias.
using Matrix = std::tuple<uintptr_t, int64_t, int64_t, uintptr_t>;

RowView row_view(uintptr_t data, const Strides& strides) {
  return {reinterpret_cast<const void*>(data), std::get<0>(strides), std::get<1>(strides), std::get<2>(strides)};
}

void run_read(int isa, int threads, int dtype, int mask_dtype, int64_t readers, int64_t writers, int64_t columns,
          uintptr_t stream, int64_t stream_stride, uintptr_t mask, int64_t mask_stride_reader,
          int64_t mask_stride_writer, uintptr_t base, uintptr_t reads) {
  ReadParams p{};
  p.isa = Isa(isa), p.threads = threads, p.dtype = Dtype(dtype), p.mask_dtype = Dtype(mask_dtype);
  p.readers = readers, p.writers = writers, p.columns = columns;
  p.stream = reinterpret_cast<const void*>(stream), p.stream_stride = stream_stride;
  p.mask = reinterpret_cast<const void*>(mask);
  p.mask_stride_reader = mask_stride_reader, p.mask_stride_writer = mask_stride_writer;
  p.base = reinterpret_cast<const void*>(base);
  p.reads = reinterpret_cast<void*>(reads), p.reads_stride = columns;
  masked_read(p);
}

void run_backward(int isa, int threads, int dtype, int mask_dtype, int grad_stream_dtype, int64_t readers,
              int64_t writers, int64_t columns, uintptr_t grad_reads, uintptr_t stream, int64_t stream_stride,
              uintptr_t mask, int64_t mask_stride_reader, int64_t mask_stride_writer, uintptr_t grad_stream,
              int64_t grad_stream_stride, bool accumulate, uintptr_t grad_mask) {
  BackwardParams p{};
  p.isa = Isa(isa), p.threads = threads, p.dtype = Dtype(dtype), p.mask_dtype = Dtype(mask_dtype);
  p.grad_stream_dtype = Dtype(grad_stream_dtype);
  p.readers = readers, p.writers = writers, p.columns = columns;
  p.grad_reads = reinterpret_cast<const void*>(grad_reads), p.grad_reads_stride = columns;
  p.stream = reinterpret_cast<const void*>(stream), p.stream_stride = stream_stride;
  p.mask = reinterpret_cast<const void*>(mask);
  p.mask_stride_reader = mask_stride_reader, p.mask_stride_writer = mask_stride_writer;
  p.grad_stream = reinterpret_cast<void*>(grad_stream), p.grad_stream_stride = grad_stream_stride;
  p.accumulate = accumulate, p.grad_mask = reinterpret_cast<void*>(grad_mask);
  masked_read_backward(p);
}

void run_norm(int isa, int threads, int dtype, bool centered, int64_t rows, int64_t width, uintptr_t x,
              const Strides& x_strides, uintptr_t weight, uintptr_t bias, double eps, uintptr_t y) {
  NormParams p{};
  p.isa = Isa(isa), p.threads = threads, p.dtype = Dtype(dtype), p.centered = centered;
  p.rows = rows, p.width = width, p.eps = eps;
  p.x = row_view(x, x_strides), p.weight = reinterpret_cast<const void*>(weight);
  p.bias = reinterpret_cast<const void*>(bias), p.y = reinterpret_cast<void*>(y);
  norm(p);
}

void run_norm_backward(int isa, int threads, int dtype, bool centered, int64_t rows, int64_t width, uintptr_t grad,
                       const Strides& grad_strides, uintptr_t x, const Strides& x_strides, uintptr_t weight,
                       double eps, uintptr_t grad_x) {
  NormParams p{};
  p.isa = Isa(isa), p.threads = threads, p.dtype = Dtype(dtype), p.centered = centered;
  p.rows = rows, p.width = width, p.eps = eps;
  p.grad = row_view(grad, grad_strides), p.x = row_view(x, x_strides);
  p.weight = reinterpret_cast<const void*>(weight);
  p.grad_x = reinterpret_cast<void*>(grad_x);
  norm_backward(p);
}

NormProjectionParams projection_params(int isa, int threads, int dtype, bool centered, const Sizes& sizes, uintptr_t x,
                                       const std::tuple<int64_t, int64_t>& x_strides, uintptr_t norm_weight, double eps,
                                       uintptr_t weight, const Strides& weight_strides) {
  NormProjectionParams p{};
  p.isa = Isa(isa), p.threads = threads, p.dtype = Dtype(dtype), p.centered = centered;
  std::tie(p.heads, p.tokens, p.width, p.head_width) = sizes;
  p.x = reinterpret_cast<const void*>(x), std::tie(p.x_head_stride, p.x_row_stride) = x_strides;
  p.norm_weight = reinterpret_cast<const void*>(norm_weight), p.eps = eps;
  p.weight = reinterpret_cast<const void*>(weight);
  std::tie(p.weight_head_stride, p.weight_in_stride, p.weight_out_stride) = weight_strides;
  return p;
}

void run_norm_projection(int isa, int threads, int dtype, bool centered, const Sizes& sizes, uintptr_t x,
                         const std::tuple<int64_t, int64_t>& x_strides, uintptr_t norm_weight, double eps,
                         uintptr_t weight, const Strides& weight_strides, uintptr_t norm_bias, uintptr_t bias,
                         int64_t bias_head_stride, uintptr_t y) {
  NormProjectionParams p =
      projection_params(isa, threads, dtype, centered, sizes, x, x_strides, norm_weight, eps, weight, weight_strides);
  p.norm_bias = reinterpret_cast<const void*>(norm_bias);
  p.bias = reinterpret_cast<const void*>(bias), p.bias_head_stride = bias_head_stride;
  p.y = reinterpret_cast<void*>(y);
  norm_projection(p);
}

void run_norm_projection_backward(int isa, int threads, int dtype, bool centered, const Sizes& sizes, uintptr_t x,
                                  const std::tuple<int64_t, int64_t>& x_strides, uintptr_t norm_weight, double eps,
                                  uintptr_t weight, const Strides& weight_strides, uintptr_t grad, uintptr_t grad_x) {
  NormProjectionParams p =
      projection_params(isa, threads, dtype, centered, sizes, x, x_strides, norm_weight, eps, weight, weight_strides);
  p.grad = reinterpret_cast<const void*>(grad), p.grad_x = reinterpret_cast<void*>(grad_x);
  norm_projection_backward(p);
}

AttentionParams attention_params(int isa, int threads, int dtype, const Sizes& sizes, const Sequences& sequences,
                                 const Addresses& inputs, const Rotary& rotary, double scale, bool causal,
                                 int64_t window) {
  AttentionParams p{};
  p.isa = Isa(isa), p.threads = threads, p.dtype = Dtype(dtype);
  std::tie(p.heads, p.kv_heads, p.tokens, p.width) = sizes;
  p.sequences = std::get<0>(sequences), p.longest = std::get<1>(sequences);
  p.starts = reinterpret_cast<const int64_t*>(std::get<2>(sequences));
  p.kv_of_head = reinterpret_cast<const int64_t*>(std::get<3>(sequences));
  p.query = reinterpret_cast<const void*>(std::get<0>(inputs));
  p.key = reinterpret_cast<const void*>(std::get<1>(inputs));
  p.value = reinterpret_cast<const void*>(std::get<2>(inputs));
  p.rotary = std::get<0>(rotary);
  p.cos = reinterpret_cast<const void*>(std::get<1>(rotary)), p.sin = reinterpret_cast<const void*>(std::get<2>(rotary));
  p.scale = scale, p.causal = causal, p.window = window;
  return p;
}

void run_attention(int isa, int threads, int dtype, const Sizes& sizes, const Sequences& sequences,
                   const Addresses& inputs, const Rotary& rotary, double scale, bool causal, int64_t window,
                   uintptr_t out) {
  AttentionParams p = attention_params(isa, threads, dtype, sizes, sequences, inputs, rotary, scale, causal, window);
  p.out = reinterpret_cast<void*>(out);
  packed_attention(p);
}

void run_attention_backward(int isa, int threads, int dtype, const Sizes& sizes, const Sequences& sequences,
                            const Addresses& inputs, const Rotary& rotary, double scale, bool causal, int64_t window,
                            uintptr_t grad_out, const Addresses& grads) {
  AttentionParams p = attention_params(isa, threads, dtype, sizes, sequences, inputs, rotary, scale, causal, window);
  p.grad_out = reinterpret_cast<const void*>(grad_out);
  p.grad_query = reinterpret_cast<void*>(std::get<0>(grads));
  p.grad_key = reinterpret_cast<void*>(std::get<1>(grads));
  p.grad_value = reinterpret_cast<void*>(std::get<2>(grads));
  packed_attention_backward(p);
}

Affine affine(const Matrix& matrix) {
  return {reinterpret_cast<const void*>(std::get<0>(matrix)), std::get<1>(matrix), std::get<2>(matrix),
          reinterpret_cast<const void*>(std::get<3>(matrix))};
}

void run_mlp(bool backward, int isa, int threads, int dtype, int activation,
             const std::tuple<int64_t, int64_t, int64_t>& sizes, const Matrix& gate, const Matrix& up,
             const Matrix& down, uintptr_t x, int64_t x_row_stride, uintptr_t slopes, uintptr_t y) {
  MlpParams p{};
  p.isa = Isa(isa), p.threads = threads, p.dtype = Dtype(dtype), p.activation = Activation(activation);
  std::tie(p.tokens, p.width, p.hidden) = sizes;
  p.gate = affine(gate), p.up = affine(up), p.down = affine(down), p.gated = p.gate.weight != nullptr;
  p.x = reinterpret_cast<const void*>(x), p.x_row_stride = x_row_stride;
  p.slopes = reinterpret_cast<void*>(slopes), p.y = reinterpret_cast<void*>(y);
  backward ? mlp_backward(p) : mlp(p);
}

double run_multiply_adds(int isa, int threads, int dtype, int64_t rounds) {
  return multiply_adds(Isa(isa), threads, Dtype(dtype), rounds);
}

std::vector<std::string> runnable_isas() {
  std::vector<std::string> names;
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx})
    if (can_run(isa)) names.push_back(kIsaNames[int(isa)]);
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled CPU kernels of fastcircuit.";
  module.def("masked_read", &run_read, py::call_guard<py::gil_scoped_release>());
  module.def("masked_read_backward", &run_backward, py::call_guard<py::gil_scoped_release>());
  module.def("mlp", &run_mlp, py::call_guard<py::gil_scoped_release>());
  module.def("norm", &run_norm, py::call_guard<py::gil_scoped_release>());
  module.def("norm_backward", &run_norm_backward, py::call_guard<py::gil_scoped_release>());
  module.def("norm_projection", &run_norm_projection, py::call_guard<py::gil_scoped_release>());
  module.def("norm_projection_backward", &run_norm_projection_backward, py::call_guard<py::gil_scoped_release>());
  module.def("packed_attention", &run_attention, py::call_guard<py::gil_scoped_release>());
  module.def("packed_attention_backward", &run_attention_backward, py::call_guard<py::gil_scoped_release>());
  module.def("is_intel", &is_intel, "Whether the processor is one of Intel's.");
  module.def("multiply_adds", &run_multiply_adds, py::call_guard<py::gil_scoped_release>());
  module.def("runnable_isas", &runnable_isas, "Instruction sets this machine can run, slowest first.");
#ifdef _OPENMP
  module.attr("openmp") = true;
#else
  module.attr("openmp") = false;
#endif
}
