// Compiled once per instruction set, with FC_ISA its name and FC_VECTOR_BYTES the size of its registers.
#include "mlp.h"

#include "activation.h"
#include "packed_product.h"

namespace fastcircuit {
namespace FC_ISA {
namespace {

// A panel is copied, and summed over, this many rows at a time: sums of a few hundred products lose fewer digits than
// longer ones. The products of kChunk tokens wait for their activation. All of it stays in the second-level cache.
constexpr int64_t kDepth = 256, kChunk = 512;

template <class A>
constexpr int64_t kPackedSize = kDepth * kTile<A>;
template <class A>
constexpr int64_t kChunkSize = kChunk * kTile<A>;
constexpr int64_t kEdgeSize = kRows * kDepth;

// A weight as the right factor of a product, [inner, outer].
template <class A>
struct Factor {
  const A* data;
  int64_t inner_stride, outer_stride, inner;

  // x W, with x [tokens, inner].
  static Factor forward(const Affine& w, int64_t inner) {
    return {static_cast<const A*>(w.weight), w.in_stride, w.out_stride, inner};
  }

  // g W^T, with g [tokens, inner].
  static Factor backward(const Affine& w, int64_t inner) {
    return {static_cast<const A*>(w.weight), w.out_stride, w.in_stride, inner};
  }

  int64_t blocks() const { return inner > kDepth ? (inner + kDepth - 1) / kDepth : 1; }
  int64_t block_begin(int64_t block) const { return inner * block / blocks(); }

  const A* at(int64_t row, int64_t column) const { return data + row * inner_stride + column * outer_stride; }

  // To fetch a block of `width` columns from `column` on.
  Prefetch fetched(int64_t block, int64_t column, int64_t width) const {
    const int64_t begin = block_begin(block), depth = block_begin(block + 1) - begin;
    if (outer_stride == 1) return Prefetch(at(begin, column), inner_stride, depth, width);
    if (inner_stride == 1) return Prefetch(at(begin, column), outer_stride, width, depth);
    return Prefetch();
  }
};

// The columns of a panel of one factor, and what is fetched behind them: the same columns of `after`, or the first rows
// of the next panel.
template <class A>
struct Columns {
  int64_t first, width, next, next_width;

  Columns(const MlpTask& task, int64_t columns)
      : first(task.panel * kTile<A>), width(size(first, columns)), next(task.next * kTile<A>),
        next_width(size(next, columns)) {}

  static int64_t size(int64_t first, int64_t columns) {
    return columns - first < kTile<A> ? columns - first : kTile<A>;
  }
};

// c[rows, width] = start + a[rows, inner] factor[inner, width]
template <class A>
void multiply_columns(const Factor<A>& factor, const Columns<A>& columns, const Prefetch& behind, const A* a,
                      int64_t a_stride, int64_t rows, Start<A> start, A* c, int64_t c_stride, A* scratch) {
  A *packed = scratch, *edge = packed + kPackedSize<A>;
  for (int64_t block = 0; block < factor.blocks(); ++block) {
    const int64_t begin = factor.block_begin(block), depth = factor.block_begin(block + 1) - begin;
    const Panels<A> panel{depth, columns.width};
    panel.pack(factor.at(begin, columns.first), factor.inner_stride, factor.outer_stride, packed);
    Prefetch next =
        block + 1 < factor.blocks() ? factor.fetched(block + 1, columns.first, columns.width) : behind;
    for (int64_t row = 0; row < rows; row += kRows) {
      const A* from = a + row * a_stride + begin;
      int64_t stride = a_stride;
      const int64_t left = rows - row < kRows ? rows - row : kRows;
      if (left < kRows) {
        for (int64_t i = 0; i < kRows; ++i) {
          if (i < left) std::memcpy(edge + i * depth, from + i * stride, sizeof(A) * depth);
          else std::memset(edge + i * depth, 0, sizeof(A) * depth);
        }
        from = edge, stride = depth;
      }
      const Start<A> onto{start.data ? start.data + row * start.stride : nullptr, start.stride};
      multiply<A>(panel, from, stride, packed, onto, left, c + row * c_stride, c_stride, next);
    }
    start = {c, c_stride};
  }
}

template <class A>
Start<A> bias(const Affine& w, int64_t column) {
  return {w.bias ? static_cast<const A*>(w.bias) + column : nullptr, 0};
}

// Rows of a matrix [tokens, hidden], from a column on.
template <class A>
struct Plane {
  A* data;
  int64_t stride;

  void store(int64_t row, int64_t column, Vec<A> v, int64_t count) const {
    store_some(data + row * stride + column, v, count);
  }
};

template <class A>
Plane<A> plane(void* data, const MlpParams& p, int64_t number, int64_t row, int64_t column) {
  return {static_cast<A*>(data) + (number * p.tokens + row) * p.hidden + column, p.hidden};
}

// What the first products gave, [rows, kTile], to the hidden numbers and, if they are kept, the slopes.
template <class A, Activation kind, bool Gated, bool Keep>
void activate(const A* first, const A* second, int64_t rows, int64_t width, Plane<A> hidden, Plane<A> slopes,
              Plane<A> other_slopes) {
  constexpr int kLanes = Simd<A>::kLanes;
  for (int64_t row = 0; row < rows; ++row, first += kTile<A>, second += kTile<A>) {
    for (int64_t c = 0; c < width; c += kLanes) {
      Activated<A> one = activated<kind, A>(Traits<A>::load(first + c));
      if constexpr (Gated) {
        const Vec<A> up = Traits<A>::load(second + c);
        if constexpr (Keep) other_slopes.store(row, c, one.value, width - c);
        one.value *= up, one.slope *= up;
      }
      hidden.store(row, c, one.value, width - c);
      if constexpr (Keep) slopes.store(row, c, one.slope, width - c);
    }
  }
}

template <class A, Activation kind, class... Rest>
void activate_as(bool gated, bool keep, Rest... rest) {
  if (gated) return keep ? activate<A, kind, true, true>(rest...) : activate<A, kind, true, false>(rest...);
  return keep ? activate<A, kind, false, true>(rest...) : activate<A, kind, false, false>(rest...);
}

template <class A, class... Rest>
void activate_any(const MlpParams& p, Rest... rest) {
  const bool keep = p.slopes != nullptr;
  switch (p.activation) {
    case Activation::relu: return activate_as<A, Activation::relu>(p.gated, keep, rest...);
    case Activation::silu: return activate_as<A, Activation::silu>(p.gated, keep, rest...);
    case Activation::gelu: return activate_as<A, Activation::gelu>(p.gated, keep, rest...);
    case Activation::gelu_tanh: return activate_as<A, Activation::gelu_tanh>(p.gated, keep, rest...);
  }
}

template <class A>
const A* x_row(const MlpParams& p, int64_t token) {
  return static_cast<const A*>(p.x) + token * p.x_row_stride;
}

// Calls body(first token, tokens) for a chunk after the other.
template <class Body>
FC_INLINE void for_chunks(const MlpTask& task, const Body& body) {
  for (int64_t token = task.begin; token < task.end; token += kChunk)
    body(token, task.end - token < kChunk ? task.end - token : kChunk);
}

template <class A>
void forward_inner(const MlpParams& p, const MlpTask& task) {
  const Columns<A> columns(task, p.hidden);
  const Factor<A> up = Factor<A>::forward(p.up, p.width);
  const Factor<A> gate = p.gated ? Factor<A>::forward(p.gate, p.width) : up;
  const Prefetch of_up = up.fetched(0, columns.first, columns.width);
  const Prefetch of_next = gate.fetched(0, columns.next, columns.next_width);
  A *scratch = static_cast<A*>(task.scratch), *first = scratch + kPackedSize<A> + kEdgeSize;
  A* second = p.gated ? first + kChunkSize<A> : first;
  for_chunks(task, [&](int64_t token, int64_t rows) {
    const A* x = x_row<A>(p, token);
    if (p.gated)
      multiply_columns<A>(gate, columns, of_up, x, p.x_row_stride, rows, bias<A>(p.gate, columns.first), first,
                          kTile<A>, scratch);
    multiply_columns<A>(up, columns, of_next, x, p.x_row_stride, rows, bias<A>(p.up, columns.first), second, kTile<A>,
                        scratch);
    activate_any<A>(p, static_cast<const A*>(first), static_cast<const A*>(second), rows, columns.width,
                    plane<A>(task.inner, p, 0, token, columns.first), plane<A>(p.slopes, p, 0, token, columns.first),
                    plane<A>(p.slopes, p, 1, token, columns.first));
  });
}

template <class A>
void forward_outer(const MlpParams& p, const MlpTask& task) {
  const Columns<A> columns(task, p.width);
  const Factor<A> down = Factor<A>::forward(p.down, p.hidden);
  const Plane<A> hidden = plane<A>(task.inner, p, 0, task.begin, 0);
  A* y = static_cast<A*>(p.y) + task.begin * p.width + columns.first;
  multiply_columns<A>(down, columns, down.fetched(0, columns.next, columns.next_width), hidden.data, p.hidden,
                      task.end - task.begin, bias<A>(p.down, columns.first), y, p.width,
                      static_cast<A*>(task.scratch));
}

template <class A>
void backward_inner(const MlpParams& p, const MlpTask& task) {
  constexpr int kLanes = Simd<A>::kLanes;
  const Columns<A> columns(task, p.hidden);
  const Factor<A> down = Factor<A>::backward(p.down, p.width);
  const Prefetch of_next = down.fetched(0, columns.next, columns.next_width);
  A *scratch = static_cast<A*>(task.scratch), *of_hidden = scratch + kPackedSize<A> + kEdgeSize;
  for_chunks(task, [&](int64_t token, int64_t rows) {
    multiply_columns<A>(down, columns, of_next, x_row<A>(p, token), p.x_row_stride, rows, {}, of_hidden, kTile<A>,
                        scratch);
    for (int number = 0; number < (p.gated ? 2 : 1); ++number) {
      const Plane<A> to = plane<A>(task.inner, p, number, token, columns.first);
      const Plane<A> slopes = plane<A>(p.slopes, p, number, token, columns.first);
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t c = 0; c < columns.width; c += kLanes) {
          const Vec<A> slope = load_some(slopes.data + row * slopes.stride + c, columns.width - c);
          to.store(row, c, Traits<A>::load(of_hidden + row * kTile<A> + c) * slope, columns.width - c);
        }
      }
    }
  });
}

template <class A>
void backward_outer(const MlpParams& p, const MlpTask& task) {
  const Columns<A> columns(task, p.width);
  const Factor<A> up = Factor<A>::backward(p.up, p.hidden);
  const Factor<A> gate = p.gated ? Factor<A>::backward(p.gate, p.hidden) : up;
  const Prefetch of_up = up.fetched(0, columns.first, columns.width);
  const Prefetch of_next = gate.fetched(0, columns.next, columns.next_width);
  const int64_t rows = task.end - task.begin;
  A* scratch = static_cast<A*>(task.scratch);
  A* grad_x = static_cast<A*>(p.y) + task.begin * p.width + columns.first;
  Start<A> start;
  if (p.gated) {
    multiply_columns<A>(gate, columns, of_up, plane<A>(task.inner, p, 0, task.begin, 0).data, p.hidden, rows, start,
                        grad_x, p.width, scratch);
    start = {grad_x, p.width};
  }
  const Plane<A> of_up_products = plane<A>(task.inner, p, p.gated ? 1 : 0, task.begin, 0);
  multiply_columns<A>(up, columns, of_next, of_up_products.data, p.hidden, rows, start, grad_x, p.width, scratch);
}

template <class A>
constexpr MlpKernels kMlp = {kTile<A>,
                             sizeof(A),
                             (kPackedSize<A> + kEdgeSize + 2 * kChunkSize<A>) * int64_t(sizeof(A)),
                             forward_inner<A>,
                             forward_outer<A>,
                             backward_inner<A>,
                             backward_outer<A>};

}  // namespace

const MlpKernels& mlp_kernels(Dtype dtype) { return dtype == Dtype::f64 ? kMlp<double> : kMlp<float>; }

}  // namespace FC_ISA
}  // namespace fastcircuit
