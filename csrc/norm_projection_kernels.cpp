// Compiled once per instruction set, with FC_ISA its name and FC_VECTOR_BYTES the size of its registers.
#include "norm_projection.h"
#include "norm_rows.h"
#include "packed_product.h"

namespace fastcircuit {
namespace FC_ISA {
namespace {

template <class A>
const A* rows_of(const NormProjectionParams& p, int64_t head, int64_t token) {
  return static_cast<const A*>(p.x) + head * p.x_head_stride + token * p.x_row_stride;
}

template <class A>
const A* weight_of(const NormProjectionParams& p, int64_t head) {
  return static_cast<const A*>(p.weight) + head * p.weight_head_stride;
}

// Packed weights, then kRows normalised rows.
template <class A>
int64_t forward_scratch(const NormProjectionParams& p) {
  return (Panels<A>{p.width, p.head_width}.size() + kRows * p.width) * sizeof(A);
}

template <class A, bool Centered>
void forward(const NormProjectionParams& p, int64_t head, int64_t begin, int64_t end, void* scratch) {
  const Panels<A> panels{p.width, p.head_width};
  A *packed = static_cast<A*>(scratch), *normed = packed + panels.size();
  panels.pack(weight_of<A>(p, head), p.weight_in_stride, p.weight_out_stride, packed);
  std::memset(normed, 0, sizeof(A) * kRows * p.width);
  const A* weight = static_cast<const A*>(p.norm_weight);
  const A* norm_bias = static_cast<const A*>(p.norm_bias);
  const A* bias = p.bias ? static_cast<const A*>(p.bias) + head * p.bias_head_stride : nullptr;
  A* y = static_cast<A*>(p.y) + (head * p.tokens + begin) * p.head_width;
  for (; begin < end; begin += kRows, y += kRows * p.head_width) {
    const int64_t rows = end - begin < kRows ? end - begin : kRows;
    for (int64_t i = 0; i < rows; ++i)
      norm_row<A, Centered>(rows_of<A>(p, head, begin + i), weight, norm_bias, p.width, p.eps, normed + i * p.width);
    const int64_t left = end - begin - rows;
    Prefetch next(rows_of<A>(p, head, begin + rows), p.x_row_stride, left < kRows ? left : kRows, p.width);
    multiply<A>(panels, normed, p.width, packed, {bias}, rows, y, p.head_width, next);
  }
}

template <class A>
FC_INLINE void copy_around_cache(const A* from, int64_t width, A* to) {
  for (int64_t c = 0; c < width; c += Simd<A>::kLanes)
    Traits<A>::store_around_cache(to + c, Traits<A>::load(from + c));
}

// Packed weights, kRows rows of the norm's gradient, and as many of y's for an edge.
template <class A>
int64_t backward_scratch(const NormProjectionParams& p) {
  return (Panels<A>{p.head_width, p.width}.size() + kRows * (p.width + p.head_width)) * sizeof(A);
}

template <class A, bool Centered>
void backward(const NormProjectionParams& p, int64_t head, int64_t begin, int64_t end, void* scratch) {
  const Panels<A> panels{p.head_width, p.width};
  A *packed = static_cast<A*>(scratch), *of_normed = packed + panels.size(), *edge = of_normed + kRows * p.width;
  panels.pack(weight_of<A>(p, head), p.weight_out_stride, p.weight_in_stride, packed);
  const bool around = goes_around_cache(p.grad_x, p.heads * p.tokens, p.width * int64_t(sizeof(A)));
  const A* weight = static_cast<const A*>(p.norm_weight);
  const A* grad = static_cast<const A*>(p.grad) + (head * p.tokens + begin) * p.head_width;
  A* grad_x = static_cast<A*>(p.grad_x) + (head * p.tokens + begin) * p.width;
  for (; begin < end; begin += kRows, grad += kRows * p.head_width) {
    const int64_t rows = end - begin < kRows ? end - begin : kRows;
    const A* a = grad;
    if (rows < kRows) {
      std::memset(edge, 0, sizeof(A) * kRows * p.head_width);
      std::memcpy(edge, grad, sizeof(A) * rows * p.head_width);
      a = edge;
    }
    Prefetch x(rows_of<A>(p, head, begin), p.x_row_stride, rows, p.width);
    multiply<A>(panels, a, p.head_width, packed, {}, rows, of_normed, p.width, x);
    for (int64_t i = 0; i < rows; ++i, grad_x += p.width) {
      A* const row = of_normed + i * p.width;
      norm_backward_row<A, Centered>(row, rows_of<A>(p, head, begin + i), weight, p.width, p.eps, around ? row : grad_x);
      if (around) copy_around_cache(row, p.width, grad_x);
    }
  }
  finish_stores_around_cache();
}

template <class A, bool Centered>
constexpr NormProjectionKernels kKernels = {forward_scratch<A>, forward<A, Centered>, backward_scratch<A>,
                                            backward<A, Centered>};

template <bool Centered>
const NormProjectionKernels& kernels(Dtype dtype) {
  return dtype == Dtype::f64 ? kKernels<double, Centered> : kKernels<float, Centered>;
}

}  // namespace

const NormProjectionKernels& norm_projection_kernels(Dtype dtype, bool centered) {
  return centered ? kernels<true>(dtype) : kernels<false>(dtype);
}

}  // namespace FC_ISA
}  // namespace fastcircuit
