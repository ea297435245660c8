// Compiled once per instruction set, with FC_ISA its name and FC_VECTOR_BYTES the size of its registers.
// Keys (and in backward values) are transposed once per sequence, so that one row of scores is a few vectors.
#include "packed_attention.h"
#include "simd.h"

namespace fastcircuit {
namespace FC_ISA {
namespace {

template <class A>
FC_INLINE int64_t round_up(int64_t n) {
  constexpr int64_t kLanes = Simd<A>::kLanes;
  return (n + kLanes - 1) / kLanes * kLanes;
}

// exp of numbers that are not above 0; NaN stays NaN. float: x = n ln 2 + r with |r| <= ln 2 / 2, and Taylor's
// polynomial of degree 7, whose next term is below a tenth of a unit in the last place.
FC_INLINE Vec<float> exp_of(Vec<float> x) {
  typedef int32_t Int __attribute__((vector_size(kBytes)));
  const Vec<float> lowest = splat(-87.0f);
  const Vec<float> above = x > lowest ? x : lowest;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> shifted = above * 1.44269504f + kRound;
  const Vec<float> n = shifted - kRound;
  const Vec<float> r = (above - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> y = splat(1.0f / 5040);
  y = y * r + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const Int power = ((Int)shifted - 0x4B400000 + 127) << 23;
  const Vec<float> result = x < lowest ? Vec<float>{} : y * (Vec<float>)power;
  return x == x ? result : x;
}

FC_INLINE Vec<double> exp_of(Vec<double> x) {
  for (int i = 0; i < Simd<double>::kLanes; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

template <class A>
FC_INLINE Vec<A> max_of(Vec<A> a, Vec<A> b) {
  return a > b ? a : b;
}

// Folds the upper half of a vector onto the lower one until one lane is left, all in registers.
template <class A, class V, class Fold>
FC_INLINE A fold_lanes(V v, const Fold& fold) {
  if constexpr (sizeof(V) == 2 * sizeof(A)) {
    typedef A One __attribute__((vector_size(sizeof(V))));
    const One swapped = {v[1], v[0]};
    return fold(v, swapped)[0];
  } else {
    typedef A Half __attribute__((vector_size(sizeof(V) / 2)));
    Half low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return fold_lanes<A>(fold(low, high), fold);
  }
}

template <class A>
FC_INLINE A largest(const Vec<A>& v) {
  return fold_lanes<A>(v, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
}

template <class A>
FC_INLINE A sum_of(const Vec<A>& v) {
  return fold_lanes<A>(v, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}

template <class A>
FC_INLINE Vec<A> iota() {
  Vec<A> v;
  for (int i = 0; i < Simd<A>::kLanes; ++i) v[i] = A(i);
  return v;
}

// Four numbers at a time: rows are short, and a call of memcpy costs more than what it copies.
template <class T>
FC_INLINE void copy_row(const T* from, int64_t width, T* to) {
  int64_t c = 0;
  for (; c + 4 <= width; c += 4) std::memcpy(to + c, from + c, 4 * sizeof(T));
  for (; c < width; ++c) to[c] = from[c];
}

template <class S, class A = typename Traits<S>::Accumulate>
FC_INLINE A number(const S& s) {
  if constexpr (sizeof(S) == sizeof(A)) {
    return s;
  } else {
    const uint32_t bits = uint32_t(s.bits) << 16;
    A value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
}

// x[width] <- S row, turned by its position: the half-split layout, y = (a cos - b sin, b cos + a sin).
template <class S, class A = typename Traits<S>::Accumulate>
FC_INLINE void load_row(const AttentionParams& p, const void* rows, int64_t at, int64_t token, bool turned, A* x) {
  const S* const row = static_cast<const S*>(rows) + at * p.width;
  if constexpr (sizeof(S) == sizeof(A)) {
    copy_row(row, p.width, x);
  } else {
    for (int64_t c = 0; c < p.width; ++c) x[c] = number<S>(row[c]);
  }
  if (!turned || p.rotary == 0) return;
  const S* const cos = static_cast<const S*>(p.cos) + token * p.rotary;
  const S* const sin = static_cast<const S*>(p.sin) + token * p.rotary;
  const int64_t half = p.rotary / 2;
  A* const __restrict low = x;
  A* const __restrict high = x + half;
  for (int64_t c = 0; c < half; ++c) {
    const A a = low[c], b = high[c];
    low[c] = a * number<S>(cos[c]) - b * number<S>(sin[c]);
    high[c] = b * number<S>(cos[c + half]) + a * number<S>(sin[c + half]);
  }
}

// The transpose of the turn, in place: from the gradient of a turned row to that of the row.
template <class S, class A = typename Traits<S>::Accumulate>
FC_INLINE void turn_back(const AttentionParams& p, int64_t token, A* g) {
  if (p.rotary == 0) return;
  const S* cos = static_cast<const S*>(p.cos) + token * p.rotary;
  const S* sin = static_cast<const S*>(p.sin) + token * p.rotary;
  const int64_t half = p.rotary / 2;
  for (int64_t c = 0; c < half; ++c) {
    const A a = g[c], b = g[c + half];
    g[c] = a * number<S>(cos[c]) + b * number<S>(sin[c + half]);
    g[c + half] = b * number<S>(cos[c + half]) - a * number<S>(sin[c]);
  }
}

template <class S, class A = typename Traits<S>::Accumulate>
FC_INLINE void store_row(S* row, const A* x, int64_t width) {
  if constexpr (sizeof(S) == sizeof(A)) {
    copy_row(x, width, row);
  } else {
    for (int64_t c = 0; c < width; c += Simd<A>::kLanes) store_some(row + c, Traits<A>::load(x + c), width - c);
  }
}

// out[n] = sum_d x[d] columns[d, n] for n in [begin, end), whole vectors; columns are `stride` apart.
template <class A>
FC_INLINE void row_times(const A* x, const A* columns, int64_t stride, int64_t depth, int64_t begin, int64_t end,
                         A* out) {
  constexpr int kLanes = Simd<A>::kLanes;
  int64_t n = begin;
  for (; n + 4 * kLanes <= end; n += 4 * kLanes) {
    Vec<A> acc[4] = {};
    for (int64_t d = 0; d < depth; ++d) {
      const Vec<A> xd = splat(x[d]);
      for (int v = 0; v < 4; ++v) acc[v] += xd * Traits<A>::load(columns + d * stride + n + v * kLanes);
    }
    for (int v = 0; v < 4; ++v) Traits<A>::store(out + n + v * kLanes, acc[v]);
  }
  for (; n < end; n += kLanes) {
    Vec<A> even{}, odd{};
    int64_t d = 0;
    for (; d + 2 <= depth; d += 2) {
      even += splat(x[d]) * Traits<A>::load(columns + d * stride + n);
      odd += splat(x[d + 1]) * Traits<A>::load(columns + (d + 1) * stride + n);
    }
    if (d < depth) even += splat(x[d]) * Traits<A>::load(columns + d * stride + n);
    Traits<A>::store(out + n, even + odd);
  }
}

// What one sequence's rows look like in the scratch of a thread. Rows are padded to whole vectors.
template <class S, class A = typename Traits<S>::Accumulate>
struct Layout {
  explicit Layout(const AttentionParams& p) : wide(round_up<A>(p.width)), longest(round_up<A>(p.longest)) {}

  int64_t wide, longest;
  int64_t rows() const { return longest * wide; }      // [tokens, wide]
  int64_t forward() const { return 2 * rows() + 2 * wide + longest; }
  int64_t backward() const { return 5 * rows() + 3 * wide + 2 * longest; }
};

// probabilities[0, end) of query token i, and the range [begin, end) of whole vectors outside of which they are 0.
template <class S, class A = typename Traits<S>::Accumulate>
struct Row {
  int64_t begin, end;

  FC_INLINE Row(const AttentionParams& p, int64_t i, int64_t length, const A* query, const A* keys, int64_t stride,
                A* probabilities) {
    constexpr int kLanes = Simd<A>::kLanes;
    const int64_t first = p.window > 0 && i + 1 > p.window ? i + 1 - p.window : 0;
    const int64_t last = p.causal ? i + 1 : (p.window > 0 && i + p.window < length ? i + p.window : length);
    begin = first / kLanes * kLanes;
    end = round_up<A>(last);
    row_times(query, keys, stride, p.width, begin, end, probabilities);
    const Vec<A> from = splat(A(first)), to = splat(A(last)), lanes = iota<A>();
    const Vec<A> scale = splat(A(p.scale)), lowest = splat(-A(__builtin_huge_val()));
    Vec<A> most = lowest;
    for (int64_t n = begin; n < end; n += kLanes) {
      const Vec<A> place = lanes + A(n);
      const Vec<A> score = Traits<A>::load(probabilities + n) * scale;
      const Vec<A> seen = (place >= from) & (place < to) ? score : lowest;
      Traits<A>::store(probabilities + n, seen);
      most = max_of<A>(most, seen);
    }
    const Vec<A> top = splat(largest<A>(most));
    Vec<A> sum{};
    for (int64_t n = begin; n < end; n += kLanes) {
      const Vec<A> e = exp_of(Traits<A>::load(probabilities + n) - top);
      Traits<A>::store(probabilities + n, e);
      sum += e;
    }
    const Vec<A> inverse = splat(A(1) / sum_of<A>(sum));
    for (int64_t n = begin; n < end; n += kLanes)
      Traits<A>::store(probabilities + n, Traits<A>::load(probabilities + n) * inverse);
  }
};

template <class A>
FC_INLINE void clear(A* x, int64_t count) {
  std::memset(x, 0, sizeof(A) * count);
}

template <class A>
FC_INLINE void transpose_into(const A* row, int64_t width, A* columns, int64_t stride, int64_t n) {
  for (int64_t c = 0; c < width; ++c) columns[c * stride + n] = row[c];
}

// y[j] += a * x over one padded row
template <class A>
FC_INLINE void add_row(A a, const A* x, int64_t wide, A* y) {
  const Vec<A> factor = splat(a);
  for (int64_t c = 0; c < wide; c += Simd<A>::kLanes)
    Traits<A>::store(y + c, Traits<A>::load(y + c) + factor * Traits<A>::load(x + c));
}

template <class S, class A = typename Traits<S>::Accumulate>
void forward(const AttentionParams& p, int64_t sequence, int64_t kv_head, void* scratch) {
  const Layout<S> layout(p);
  const int64_t start = p.starts[sequence], length = p.starts[sequence + 1] - start;
  A* const keys = static_cast<A*>(scratch);  // [width, longest]
  A* const values = keys + layout.rows();    // [longest, wide]
  A* const row = values + layout.rows();
  A* const mixed = row + layout.wide;
  A* const weights = mixed + layout.wide;
  clear(keys, 2 * layout.rows() + 2 * layout.wide);
  for (int64_t j = 0; j < length; ++j) {
    load_row<S>(p, p.key, kv_head * p.tokens + start + j, start + j, true, row);
    transpose_into(row, p.width, keys, layout.longest, j);
    load_row<S>(p, p.value, kv_head * p.tokens + start + j, start + j, false, values + j * layout.wide);
  }
  for (int64_t head = 0; head < p.heads; ++head) {
    if (p.kv_of_head[head] != kv_head) continue;
    for (int64_t i = 0; i < length; ++i) {
      load_row<S>(p, p.query, head * p.tokens + start + i, start + i, true, row);
      const Row<S> seen(p, i, length, row, keys, layout.longest, weights);
      const int64_t last = seen.end < length ? seen.end : length;
      row_times(weights + seen.begin, values + seen.begin * layout.wide, layout.wide, last - seen.begin, 0,
                layout.wide, mixed);
      store_row(static_cast<S*>(p.out) + ((start + i) * p.heads + head) * p.width, mixed, p.width);
    }
  }
}

template <class S, class A = typename Traits<S>::Accumulate>
void backward(const AttentionParams& p, int64_t sequence, int64_t kv_head, void* scratch) {
  constexpr int kLanes = Simd<A>::kLanes;
  const Layout<S> layout(p);
  const int64_t start = p.starts[sequence], length = p.starts[sequence + 1] - start;
  A* const keys = static_cast<A*>(scratch);    // [width, longest]
  A* const values = keys + layout.rows();      // [width, longest]
  A* const key_rows = values + layout.rows();  // [longest, wide]
  A* const grad_keys = key_rows + layout.rows();
  A* const grad_values = grad_keys + layout.rows();
  A* const row = grad_values + layout.rows();
  A* const grad_row = row + layout.wide;
  A* const grad_query = grad_row + layout.wide;
  A* const weights = grad_query + layout.wide;
  A* const grad_weights = weights + layout.longest;
  clear(keys, 5 * layout.rows() + 3 * layout.wide);
  for (int64_t j = 0; j < length; ++j) {
    const int64_t at = kv_head * p.tokens + start + j;
    load_row<S>(p, p.value, at, start + j, false, row);
    transpose_into(row, p.width, values, layout.longest, j);
    A* const key = key_rows + j * layout.wide;
    load_row<S>(p, p.key, at, start + j, true, key);
    transpose_into(key, p.width, keys, layout.longest, j);
  }
  clear(row, layout.wide);
  for (int64_t head = 0; head < p.heads; ++head) {
    if (p.kv_of_head[head] != kv_head) continue;
    for (int64_t i = 0; i < length; ++i) {
      load_row<S>(p, p.query, head * p.tokens + start + i, start + i, true, row);
      load_row<S>(p, p.grad_out, (start + i) * p.heads + head, start + i, false, grad_row);
      const Row<S> seen(p, i, length, row, keys, layout.longest, weights);
      row_times(grad_row, values, layout.longest, p.width, seen.begin, seen.end, grad_weights);
      Vec<A> products{};
      for (int64_t n = seen.begin; n < seen.end; n += kLanes)
        products += Traits<A>::load(weights + n) * Traits<A>::load(grad_weights + n);
      const Vec<A> mean = splat(sum_of<A>(products)), scale = splat(A(p.scale));
      for (int64_t n = seen.begin; n < seen.end; n += kLanes)
        Traits<A>::store(grad_weights + n,
                         Traits<A>::load(weights + n) * (Traits<A>::load(grad_weights + n) - mean) * scale);
      const int64_t last = seen.end < length ? seen.end : length;
      row_times(grad_weights + seen.begin, key_rows + seen.begin * layout.wide, layout.wide, last - seen.begin, 0,
                layout.wide, grad_query);
      for (int64_t j = seen.begin; j < last; ++j) {
        add_row(grad_weights[j], row, layout.wide, grad_keys + j * layout.wide);
        add_row(weights[j], grad_row, layout.wide, grad_values + j * layout.wide);
      }
      turn_back<S>(p, start + i, grad_query);
      store_row(static_cast<S*>(p.grad_query) + (head * p.tokens + start + i) * p.width, grad_query, p.width);
    }
  }
  for (int64_t j = 0; j < length; ++j) {
    const int64_t at = (kv_head * p.tokens + start + j) * p.width;
    turn_back<S>(p, start + j, grad_keys + j * layout.wide);
    store_row(static_cast<S*>(p.grad_key) + at, grad_keys + j * layout.wide, p.width);
    store_row(static_cast<S*>(p.grad_value) + at, grad_values + j * layout.wide, p.width);
  }
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
