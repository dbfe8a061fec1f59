// The reduction of the completion_logprob op. Like steer.cpp: one source, one object per instruction set, no library
// calls but memcpy, nothing with external linkage but the table at the end.
#include "../logprob.h"

#include "functions.h"

using namespace mechanex;

namespace {

// From a product to its logit: gain * tanh((product + bias) * slope), or (product + bias) * slope without a cap. The
// gain is positive, so that the largest argument has the largest logit.
template <class S>
struct Curve {
  S slope;
  S gain;
};

template <class S>
MX_INLINE Curve<S> curve_of(const ReduceArgs* args) {
  if (args->softcap == 0) return {(S)(args->scale * args->coldness), 1};
  const double gain = args->softcap * args->coldness;
  const double slope = args->scale / args->softcap;
  return gain < 0 ? Curve<S>{(S)-slope, (S)-gain} : Curve<S>{(S)slope, (S)gain};
}

// One row's products, a stretch of columns without the target; Table is the type of the bias.
template <class E, class Table>
struct Stretch {
  using V = typename E::Vector;
  using S = typename E::Scalar;
  using Int = typename Real<V>::Int;
  static constexpr int64_t kWidth = sizeof(V) / sizeof(S);

  typename E::Stored* products;
  const S* bias;
  int64_t n;

  MX_INLINE V arguments(int64_t c, S slope) const {
    V v = E::load(products + c);
    if (bias != nullptr) v += Table::load(bias + c);
    return v * slope;
  }

  // The last columns, fewer than a vector; what stands in the rest is no one's.
  MX_INLINE V last_arguments(int64_t c, S slope) const {
    V v = load_part<E>(products + c, n - c);
    if (bias != nullptr) v += load_part<Table>(bias + c, n - c);
    return v * slope;
  }

  MX_INLINE Int is_column(int64_t c) const {
    Int lane;
    for (int i = 0; i < kWidth; ++i) lane[i] = i;
    return bits<Int>(lane < (typename Real<V>::Word)(n - c));
  }

  MX_INLINE V largest(V best, S slope) const {
    int64_t c = 0;
    for (; c + kWidth <= n; c += kWidth) {
      const V v = arguments(c, slope);
      best = choose(v > best, v, best);
    }
    if (c < n) {
      const V v = last_arguments(c, slope);
      best = choose(is_column(c) & bits<Int>(v > best), v, best);
    }
    return best;
  }

  // exp(logit - maximum), and times the cap's derivative what a gradient needs of it.
  template <bool kCap, bool kSlope>
  MX_INLINE V share(V v, Curve<S> curve, S maximum, V* weighted) const {
    V bend = {};
    if (kCap) {
      const V bounded = vector_tanh(v);
      if (kSlope) bend = multiply_add(-bounded, bounded, broadcast<V>(1));
      v = bounded * curve.gain;
    }
    const V e = vector_exp(v - maximum);
    if (kSlope) *weighted = kCap ? e * bend : e;
    return e;
  }

  template <bool kCap, bool kSlope>
  MX_INLINE V fold(V sum, Curve<S> curve, S maximum) const {
    constexpr int kUnroll = 4;
    V sums[kUnroll] = {};
    V weighted = {};
    int64_t c = 0;
    for (; c + kUnroll * kWidth <= n; c += kUnroll * kWidth) {
      for (int u = 0; u < kUnroll; ++u) {
        sums[u] += share<kCap, kSlope>(arguments(c + u * kWidth, curve.slope), curve, maximum, &weighted);
        if (kSlope) E::store(products + c + u * kWidth, weighted);
      }
    }
    for (; c + kWidth <= n; c += kWidth) {
      sum += share<kCap, kSlope>(arguments(c, curve.slope), curve, maximum, &weighted);
      if (kSlope) E::store(products + c, weighted);
    }
    if (c < n) {
      const V e = share<kCap, kSlope>(last_arguments(c, curve.slope), curve, maximum, &weighted);
      sum += choose(is_column(c), e, V{});
      if (kSlope) store_part<E>(products + c, weighted, n - c);
    }
    return sum + ((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
};

template <class V>
MX_INLINE typename Real<V>::Scalar highest(V v) {
  typename Real<V>::Scalar best = v[0];
  for (int i = 1; i < (int)(sizeof(V) / sizeof(v[0])); ++i) best = v[i] > best ? v[i] : best;
  return best;
}

template <class E, class Table, bool kCap, bool kSlope>
MX_INLINE void reduce_row(const ReduceArgs* args, int64_t row) {
  using V = typename E::Vector;
  using S = typename E::Scalar;
  const S infinity = (S)__builtin_inf();
  const Curve<S> curve = curve_of<S>(args);
  const int64_t n = args->n_columns;
  typename E::Stored* products = (typename E::Stored*)args->products + row * n;
  const S* bias = (const S*)args->bias;
  const int64_t target = args->target[row * args->target_stride] - args->first;
  const bool inside = target >= 0 && target < n;

  Stretch<E, Table> parts[2] = {{products, bias, inside ? target : n}, {}};
  if (inside) parts[1] = {products + target + 1, bias == nullptr ? nullptr : bias + target + 1, n - target - 1};

  V best = broadcast<V>(-infinity);
  for (const Stretch<E, Table>& part : parts) best = part.largest(best, curve.slope);
  S found = highest(best);
  if (kCap && n > inside) found = vector_tanh(broadcast<V>(found))[0] * curve.gain;

  S* maximum = (S*)args->maximum + row;
  S* total = (S*)args->total + row;
  const S highest_yet = found > *maximum ? found : *maximum;
  // While every logit is -inf, any finite number serves: each share is 0.
  const S reference = highest_yet == -infinity ? 0 : highest_yet;
  const S factor = vector_exp(broadcast<V>(*maximum - reference))[0];
  V shares = {};
  for (const Stretch<E, Table>& part : parts) shares = part.template fold<kCap, kSlope>(shares, curve, reference);
  *total = *total * factor + sum<V, S>(shares);
  *maximum = highest_yet;
  if (kSlope) {
    ((S*)args->factor)[row] = factor;
    if (inside) products[target] = 0;
  }
}

template <class E, class Table, bool kCap, bool kSlope>
void reduce_rows(const ReduceArgs* args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) reduce_row<E, Table, kCap, kSlope>(args, row);
}

template <class E, class Table>
void reduce(const ReduceArgs* args, int64_t begin, int64_t end) {
  if (args->softcap == 0) {
    if (args->factor == nullptr) return reduce_rows<E, Table, false, false>(args, begin, end);
    return reduce_rows<E, Table, false, true>(args, begin, end);
  }
  if (args->factor == nullptr) return reduce_rows<E, Table, true, false>(args, begin, end);
  return reduce_rows<E, Table, true, true>(args, begin, end);
}

}  // namespace

#define MX_JOIN(a, b) a##b
#define MX_TABLE(level) MX_JOIN(mechanex_cpu_logprob_, level)

extern "C" const LogprobKernels* MX_TABLE(MECHANEX_LEVEL)() {
  static const LogprobKernels table = {
      {reduce<Float32, Float32>, reduce<Float64, Float64>, reduce<BFloat16, Float32>, nullptr}};
  return &table;
}
