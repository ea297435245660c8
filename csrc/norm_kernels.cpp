// Compiled once per instruction set, with FC_ISA its name and FC_VECTOR_BYTES the size of its registers.
#include "norm.h"
#include "norm_rows.h"

namespace fastcircuit {
namespace FC_ISA {
namespace {

// Walks the rows of a view one after the other.
template <class S>
struct Cursor {
  Cursor(const RowView& rows, int64_t at)
      : view(rows),
        left(rows.group - at % rows.group),
        first(static_cast<const S*>(rows.data) + at / rows.group * rows.group_stride),
        row(first + at % rows.group * rows.row_stride) {}

  FC_INLINE void next() {
    row += view.row_stride;
    if (--left == 0) {
      first += view.group_stride;
      row = first;
      left = view.group;
    }
  }

  const RowView& view;
  int64_t left;  // rows of this group not yet passed, this one included
  const S* first;
  const S* row;
};

template <class S, bool Centered>
void forward(const NormParams& p, int64_t begin, int64_t end) {
  S* y = static_cast<S*>(p.y) + begin * p.width;
  Cursor<S> rows(p.x, begin);
  for (; begin < end; ++begin, rows.next(), y += p.width)
    norm_row<S, Centered>(rows.row, static_cast<const S*>(p.weight), static_cast<const S*>(p.bias), p.width, p.eps, y);
}

template <class S, bool Centered>
void backward(const NormParams& p, int64_t begin, int64_t end) {
  S* grad_x = static_cast<S*>(p.grad_x) + begin * p.width;
  Cursor<S> rows(p.x, begin), grads(p.grad, begin);
  for (; begin < end; ++begin, rows.next(), grads.next(), grad_x += p.width)
    norm_backward_row<S, Centered>(grads.row, rows.row, static_cast<const S*>(p.weight), p.width, p.eps, grad_x);
}

template <class S, bool Centered>
constexpr NormKernels kNorm = {forward<S, Centered>, backward<S, Centered>};

template <bool Centered>
const NormKernels& kernels(Dtype dtype) {
  if (dtype == Dtype::f64) return kNorm<double, Centered>;
  if (dtype == Dtype::f32) return kNorm<float, Centered>;
  return kNorm<Bf16, Centered>;
}

}  // namespace

const NormKernels& norm_kernels(Dtype dtype, bool centered) {
  return centered ? kernels<true>(dtype) : kernels<false>(dtype);
}

}  // namespace FC_ISA
}  // namespace fastcircuit
