// Coordinates of rows along the directions of an edit: the sums of every steer kernel, so that all give the same bits.
//
// Internal linkage throughout, like vectors.h: this is compiled once per instruction set.
#pragma once

#include "../steer.h"
#include "vectors.h"

namespace {

using mechanex::kMaxRank;

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
        for (int m = 0; m < M; ++m) sums[m][j][u] = multiply_add(values[m], direction, sums[m][j][u]);
      }
    }
  }
  for (; c < d; c += kWidth) {
    const int64_t n = d - c < kWidth ? d - c : kWidth;
    for (int m = 0; m < M; ++m) {
      const V value = load_part<E>(x[m] + c, n);
      for (int j = 0; j < J; ++j)
        sums[m][j][0] = multiply_add(value, load_part<Table>(directions + j * d + c, n), sums[m][j][0]);
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

// Every coordinate of M rows: out[m][j] = x[m] . directions[j] for j < rank.
template <class E, class Table, int M>
MX_INLINE void project_all(const typename E::Stored* const* x, const typename E::Stored* const* y,
                           const typename E::Scalar* directions, int64_t rank, int64_t d,
                           typename E::Scalar (*out)[kMaxRank]) {
  int64_t j = 0;
  for (; j + 4 <= rank; j += 4) {
    project<E, Table, M, 4>(x, y, directions + j * d, d, (typename E::Scalar(*)[kMaxRank]) & out[0][j]);
  }
  for (; j < rank; ++j) {
    project<E, Table, M, 1>(x, y, directions + j * d, d, (typename E::Scalar(*)[kMaxRank]) & out[0][j]);
  }
}

}  // namespace
