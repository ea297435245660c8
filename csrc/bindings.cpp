// The Python module fastcircuit._C. Tensors arrive as addresses: fastcircuit/ops/cpu.py has checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <string>
#include <tuple>
#include <vector>

#include "isa.h"
#include "masked_read.h"
#include "rms_norm.h"

namespace py = pybind11;
using namespace fastcircuit;

namespace {

const char* const kIsaNames[] = {"portable", "avx2", "avx512"};

// How many rows follow each other, the distance between such groups, and between the rows of one.
using Strides = std::tuple<int64_t, int64_t, int64_t>;

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

void run_rms_norm(int isa, int threads, int dtype, int64_t rows, int64_t width, uintptr_t x, const Strides& x_strides,
                  uintptr_t weight, double eps, uintptr_t y) {
  RmsNormParams p{};
  p.isa = Isa(isa), p.threads = threads, p.dtype = Dtype(dtype);
  p.rows = rows, p.width = width, p.eps = eps;
  p.x = row_view(x, x_strides), p.weight = reinterpret_cast<const void*>(weight);
  p.y = reinterpret_cast<void*>(y);
  rms_norm(p);
}

void run_rms_norm_backward(int isa, int threads, int dtype, int64_t rows, int64_t width, uintptr_t grad,
                           const Strides& grad_strides, uintptr_t x, const Strides& x_strides, uintptr_t weight,
                           double eps, uintptr_t grad_x) {
  RmsNormParams p{};
  p.isa = Isa(isa), p.threads = threads, p.dtype = Dtype(dtype);
  p.rows = rows, p.width = width, p.eps = eps;
  p.grad = row_view(grad, grad_strides), p.x = row_view(x, x_strides);
  p.weight = reinterpret_cast<const void*>(weight);
  p.grad_x = reinterpret_cast<void*>(grad_x);
  rms_norm_backward(p);
}

std::vector<std::string> runnable_isas() {
  std::vector<std::string> names;
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512})
    if (can_run(isa)) names.push_back(kIsaNames[int(isa)]);
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled CPU kernels of fastcircuit.";
  module.def("masked_read", &run_read, py::call_guard<py::gil_scoped_release>());
  module.def("masked_read_backward", &run_backward, py::call_guard<py::gil_scoped_release>());
  module.def("rms_norm", &run_rms_norm, py::call_guard<py::gil_scoped_release>());
  module.def("rms_norm_backward", &run_rms_norm_backward, py::call_guard<py::gil_scoped_release>());
  module.def("runnable_isas", &runnable_isas, "Instruction sets this machine can run, slowest first.");
#ifdef _OPENMP
  module.attr("openmp") = true;
#else
  module.attr("openmp") = false;
#endif
}
