// The steer kernel. One source, one object per instruction set (MECHANEX_LEVEL names it): no library calls but memcpy,
// no globals with constructors, nothing with external linkage but the table at the end.
#include "../steer.h"

#include "vectors.h"

using namespace mechanex;

namespace {

// Rows of one edit that are computed together, so that its table is read once for all of them.
#if MX_BYTES == 64
enum : int { kTogether = 4 };
#else
enum : int { kTogether = 2 };  // 16 registers hold no more sums
#endif

// Coordinates of M rows along J directions: out[m][j] = x[m] . directions[j]. The result's memory y is fetched
// meanwhile.
template <class E, class Table, int M, int J>
MX_INLINE void project(const typename E::Stored* const* x, const typename E::Stored* const* y,
                       const typename E::Scalar* directions, int64_t d, typename E::Scalar (*out)[kMaxRank]) {
  using V = typename E::Vector;
  using S = typename E::Scalar;
  constexpr int64_t kWidth = sizeof(V) / sizeof(S);
  // Independent sums hide the latency of a multiply-add. How a row is summed must not depend on M: its result would
  // change with its neighbours.
  constexpr int kUnroll = J == 1 ? 4 : 1;
  V sums[M][J][kUnroll] = {};
  int64_t c = 0;
  for (; c + kUnroll * kWidth <= d; c += kUnroll * kWidth) {
    for (int u = 0; u < kUnroll; ++u) {
      V values[M];
      for (int m = 0; m < M; ++m) {
        values[m] = E::load(x[m] + c + u * kWidth);
        __builtin_prefetch(y[m] + c + u * kWidth, 1, 2);
      }
      for (int j = 0; j < J; ++j) {
        const V direction = Table::load(directions + j * d + c + u * kWidth);
        for (int m = 0; m < M; ++m) sums[m][j][u] += values[m] * direction;
      }
    }
  }
  for (; c < d; c += kWidth) {
    const int64_t n = d - c < kWidth ? d - c : kWidth;
    for (int m = 0; m < M; ++m) {
      const V value = load_part<E>(x[m] + c, n);
      for (int j = 0; j < J; ++j) sums[m][j][0] += value * load_part<Table>(directions + j * d + c, n);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int j = 0; j < J; ++j) {
      V total = sums[m][j][0];
      for (int u = 1; u < kUnroll; ++u) total += sums[m][j][u];
      out[m][j] = sum<V, S>(total);
    }
  }
}

// y = x + bias + the coordinates times their left vectors, for M rows of one edit. The rows at `next` are fetched
// meanwhile: each of the two loops leaves half of the memory's traffic idle.
template <class E, class Table, int M>
MX_INLINE void edit_rows(const typename E::Stored* const* x, typename E::Stored* const* y,
                         const typename E::Stored* const* next, const typename E::Scalar* bias,
                         const typename E::Scalar* left, const typename E::Scalar* right, int64_t rank, int64_t d) {
  using V = typename E::Vector;
  constexpr int64_t kWidth = sizeof(V) / sizeof(typename E::Scalar);
  typename E::Scalar coordinates[M][kMaxRank];
  int64_t j = 0;
  for (; j + 4 <= rank; j += 4) {
    project<E, Table, M, 4>(x, y, right + j * d, d, (typename E::Scalar(*)[kMaxRank]) & coordinates[0][j]);
  }
  for (; j < rank; ++j) {
    project<E, Table, M, 1>(x, y, right + j * d, d, (typename E::Scalar(*)[kMaxRank]) & coordinates[0][j]);
  }
  int64_t c = 0;
  for (; c + kWidth <= d; c += kWidth) {
    V start = {};
    if (bias != nullptr) start = Table::load(bias + c);
    V changes[M];
    for (int m = 0; m < M; ++m) changes[m] = start;
    for (int64_t i = 0; i < rank; ++i) {
      const V direction = Table::load(left + i * d + c);
      for (int m = 0; m < M; ++m) changes[m] += coordinates[m][i] * direction;
    }
    for (int m = 0; m < M; ++m) {
      E::store(y[m] + c, E::load(x[m] + c) + changes[m]);
      __builtin_prefetch(next[m] + c, 0, 2);
    }
  }
  if (c < d) {
    const int64_t n = d - c;
    for (int m = 0; m < M; ++m) {
      V change = {};
      if (bias != nullptr) change = load_part<Table>(bias + c, n);
      for (int64_t i = 0; i < rank; ++i) change += coordinates[m][i] * load_part<Table>(left + i * d + c, n);
      store_part<E>(y[m] + c, load_part<E>(x[m] + c, n) + change, n);
    }
  }
}

MX_INLINE int64_t row_at(const SteerArgs* args, int64_t t) { return args->order == nullptr ? t : args->order[t]; }

template <class E, class Table>
void steer(const SteerArgs* args, int64_t begin, int64_t end) {
  using Stored = typename E::Stored;
  using Scalar = typename E::Scalar;
  const int64_t d = args->d;
  const int64_t rank = args->rank;
  const Scalar* left = (const Scalar*)args->left;
  const Scalar* right = (const Scalar*)args->right;
  int64_t t = begin;
  while (t < end) {
    const Stored* x[kTogether];
    Stored* y[kTogether];
    int64_t k = 0;
    int n = 0;
    for (; n < kTogether && t + n < end; ++n) {
      const int64_t row = row_at(args, t + n);
      const int64_t found = args->rows == nullptr ? 0 : args->rows[row * args->rows_stride];
      if (n == 0) k = found;
      if (found != k) break;
      x[n] = (const Stored*)args->x + row * args->x_stride;
      y[n] = (Stored*)args->y + row * args->y_stride;
    }
    if (k < 0 || k >= args->n_edits) {
      for (int m = 0; m < n; ++m) __builtin_memcpy(y[m], x[m], d * sizeof(Stored));
    } else {
      const Stored* next[kTogether];
      for (int m = 0; m < n; ++m)
        next[m] = t + n + m < end ? (const Stored*)args->x + row_at(args, t + n + m) * args->x_stride : x[m];
      const Scalar* bias = args->bias == nullptr ? nullptr : (const Scalar*)args->bias + k * d;
      const Scalar* l = left + k * rank * d;
      const Scalar* r = right + k * rank * d;
      // One copy of the code per size of group: what is left of an edit's rows shares its table too.
      if (rank > 1 && n == kTogether) {
        edit_rows<E, Table, kTogether>(x, y, next, bias, l, r, rank, d);
      } else if (rank > 1 && n == kTogether - 1 && n > 1) {
        edit_rows<E, Table, kTogether - 1>(x, y, next, bias, l, r, rank, d);
      } else if (rank > 1 && n == 2) {
        edit_rows<E, Table, 2>(x, y, next, bias, l, r, rank, d);
      } else {
        for (int m = 0; m < n; ++m) edit_rows<E, Table, 1>(x + m, y + m, next + m, bias, l, r, rank, d);
      }
    }
    t += n;
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
