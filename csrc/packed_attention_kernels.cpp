// Compiled once per instruction set, with FC_ISA its name and FC_VECTOR_BYTES the size of its registers.
// A register holds one number of as many queries: a score of each, say. Their maxima, sums and means are then taken
// lane by lane, and what is left are products of small matrices, all of one form (multiply).
#include "exponential.h"
#include "packed_attention.h"
#include "transpose.h"

namespace fastcircuit {
namespace FC_ISA {
namespace {

template <class A>
FC_INLINE int64_t round_up(int64_t n) {
  constexpr int64_t kLanes = Simd<A>::kLanes;
  return (n + kLanes - 1) / kLanes * kLanes;
}

template <class A>
FC_INLINE Vec<A> iota() {
  Vec<A> v;
  for (int i = 0; i < Simd<A>::kLanes; ++i) v[i] = A(i);
  return v;
}

// c[m, :] = sum_k a[m, k] b[k, :], or that added, for `Rows` rows and one register of columns.
template <class A, int Rows, bool Add>
FC_INLINE void multiply_rows(const A* a, int64_t a_row, int64_t a_step, int64_t depth, const A* b, int64_t b_row, A* c,
                             int64_t c_row) {
  Vec<A> sums[Rows];
  for (int m = 0; m < Rows; ++m) sums[m] = Add ? Traits<A>::load(c + m * c_row) : Vec<A>{};
  for (int64_t k = 0; k < depth; ++k) {
    const Vec<A> row = Traits<A>::load(b + k * b_row);
    for (int m = 0; m < Rows; ++m) sums[m] += splat(a[m * a_row + k * a_step]) * row;
  }
  for (int m = 0; m < Rows; ++m) Traits<A>::store(c + m * c_row, sums[m]);
}

// The same for any number of rows; a[m, k] lies at m * a_row + k * a_step.
template <class A, bool Add = false>
FC_INLINE void multiply(int64_t rows, const A* a, int64_t a_row, int64_t a_step, int64_t depth, const A* b,
                        int64_t b_row, A* c, int64_t c_row) {
  int64_t m = 0;
  for (; m + 8 <= rows; m += 8)
    multiply_rows<A, 8, Add>(a + m * a_row, a_row, a_step, depth, b, b_row, c + m * c_row, c_row);
  a += m * a_row;
  c += m * c_row;
  switch (rows - m) {
    case 7: return multiply_rows<A, 7, Add>(a, a_row, a_step, depth, b, b_row, c, c_row);
    case 6: return multiply_rows<A, 6, Add>(a, a_row, a_step, depth, b, b_row, c, c_row);
    case 5: return multiply_rows<A, 5, Add>(a, a_row, a_step, depth, b, b_row, c, c_row);
    case 4: return multiply_rows<A, 4, Add>(a, a_row, a_step, depth, b, b_row, c, c_row);
    case 3: return multiply_rows<A, 3, Add>(a, a_row, a_step, depth, b, b_row, c, c_row);
    case 2: return multiply_rows<A, 2, Add>(a, a_row, a_step, depth, b, b_row, c, c_row);
    case 1: return multiply_rows<A, 1, Add>(a, a_row, a_step, depth, b, b_row, c, c_row);
  }
}

// As many queries as a register has lanes, of one head and one sequence, and the keys that any of them sees.
template <class S, class A = typename Traits<S>::Accumulate>
struct Block {
  static constexpr int kLanes = Simd<A>::kLanes;
  int64_t first, count;  // queries
  int64_t begin, end;    // keys

  FC_INLINE Block(const AttentionParams& p, int64_t first, int64_t length)
      : first(first),
        count(length - first < kLanes ? length - first : kLanes),
        begin(p.window > 0 && first >= p.window ? first - p.window + 1 : 0),
        end(length) {
    const int64_t last = first + count - 1 + (p.causal ? 1 : p.window);
    if ((p.causal || p.window > 0) && last < length) end = last;
  }

  FC_INLINE int64_t keys() const { return end - begin; }

  // scores[key, query] -> exp(score - the query's largest), 0 where the key is not seen; returns 1 / the sums.
  FC_INLINE Vec<A> exponentials(const AttentionParams& p, A* scores) const {
    const A huge = A(__builtin_huge_val());
    const Vec<A> queries = iota<A>() + A(first), lowest = splat(-huge);
    const Vec<A> nearest = splat(p.causal ? A(0) : p.window > 0 ? A(1 - p.window) : -huge);
    const Vec<A> furthest = splat(p.window > 0 ? A(p.window - 1) : huge);
    Vec<A> most = lowest;
    for (int64_t key = begin; key < end; ++key, scores += kLanes) {
      const Vec<A> back = queries - A(key), score = Traits<A>::load(scores);
      const Vec<A> seen = (back >= nearest) & (back <= furthest) ? score : lowest;
      Traits<A>::store(scores, seen);
      most = most > seen ? most : seen;
    }
    scores -= keys() * kLanes;
    Vec<A> sum{};
    for (int64_t n = 0; n < keys(); ++n, scores += kLanes) {
      const Vec<A> e = exp_of(Traits<A>::load(scores) - most);
      Traits<A>::store(scores, e);
      sum += e;
    }
    return splat(A(1)) / sum;
  }
};

// Columns: numbers of one sequence's tokens side by side, [width, stride], where a token has a row in memory. They are
// loaded with zeros between the last token and the next whole register.
template <class S, class A = typename Traits<S>::Accumulate>
struct Columns {
  int64_t length, stride;

  FC_INLINE int64_t padded() const { return round_up<A>(length); }

  FC_INLINE void load(const S* rows, int64_t row, int64_t width, A* to) const {
    transpose(rows, row, length, width, to, stride);
    for (int64_t c = 0; c < width; ++c)
      for (int64_t n = length; n < padded(); ++n) to[c * stride + n] = 0;
  }

  FC_INLINE void store(const A* from, int64_t width, S* rows, int64_t row) const {
    transpose<A, S>(from, stride, width, length, rows, row);
  }

  FC_INLINE void scale(int64_t width, A factor, A* x) const {
    for (int64_t c = 0; c < width; ++c)
      for (int64_t n = 0; n < length; n += Simd<A>::kLanes)
        Traits<A>::store(x + c * stride + n, Traits<A>::load(x + c * stride + n) * factor);
  }

  // Turns every token by its position, in place: the half-split layout, (a cos - b sin, b cos + a sin); or, Back, from
  // the gradient of what was turned to that of what it was.
  template <bool Back>
  FC_INLINE void turn(int64_t rotary, const A* cos, const A* sin, A* x) const {
    const int64_t half = rotary / 2 * stride;
    for (int64_t c = 0; c < half; c += stride) {
      for (int64_t n = c; n < c + length; n += Simd<A>::kLanes) {
        const Vec<A> a = Traits<A>::load(x + n), b = Traits<A>::load(x + n + half);
        const Vec<A> cos_a = Traits<A>::load(cos + n), cos_b = Traits<A>::load(cos + n + half);
        const Vec<A> sin_a = Traits<A>::load(sin + n), sin_b = Traits<A>::load(sin + n + half);
        Traits<A>::store(x + n, Back ? a * cos_a + b * sin_b : a * cos_a - b * sin_a);
        Traits<A>::store(x + n + half, Back ? b * cos_b - a * sin_a : b * cos_b + a * sin_b);
      }
    }
  }
};

// What a thread keeps of one sequence: columns of a head, tables of positions, and the weights [keys, lanes] of a block
// of queries; for the gradients of keys and values also rows, [tokens, wide] of these and [lanes, wide] of the block.
template <class S, class A = typename Traits<S>::Accumulate>
struct Layout {
  explicit Layout(const AttentionParams& p)
      : stride(round_up<A>(p.longest)),
        wide(round_up<A>(p.width)),
        columns(p.width * stride),
        table(p.rotary * stride),
        weights(p.longest * Simd<A>::kLanes),
        rows(p.longest * wide),
        few(Simd<A>::kLanes * wide) {}

  int64_t stride, wide, columns, table, weights, rows, few;
  int64_t forward() const { return 2 * table + 4 * columns + weights; }
  int64_t backward() const { return 2 * table + 5 * columns + 2 * weights + 2 * rows + 2 * few; }
};

// One sequence with a key and value head: both as columns, and the tables that its tokens are turned by.
template <class S, class A = typename Traits<S>::Accumulate>
struct Sequence {
  const AttentionParams& p;
  int64_t start;
  Columns<S> columns;
  A *cos, *sin, *keys, *values;

  FC_INLINE Sequence(const AttentionParams& p, const Layout<S>& layout, int64_t sequence, int64_t kv_head, A* scratch)
      : p(p),
        start(p.starts[sequence]),
        columns{p.starts[sequence + 1] - start, layout.stride},
        cos(scratch),
        sin(cos + layout.table),
        keys(sin + layout.table),
        values(keys + layout.columns) {
    columns.load(static_cast<const S*>(p.cos) + start * p.rotary, p.rotary, p.rotary, cos);
    columns.load(static_cast<const S*>(p.sin) + start * p.rotary, p.rotary, p.rotary, sin);
    load_head(p.key, kv_head, keys);
    columns.template turn<false>(p.rotary, cos, sin, keys);
    load_head(p.value, kv_head, values);
  }

  FC_INLINE int64_t length() const { return columns.length; }
  FC_INLINE int64_t place(int64_t head) const { return (head * p.tokens + start) * p.width; }
  FC_INLINE int64_t place_out(int64_t head, int64_t first) const {
    return ((start + first) * p.heads + head) * p.width;
  }

  FC_INLINE void load_head(const void* all, int64_t head, A* to) const {
    columns.load(static_cast<const S*>(all) + place(head), p.width, p.width, to);
  }

  FC_INLINE void store_head(const A* from, void* all, int64_t head) const {
    columns.store(from, p.width, static_cast<S*>(all) + place(head), p.width);
  }

  // Turned, and times the scale: so is then the gradient of the keys.
  FC_INLINE void load_query(int64_t head, A* to) const {
    load_head(p.query, head, to);
    columns.template turn<false>(p.rotary, cos, sin, to);
    columns.scale(p.width, A(p.scale), to);
  }
};

template <class S, class A = typename Traits<S>::Accumulate>
void forward(const AttentionParams& p, int64_t sequence, int64_t kv_head, void* scratch) {
  constexpr int kLanes = Simd<A>::kLanes;
  const Layout<S> layout(p);
  const int64_t stride = layout.stride;
  const Sequence<S> own(p, layout, sequence, kv_head, static_cast<A*>(scratch));
  A* const query = own.values + layout.columns;
  A* const mixed = query + layout.columns;
  A* const weights = mixed + layout.columns;
  for (int64_t head = 0; head < p.heads; ++head) {
    if (p.kv_of_head[head] != kv_head) continue;
    own.load_query(head, query);
    for (int64_t first = 0; first < own.length(); first += kLanes) {
      const Block<S> block(p, first, own.length());
      const int64_t begin = block.begin, keys = block.keys();
      multiply(keys, own.keys + begin, 1, stride, p.width, query + first, stride, weights, kLanes);
      const Vec<A> inverse = block.exponentials(p, weights);
      multiply(p.width, own.values + begin, stride, 1, keys, weights, kLanes, mixed + first, stride);
      for (int64_t c = first; c < layout.columns; c += stride)
        Traits<A>::store(mixed + c, Traits<A>::load(mixed + c) * inverse);
    }
    own.columns.store(mixed, p.width, static_cast<S*>(p.out) + own.place_out(head, 0), p.heads * p.width);
  }
}

// weights[key, query] <- softmax; grads[key, query], those of the weights, <- of the scores
template <class S, class A = typename Traits<S>::Accumulate>
FC_INLINE void softmax_backward(const AttentionParams& p, const Block<S>& block, A* weights, A* grads) {
  constexpr int kLanes = Simd<A>::kLanes;
  const Vec<A> inverse = block.exponentials(p, weights);
  Vec<A> mean{};
  for (int64_t n = 0; n < block.keys() * kLanes; n += kLanes) {
    const Vec<A> weight = Traits<A>::load(weights + n) * inverse;
    Traits<A>::store(weights + n, weight);
    mean += weight * Traits<A>::load(grads + n);
  }
  for (int64_t n = 0; n < block.keys() * kLanes; n += kLanes)
    Traits<A>::store(grads + n, Traits<A>::load(weights + n) * (Traits<A>::load(grads + n) - mean));
}

template <class S, class A = typename Traits<S>::Accumulate>
void backward(const AttentionParams& p, int64_t sequence, int64_t kv_head, void* scratch) {
  constexpr int kLanes = Simd<A>::kLanes;
  const Layout<S> layout(p);
  const int64_t stride = layout.stride, wide = layout.wide;
  const Sequence<S> own(p, layout, sequence, kv_head, static_cast<A*>(scratch));
  A* const query = own.values + layout.columns;
  A* const grad_out = query + layout.columns;
  A* const grad_query = grad_out + layout.columns;
  A* const weights = grad_query + layout.columns;
  A* const grads = weights + layout.weights;
  A* const grad_keys = grads + layout.weights;  // rows, as all that follow
  A* const grad_values = grad_keys + layout.rows;
  A* const query_rows = grad_values + layout.rows;
  A* const grad_rows = query_rows + layout.few;
  const S* const all_grads = static_cast<const S*>(p.grad_out);
  const int64_t out_row = p.heads * p.width;
  std::memset(grad_keys, 0, sizeof(A) * 2 * (layout.rows + layout.few));
  for (int64_t head = 0; head < p.heads; ++head) {
    if (p.kv_of_head[head] != kv_head) continue;
    own.load_query(head, query);
    own.columns.load(all_grads + own.place_out(head, 0), out_row, p.width, grad_out);
    for (int64_t first = 0; first < own.length(); first += kLanes) {
      const Block<S> block(p, first, own.length());
      const int64_t begin = block.begin, keys = block.keys();
      multiply(keys, own.keys + begin, 1, stride, p.width, query + first, stride, weights, kLanes);
      multiply(keys, own.values + begin, 1, stride, p.width, grad_out + first, stride, grads, kLanes);
      softmax_backward(p, block, weights, grads);
      multiply(p.width, own.keys + begin, stride, 1, keys, grads, kLanes, grad_query + first, stride);
      transpose(query + first, stride, p.width, block.count, query_rows, wide);
      copy(all_grads + own.place_out(head, first), out_row, block.count, p.width, grad_rows, wide);
      for (int64_t c = 0; c < wide; c += kLanes) {
        const int64_t at = begin * wide + c;
        multiply<A, true>(keys, grads, kLanes, 1, block.count, query_rows + c, wide, grad_keys + at, wide);
        multiply<A, true>(keys, weights, kLanes, 1, block.count, grad_rows + c, wide, grad_values + at, wide);
      }
    }
    own.columns.scale(p.width, A(p.scale), grad_query);
    own.columns.template turn<true>(p.rotary, own.cos, own.sin, grad_query);
    own.store_head(grad_query, p.grad_query, head);
  }
  transpose(grad_keys, wide, own.length(), p.width, query, stride);
  own.columns.template turn<true>(p.rotary, own.cos, own.sin, query);
  own.store_head(query, p.grad_key, kv_head);
  copy(grad_values, wide, own.length(), p.width, static_cast<S*>(p.grad_value) + own.place(kv_head), p.width);
}

template <class S, class A = typename Traits<S>::Accumulate>
int64_t forward_scratch(const AttentionParams& p) {
  return Layout<S>(p).forward() * int64_t(sizeof(A));
}

template <class S, class A = typename Traits<S>::Accumulate>
int64_t backward_scratch(const AttentionParams& p) {
  return Layout<S>(p).backward() * int64_t(sizeof(A));
}

template <class S>
constexpr AttentionKernels kAttention = {forward_scratch<S>, forward<S>, backward_scratch<S>, backward<S>};

}  // namespace

const AttentionKernels& attention_kernels(Dtype dtype) {
  if (dtype == Dtype::f64) return kAttention<double>;
  if (dtype == Dtype::f32) return kAttention<float>;
  return kAttention<Bf16>;
}

}  // namespace FC_ISA
}  // namespace fastcircuit
