// The steer kernel. One source, one object per instruction set (MECHANEX_LEVEL names it): no library calls but memcpy,
// no globals with constructors, nothing with external linkage but the table at the end.
#include "../steer.h"

#include "project.h"

using namespace mechanex;

namespace {

// Rows of one edit that are computed together, so that its table is read once for all of them.
#if MX_BYTES == 64
enum : int { kTogether = 4 };
#else
enum : int { kTogether = 2 };  // 16 registers hold no more sums
#endif

// y = x + bias + the coordinates times their left vectors, for M rows of one edit. The rows at `next` are fetched
// meanwhile: each of the two loops leaves half of the memory's traffic idle.
template <class E, class Table, int M>
MX_INLINE void edit_rows(const typename E::Stored* const* x, typename E::Stored* const* y,
                         const typename E::Stored* const* next, const typename E::Scalar* bias,
                         const typename E::Scalar* left, const typename E::Scalar* right, int64_t rank, int64_t d) {
  using V = typename E::Vector;
  constexpr int64_t kWidth = sizeof(V) / sizeof(typename E::Scalar);
  typename E::Scalar coordinates[M][kMaxRank];
  project_all<E, Table, M>(x, y, right, rank, d, coordinates);
  int64_t c = 0;
  for (; c + kWidth <= d; c += kWidth) {
    V start = {};
    if (bias != nullptr) start = Table::load(bias + c);
    V changes[M];
    for (int m = 0; m < M; ++m) changes[m] = start;
    for (int64_t i = 0; i < rank; ++i) {
      const V direction = Table::load(left + i * d + c);
      for (int m = 0; m < M; ++m) changes[m] = multiply_add(broadcast<V>(coordinates[m][i]), direction, changes[m]);
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
      for (int64_t i = 0; i < rank; ++i)
        change = multiply_add(broadcast<V>(coordinates[m][i]), load_part<Table>(left + i * d + c, n), change);
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
