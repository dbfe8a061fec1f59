// The general steer op: a row's edits one after another, with strengths and gates. Like steer.cpp: one source, one
// object per instruction set, no library calls but memcpy, nothing with external linkage but the table at the end.
#include "functions.h"
#include "project.h"

using namespace mechanex;

namespace {

MX_INLINE float root(float value) { return __builtin_sqrtf(value); }
MX_INLINE double root(double value) { return __builtin_sqrt(value); }

// What a gate makes of q, for the kinds that read it.
template <class V, class S>
MX_INLINE S opening(int32_t kind, S q) {
  if (kind == kStep) return q > 0 ? 1 : 0;
  if (kind == kRelu) return q <= 0 ? 0 : q;
  if (kind != kSigmoid) return (S)__builtin_nan("");
  // exp of what is not above 0 can't overflow.
  const S e = vector_exp(broadcast<V>(q < 0 ? q : -q))[0];
  return (q < 0 ? e : 1) / (1 + e);
}

template <class E>
MX_INLINE typename E::Scalar square_sum(const typename E::Stored* row, int64_t d) {
  using V = typename E::Vector;
  constexpr int64_t kWidth = sizeof(V) / sizeof(typename E::Scalar);
  V total = {};
  int64_t c = 0;
  for (; c + kWidth <= d; c += kWidth) {
    const V v = E::load(row + c);
    total = multiply_add(v, v, total);
  }
  if (c < d) {
    const V v = load_part<E>(row + c, d - c);
    total = multiply_add(v, v, total);
  }
  return sum<V, typename E::Scalar>(total);
}

// Applies edit k to a row of the arithmetic's own type, in place.
template <class Wide>
MX_INLINE void apply_edit(const SteerManyArgs* args, int64_t k, typename Wide::Scalar amount,
                          typename Wide::Scalar* row) {
  using V = typename Wide::Vector;
  using S = typename Wide::Scalar;
  constexpr int64_t kWidth = sizeof(V) / sizeof(S);
  const int64_t d = args->d, rank = args->rank;
  const S* const at[1] = {row};
  S coordinates[1][kMaxRank];
  if (rank > 0) project_all<Wide, Wide, 1>(at, at, (const S*)args->right + k * rank * d, rank, d, coordinates);
  const int32_t kind = args->kinds == nullptr ? (int32_t)kNone : args->kinds[k];
  if (kind != kNone && kind != kNorm) {
    S q[1][kMaxRank];
    project<Wide, Wide, 1, 1>(at, at, (const S*)args->weight + k * d, d, q);
    amount *= opening<V, S>(kind, q[0][0] + ((const S*)args->offset)[k]);
  }
  const S before = kind == kNorm ? square_sum<Wide>(row, d) : 0;
  const S* bias = (const S*)args->bias + k * d;
  const S* left = (const S*)args->left + k * rank * d;
  const V amounts = broadcast<V>(amount);
  int64_t c = 0;
  for (; c + kWidth <= d; c += kWidth) {
    V change = Wide::load(bias + c);
    for (int64_t i = 0; i < rank; ++i)
      change = multiply_add(broadcast<V>(coordinates[0][i]), Wide::load(left + i * d + c), change);
    Wide::store(row + c, multiply_add(amounts, change, Wide::load(row + c)));
  }
  if (c < d) {
    const int64_t n = d - c;
    V change = load_part<Wide>(bias + c, n);
    for (int64_t i = 0; i < rank; ++i)
      change = multiply_add(broadcast<V>(coordinates[0][i]), load_part<Wide>(left + i * d + c, n), change);
    store_part<Wide>(row + c, multiply_add(amounts, change, load_part<Wide>(row + c, n)), n);
  }
  if (kind != kNorm) return;
  const S after = square_sum<Wide>(row, d);
  if (after == 0) return;
  const S ratio = root(before) / root(after);
  for (c = 0; c + kWidth <= d; c += kWidth) Wide::store(row + c, Wide::load(row + c) * ratio);
  if (c < d) store_part<Wide>(row + c, load_part<Wide>(row + c, d - c) * ratio, d - c);
}

template <class E, class Wide>
void steer_many(const SteerManyArgs* args, int64_t begin, int64_t end, void* scratch) {
  using Stored = typename E::Stored;
  using S = typename E::Scalar;
  constexpr int64_t kWidth = sizeof(typename E::Vector) / sizeof(S);
  const int64_t d = args->d;
  S* row = (S*)scratch;
  for (int64_t t = begin; t < end; ++t) {
    const Stored* x = (const Stored*)args->x + t * args->x_stride;
    Stored* y = (Stored*)args->y + t * args->y_stride;
    bool read = false;
    for (int64_t i = 0; i < args->edits; ++i) {
      const int64_t k = args->rows == nullptr ? 0 : args->rows[t * args->edits + i];
      if (k < 0 || k >= args->n_edits) continue;
      int64_t c = 0;
      if (!read) {
        for (; c + kWidth <= d; c += kWidth) Wide::store(row + c, E::load(x + c));
        if (c < d) store_part<Wide>(row + c, load_part<E>(x + c, d - c), d - c);
        read = true;
      }
      const S strength = args->strength == nullptr ? 1 : ((const S*)args->strength)[t * args->edits + i];
      apply_edit<Wide>(args, k, strength, row);
    }
    if (!read) {
      __builtin_memcpy(y, x, d * sizeof(Stored));
      continue;
    }
    int64_t c = 0;
    for (; c + kWidth <= d; c += kWidth) E::store(y + c, Wide::load(row + c));
    if (c < d) store_part<E>(y + c, load_part<Wide>(row + c, d - c), d - c);
  }
}

}  // namespace

#define MX_JOIN(a, b) a##b
#define MX_TABLE(level) MX_JOIN(mechanex_cpu_steer_many_, level)

extern "C" const SteerManyKernels* MX_TABLE(MECHANEX_LEVEL)() {
  static const SteerManyKernels table = {{steer_many<Float32, Float32>, steer_many<Float64, Float64>,
                                          steer_many<BFloat16, Float32>, steer_many<Float16, Float32>}};
  return &table;
}
