// Compiled once per instruction set, with FC_ISA its name and FC_VECTOR_BYTES the size of its registers.
// Each row is read twice, first for its sums and then, still in cache, for its results.
#include "norm.h"
#include "simd.h"

// For lambdas, which take no `inline`.
#define FC_ALWAYS_INLINE __attribute__((always_inline))

namespace fastcircuit {
namespace FC_ISA {
namespace {

// Independent partial sums: enough of them to hide the latency of an addition.
constexpr int kParts = 4;

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

// The vectors of a row, the last one possibly narrower: beyond it are zeros, which add nothing to any sum.
template <class S, class A = typename Traits<S>::Accumulate>
FC_INLINE Vec<A> load(const S* p, int64_t lanes) {
  if (lanes == Simd<A>::kLanes) return Traits<S>::load(p);
  S edge[Simd<A>::kLanes] = {};
  std::memcpy(edge, p, sizeof(S) * lanes);
  return Traits<S>::load(edge);
}

template <class S, class A = typename Traits<S>::Accumulate>
FC_INLINE void store(S* p, Vec<A> v, int64_t lanes) {
  if (lanes == Simd<A>::kLanes) return Traits<S>::store(p, v);
  S edge[Simd<A>::kLanes];
  Traits<S>::store(edge, v);
  std::memcpy(p, edge, sizeof(S) * lanes);
}

// v as a store in S and a load would make it: bfloat16 is the upper half of a float, rounded to nearest even.
template <class S, class A = typename Traits<S>::Accumulate>
FC_INLINE Vec<A> rounded(Vec<A> v) {
  if constexpr (sizeof(S) == sizeof(A)) {
    return v;
  } else {
    using Wide = typename Traits<S>::Wide;
    const Wide bits = (Wide)v;
    const Vec<A> nearest = (Vec<A>)((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
    return v != v ? v : nearest;
  }
}

// Calls body(column, lanes, part) for every vector of a row.
template <class A, class Body>
FC_INLINE void for_vectors(int64_t width, const Body& body) {
  constexpr int kLanes = Simd<A>::kLanes;
  int64_t c = 0;
  for (; c + kParts * kLanes <= width; c += kParts * kLanes)
    for (int part = 0; part < kParts; ++part) body(c + part * kLanes, kLanes, part);
  for (; c + kLanes <= width; c += kLanes) body(c, kLanes, 0);
  if (c < width) body(c, width - c, 0);
}

// Adds the upper half to the lower one until one lane is left, all in registers: on short rows this is what counts.
template <class A, class V>
FC_INLINE A add_lanes(V v) {
  if constexpr (sizeof(V) == 2 * sizeof(A)) {
    return v[0] + v[1];
  } else {
    typedef A Half __attribute__((vector_size(sizeof(V) / 2)));
    Half low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return add_lanes<A>(Half(low + high));
  }
}

template <class A>
FC_INLINE double total(const Vec<A> (&parts)[kParts]) {
  return add_lanes<A>((parts[0] + parts[1]) + (parts[2] + parts[3]));
}

FC_INLINE double inverse_root(double sum_of_squares, int64_t width, double eps) {
  return 1 / __builtin_sqrt(sum_of_squares / double(width) + eps);
}

// What LayerNorm takes from every number of a row before anything else.
template <class S, bool Centered, class A = typename Traits<S>::Accumulate>
FC_INLINE A mean_of(const S* x, int64_t width) {
  if constexpr (!Centered) return A(0);
  Vec<A> sums[kParts] = {};
  for_vectors<A>(width, [&](int64_t c, int64_t lanes, int part) FC_ALWAYS_INLINE { sums[part] += load(x + c, lanes); });
  return A(total<A>(sums) / double(width));
}

// x - mean; the lanes beyond the end of a row stay zero.
template <class S, bool Centered, class A = typename Traits<S>::Accumulate>
FC_INLINE Vec<A> centered(const S* x, int64_t lanes, A mean) {
  const Vec<A> v = load(x, lanes);
  if constexpr (!Centered) return v;
  const Vec<A> shifted = v - splat(mean);
  if (lanes == Simd<A>::kLanes) return shifted;
  A kept[Simd<A>::kLanes] = {};
  std::memcpy(kept, &shifted, sizeof(A) * lanes);
  return Traits<A>::load(kept);
}

template <class S, bool Centered, class A = typename Traits<S>::Accumulate>
void forward(const NormParams& p, int64_t begin, int64_t end) {
  const S* const weight = static_cast<const S*>(p.weight);
  const S* const bias = static_cast<const S*>(p.bias);
  S* y = static_cast<S*>(p.y) + begin * p.width;
  Cursor<S> rows(p.x, begin);
  for (; begin < end; ++begin, rows.next(), y += p.width) {
    const S* const x = rows.row;
    const A mean = mean_of<S, Centered>(x, p.width);
    Vec<A> squares[kParts] = {};
    for_vectors<A>(p.width, [&](int64_t c, int64_t lanes, int part) FC_ALWAYS_INLINE {
      const Vec<A> xc = centered<S, Centered>(x + c, lanes, mean);
      squares[part] += xc * xc;
    });
    const Vec<A> rstd = splat(A(inverse_root(total<A>(squares), p.width, p.eps)));
    for_vectors<A>(p.width, [&](int64_t c, int64_t lanes, int) FC_ALWAYS_INLINE {
      const Vec<A> normed = centered<S, Centered>(x + c, lanes, mean) * rstd;
      // Hugging Face's RMSNorms round the normalised value to a half precision too; LayerNorm rounds once.
      Vec<A> yc = (Centered ? normed : rounded<S>(normed)) * load(weight + c, lanes);
      if (bias) yc += load(bias + c, lanes);
      store(y + c, yc, lanes);
    });
  }
}

// grad_x = rstd * (g - mean(g) - xc * rstd^2 * mean(g * xc)) with g = grad * weight and xc = x - mean(x); RMSNorm is
// the same without the two means of x and g. Recomputing rstd is one more sum over numbers that are being read anyway.
template <class S, bool Centered, class A = typename Traits<S>::Accumulate>
void backward(const NormParams& p, int64_t begin, int64_t end) {
  const S* const weight = static_cast<const S*>(p.weight);
  S* grad_x = static_cast<S*>(p.grad_x) + begin * p.width;
  Cursor<S> rows(p.x, begin), grads(p.grad, begin);
  for (; begin < end; ++begin, rows.next(), grads.next(), grad_x += p.width) {
    const S* const x = rows.row;
    const S* const grad = grads.row;
    const A mean = mean_of<S, Centered>(x, p.width);
    Vec<A> squares[kParts] = {}, products[kParts] = {}, sums[kParts] = {};
    for_vectors<A>(p.width, [&](int64_t c, int64_t lanes, int part) FC_ALWAYS_INLINE {
      const Vec<A> xc = centered<S, Centered>(x + c, lanes, mean);
      const Vec<A> g = load(grad + c, lanes) * load(weight + c, lanes);
      squares[part] += xc * xc;
      products[part] += g * xc;
      if constexpr (Centered) sums[part] += g;
    });
    const double inverse = inverse_root(total<A>(squares), p.width, p.eps);
    // In this order a tiny x, whose inverse is huge, does not overflow.
    const Vec<A> along_x = splat(A(total<A>(products) / double(p.width) * inverse * inverse));
    const Vec<A> rstd = splat(A(inverse)), mean_grad = splat(A(total<A>(sums) / double(p.width)));
    for_vectors<A>(p.width, [&](int64_t c, int64_t lanes, int) FC_ALWAYS_INLINE {
      Vec<A> g = load(grad + c, lanes) * load(weight + c, lanes);
      if constexpr (Centered) g -= mean_grad;
      store(grad_x + c, rstd * (g - centered<S, Centered>(x + c, lanes, mean) * along_x), lanes);
    });
  }
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
