// The steer kernel. One source, one object per instruction set (MECHANEX_LEVEL names it): no library calls but memcpy,
// no globals with constructors, nothing with external linkage but the table at the end.
#include "../steer.h"

#include "vectors.h"

using namespace mechanex;

namespace {

// Coordinates of one row along J directions: a row of x is read once for all of them.
template <class E, class Table, int J>
MX_INLINE void project(const typename E::Stored* x, const typename E::Scalar* directions, int64_t d,
                       typename E::Scalar* out) {
  using V = typename E::Vector;
  using S = typename E::Scalar;
  constexpr int64_t kWidth = sizeof(V) / sizeof(S);
  // Enough independent sums to hide the latency of a multiply-add.
  constexpr int kUnroll = J == 1 ? 4 : 2;
  V sums[J][kUnroll] = {};
  int64_t c = 0;
  for (; c + kUnroll * kWidth <= d; c += kUnroll * kWidth) {
    for (int u = 0; u < kUnroll; ++u) {
      const V value = E::load(x + c + u * kWidth);
      for (int j = 0; j < J; ++j) sums[j][u] += value * Table::load(directions + j * d + c + u * kWidth);
    }
  }
  for (; c + kWidth <= d; c += kWidth) {
    const V value = E::load(x + c);
    for (int j = 0; j < J; ++j) sums[j][0] += value * Table::load(directions + j * d + c);
  }
  if (c < d) {
    const V value = load_part<E>(x + c, d - c);
    for (int j = 0; j < J; ++j) sums[j][0] += value * load_part<Table>(directions + j * d + c, d - c);
  }
  for (int j = 0; j < J; ++j) {
    V total = sums[j][0];
    for (int u = 1; u < kUnroll; ++u) total += sums[j][u];
    out[j] = sum<V, S>(total);
  }
}

// The edit's change of columns c to c + width: the bias plus the coordinates times their left vectors.
template <class Table, bool Part>
MX_INLINE typename Table::Vector change(const typename Table::Scalar* bias, const typename Table::Scalar* left,
                                        const typename Table::Scalar* coordinates, int64_t rank, int64_t d, int64_t c) {
  using V = typename Table::Vector;
  V total = {};
  if (bias != nullptr) total = Part ? load_part<Table>(bias + c, d - c) : Table::load(bias + c);
  for (int64_t j = 0; j < rank; ++j) {
    const typename Table::Scalar* p = left + j * d + c;
    total += coordinates[j] * (Part ? load_part<Table>(p, d - c) : Table::load(p));
  }
  return total;
}

template <class E, class Table>
MX_INLINE void edit_row(const typename E::Stored* x, typename E::Stored* y, const typename E::Scalar* bias,
                        const typename E::Scalar* left, const typename E::Scalar* right, int64_t rank, int64_t d) {
  using V = typename E::Vector;
  constexpr int64_t kWidth = sizeof(V) / sizeof(typename E::Scalar);
  typename E::Scalar coordinates[kMaxRank];
  int64_t j = 0;
  for (; j + 4 <= rank; j += 4) project<E, Table, 4>(x, right + j * d, d, coordinates + j);
  for (; j < rank; ++j) project<E, Table, 1>(x, right + j * d, d, coordinates + j);
  int64_t c = 0;
  for (; c + kWidth <= d; c += kWidth)
    E::store(y + c, E::load(x + c) + change<Table, false>(bias, left, coordinates, rank, d, c));
  if (c < d) {
    const V value = load_part<E>(x + c, d - c);
    store_part<E>(y + c, value + change<Table, true>(bias, left, coordinates, rank, d, c), d - c);
  }
}

template <class E, class Table>
void steer(const SteerArgs* args, int64_t begin, int64_t end) {
  using Stored = typename E::Stored;
  using Scalar = typename E::Scalar;
  const int64_t d = args->d;
  const int64_t rank = args->rank;
  const Scalar* bias = (const Scalar*)args->bias;
  const Scalar* left = (const Scalar*)args->left;
  const Scalar* right = (const Scalar*)args->right;
  for (int64_t t = begin; t < end; ++t) {
    const Stored* x = (const Stored*)args->x + t * args->x_stride;
    Stored* y = (Stored*)args->y + t * args->y_stride;
    const int64_t k = args->rows == nullptr ? 0 : args->rows[t * args->rows_stride];
    if (k < 0 || k >= args->n_edits) {
      __builtin_memcpy(y, x, d * sizeof(Stored));
      continue;
    }
    edit_row<E, Table>(x, y, bias == nullptr ? nullptr : bias + k * d, left + k * rank * d, right + k * rank * d, rank,
                       d);
  }
}

}  // namespace

#define MX_JOIN(a, b) a##b
#define MX_TABLE(level) MX_JOIN(mechanex_cpu_, level)
#define MX_QUOTE(text) #text
#define MX_NAME(level) MX_QUOTE(level)

extern "C" const CpuKernels* MX_TABLE(MECHANEX_LEVEL)() {
  static const CpuKernels table = {
      MX_NAME(MECHANEX_LEVEL),
      {steer<Float32, Float32>, steer<Float64, Float64>, steer<BFloat16, Float32>, steer<Float16, Float32>},
  };
  return &table;
}
