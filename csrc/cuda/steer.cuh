// The steer kernels. `steer_tile` keeps its rows in registers, so that each is read from memory once, and reads an edit
// once for several rows that share it; `steer_any` serves what 16-byte accesses can't.
#pragma once

#include <stdint.h>

#include "../steer.h"
#ifdef __CUDACC__
#include "device.cuh"
#else
#include "cuda_on_host.h"
#endif
#include "elements.cuh"

namespace mechanex {

enum : int { kWarp = 32 };

inline int64_t divided_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Whether every row and every vector of the edits starts on 16 bytes and ends there.
inline bool takes_wide_accesses(const SteerArgs& args, int64_t n_rows, int64_t row_bytes, int64_t table_bytes) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return aligned(args.x) && aligned(args.y) && aligned(args.bias) && aligned(args.left) && aligned(args.right) &&
         args.d * row_bytes % 16 == 0 && args.d * table_bytes % 16 == 0 &&
         (n_rows == 1 || (args.x_stride * row_bytes % 16 == 0 && args.y_stride * row_bytes % 16 == 0));
}

// What happens to a row, where it is not an index into the table.
enum : int32_t { kKeep = -1, kOutside = -2, kAbsent = -3 };

// The edits of kRows rows from `first` on. All indices are asked for before the first is looked at.
template <int kRows>
MX_DEVICE void edits_of(int32_t* edit, const SteerArgs& args, int64_t first, int64_t n_rows) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + r < n_rows ? first + r : n_rows - 1;
    edit[r] = args.rows == nullptr ? 0 : args.rows[row * args.rows_stride];
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int32_t k = edit[r];
    edit[r] = first + r >= n_rows ? kAbsent : k == -1 ? kKeep : k < 0 || k >= args.n_edits ? kOutside : k;
  }
}

// Whether the rows have one edit together.
template <int kRows>
MX_DEVICE bool share_an_edit(const int32_t* edit) {
  bool together = true;
#pragma unroll
  for (int r = 0; r < kRows; ++r) together = together && edit[r] >= 0 && edit[r] == edit[0];
  return together;
}

// The strengths of these rows; 1 where there are none.
template <int kRows, class S>
MX_DEVICE void amounts_of(S* amount, const SteerArgs& args, int64_t first, int64_t n_rows) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + r < n_rows ? first + r : n_rows - 1;
    amount[r] = args.strength == nullptr ? S(1) : static_cast<const S*>(args.strength)[row];
  }
}

// Sums N values over a warp. Half of what a lane holds goes to its partner in each step, so that it takes N shuffles,
// not 5 N; lane l ends with the sum of value l / (32 / N) in values[0].
template <int N, class S>
MX_DEVICE void sum_over_warp(S* values, int lane, int difference = kWarp / 2) {
  if constexpr (N > 1) {
    const bool upper = (lane & difference) != 0;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const S sent = upper ? values[i] : values[i + N / 2];
      const S kept = upper ? values[i + N / 2] : values[i];
      values[i] = kept + from_lane(sent, difference);
    }
    sum_over_warp<N / 2>(values, lane, difference / 2);
  } else {
    for (; difference > 0; difference /= 2) values[0] += from_lane(values[0], difference);
  }
}

// Sums each column of [warps][n] into the first row. A thread owns a column, so it may overwrite it.
template <class S>
MX_DEVICE void sum_over_block(S* partial, int n) {
  __syncthreads();
  const int warps = blockDim.x / kWarp;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    S total = partial[i];
#pragma unroll 4
    for (int w = 1; w < warps; ++w) total += partial[w * n + i];
    partial[i] = total;
  }
  __syncthreads();
}

// Rows in registers: kVectors times 16 bytes of each in a thread, every blockDim.x-th of the row's.
template <class RowType, int kOwn>
struct Columns {
  using Row = RowType;
  using Stored = typename Row::Stored;
  static constexpr int kVectors = kOwn;
  static constexpr int kWidth = 16 / sizeof(Stored);

  int count;  // 16-byte vectors in a row

  explicit MX_DEVICE Columns(int64_t d) : count(static_cast<int>(d / kWidth)) {}
  MX_DEVICE int at(int v) const { return v * blockDim.x + threadIdx.x; }

  MX_DEVICE void read(Words* x, const Stored* row) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (at(v) >= count) break;
      const uint4 raw = load_once(reinterpret_cast<const uint4*>(row) + at(v));
      x[v] = {{raw.x, raw.y, raw.z, raw.w}};
    }
  }

  MX_DEVICE void write(Stored* row, int v, const Words& out) const {
    reinterpret_cast<uint4*>(row)[at(v)] = make_uint4(out.at[0], out.at[1], out.at[2], out.at[3]);
  }

  // The elements of an edit that stand beside vector v of a row.
  template <class Table>
  MX_DEVICE void beside(typename Row::Scalar* out, const typename Table::Stored* edit, int v) const {
    constexpr int kEach = 16 / sizeof(typename Table::Stored);
    static_assert(kWidth % kEach == 0, "an edit's elements are no smaller than a row's");
    const auto* p = reinterpret_cast<const uint4*>(edit + static_cast<int64_t>(at(v)) * kWidth);
#pragma unroll
    for (int part = 0; part < kWidth / kEach; ++part) {
      const uint4 raw = load_kept(p + part);
      const Words words = {{raw.x, raw.y, raw.z, raw.w}};
#pragma unroll
      for (int i = 0; i < kEach; ++i) out[part * kEach + i] = Table::get(words, i);
    }
  }
};

// The edits of a call where it gives them; vectors of one are `pitch` elements apart.
template <class TableType>
struct Edits {
  using Table = TableType;
  using Stored = typename Table::Stored;

  const SteerArgs& args;

  MX_DEVICE int rank() const { return static_cast<int>(args.rank); }
  MX_DEVICE int64_t pitch() const { return args.d; }
  MX_DEVICE bool has_bias() const { return args.bias != nullptr; }
  MX_DEVICE const Stored* bias(int32_t edit) const { return static_cast<const Stored*>(args.bias) + edit * args.d; }
  MX_DEVICE const Stored* left(int32_t edit) const {
    return static_cast<const Stored*>(args.left) + edit * args.rank * args.d;
  }
  MX_DEVICE const Stored* right(int32_t edit) const {
    return static_cast<const Stored*>(args.right) + edit * args.rank * args.d;
  }
};

// kRanks vectors of an edit beside vector v of a row.
template <class Table, int kRanks, class Places>
MX_DEVICE void beside(typename Places::Row::Scalar (*out)[Places::kWidth], const Places& columns,
                      const typename Table::Stored* vectors, int64_t pitch, int v) {
#pragma unroll
  for (int i = 0; i < kRanks; ++i) columns.template beside<Table>(out[i], vectors + i * pitch, v);
}

// A tile is kRows rows in one block. A group is kGroup rows of it with one edit, whose elements are loaded once for all
// of them, kRanks vectors at a time, which divides the rank.

// This warp's share of a group's coordinates: that of row r along vector j goes to partial[j * kRows + r].
template <int kRanks, int kRows, int kGroup, class Places, class Held>
MX_DEVICE void project(const Places& columns, const Held& edits, int32_t edit, const Words (*x)[Places::kVectors],
                       typename Places::Row::Scalar* partial) {
  using Row = typename Places::Row;
  using S = typename Row::Scalar;
  constexpr int kWidth = Places::kWidth;
  using Table = typename Held::Table;
  const auto* right = edits.right(edit);
  const int64_t pitch = edits.pitch();
  const int rank = edits.rank();
#pragma unroll 1
  for (int j = 0; j < rank; j += kRanks) {
    S sums[kRanks * kGroup] = {};
#pragma unroll
    for (int v = 0; v < Places::kVectors; ++v) {
      if (columns.at(v) >= columns.count) break;
      S direction[kRanks][kWidth];
      beside<Table, kRanks>(direction, columns, right + j * pitch, pitch, v);
#pragma unroll
      for (int r = 0; r < kGroup; ++r) {
#pragma unroll
        for (int w = 0; w < kWidth; ++w) {
          const S value = Row::get(x[r][v], w);
#pragma unroll
          for (int i = 0; i < kRanks; ++i) sums[i * kGroup + r] += value * direction[i][w];
        }
      }
    }
    const int lane = threadIdx.x % kWarp;
    constexpr int kLanes = kWarp / (kRanks * kGroup);
    sum_over_warp<kRanks * kGroup>(sums, lane);
    const int sum = lane / kLanes;
    if (lane % kLanes == 0) partial[(j + sum / kGroup) * kRows + sum % kGroup] = sums[0];
  }
}

// Writes a group's rows, y_stride apart: x plus the change, which is the bias and the coordinates times their left
// vectors. kScaled: the change is summed up first, then multiplied by the row's amount.
template <int kRanks, int kRows, int kGroup, bool kScaled, class Places, class Held>
MX_DEVICE void write_edited(const Places& columns, const Held& edits, int32_t edit, const Words (*x)[Places::kVectors],
                            const typename Places::Row::Scalar* coordinates, const typename Places::Row::Scalar* amount,
                            typename Places::Stored* rows, int64_t y_stride) {
  using Row = typename Places::Row;
  using S = typename Row::Scalar;
  constexpr int kWidth = Places::kWidth;
  using Table = typename Held::Table;
  const auto* bias = edits.bias(edit);
  const auto* left = edits.left(edit);
  const int64_t pitch = edits.pitch();
  const int rank = edits.rank();
#pragma unroll
  for (int v = 0; v < Places::kVectors; ++v) {
    if (columns.at(v) >= columns.count) break;
    S y[kGroup][kWidth];
#pragma unroll
    for (int r = 0; r < kGroup; ++r) {
#pragma unroll
      for (int w = 0; w < kWidth; ++w) y[r][w] = kScaled ? S(0) : Row::get(x[r][v], w);
    }
    if (edits.has_bias()) {
      S shift[kWidth];
      columns.template beside<Table>(shift, bias, v);
#pragma unroll
      for (int r = 0; r < kGroup; ++r) {
#pragma unroll
        for (int w = 0; w < kWidth; ++w) y[r][w] += shift[w];
      }
    }
    if constexpr (kRanks > 0) {
#pragma unroll 1
      for (int j = 0; j < rank; j += kRanks) {
        S direction[kRanks][kWidth];
        beside<Table, kRanks>(direction, columns, left + j * pitch, pitch, v);
#pragma unroll
        for (int i = 0; i < kRanks; ++i) {
#pragma unroll
          for (int r = 0; r < kGroup; ++r) {
            const S coordinate = coordinates[(j + i) * kRows + r];
#pragma unroll
            for (int w = 0; w < kWidth; ++w) y[r][w] += coordinate * direction[i][w];
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kGroup; ++r) {
      if constexpr (kScaled) {
#pragma unroll
        for (int w = 0; w < kWidth; ++w) y[r][w] = Row::get(x[r][v], w) + amount[r] * y[r][w];
      }
      Words out;
      Row::put(out, y[r]);
      columns.write(rows + r * y_stride, v, out);
    }
  }
}

// Writes a row that has no edit: as it was, or NaN.
template <class Places>
MX_DEVICE void write_unedited(const Places& columns, int32_t edit, const Words* x, typename Places::Stored* row) {
  using Row = typename Places::Row;
  typename Row::Scalar nan[Places::kWidth];
#pragma unroll
  for (int w = 0; w < Places::kWidth; ++w) nan[w] = not_a_number<typename Row::Scalar>();
#pragma unroll
  for (int v = 0; v < Places::kVectors; ++v) {
    if (columns.at(v) >= columns.count) break;
    Words out = x[v];
    if (edit == kOutside) Row::put(out, nan);
    columns.write(row, v, out);
  }
}

// kScaled: rows have strengths.
template <class Row, class Table, int kRanks, int kVectors, int kRows, int kMaxThreads, int kMinBlocks, bool kScaled>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks) steer_tile(const SteerArgs args, const int64_t n_rows) {
  using S = typename Row::Scalar;
  MX_DYNAMIC_SHARED(memory);
  S* shared = reinterpret_cast<S*>(memory);  // [warps][rank][kRows]
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows;
  const Columns<Row, kVectors> columns(args.d);
  Words x[kRows][kVectors];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (first + r < n_rows)
      columns.read(x[r], static_cast<const typename Row::Stored*>(args.x) + (first + r) * args.x_stride);
  }
  int32_t edit[kRows];
  edits_of<kRows>(edit, args, first, n_rows);
  S amount[kRows] = {};
  if constexpr (kScaled) amounts_of<kRows>(amount, args, first, n_rows);
  const int sums = static_cast<int>(args.rank) * kRows;
  S* partial = shared + threadIdx.x / kWarp * sums;
  const Edits<Table> edits = {args};
  auto* y = static_cast<typename Row::Stored*>(args.y);

  if (share_an_edit<kRows>(edit)) {
    if constexpr (kRanks > 0) {
      project<kRanks, kRows, kRows>(columns, edits, edit[0], x, partial);
      sum_over_block(shared, sums);
    }
    write_edited<kRanks, kRows, kRows, kScaled>(columns, edits, edit[0], x, shared, amount, y + first * args.y_stride,
                                                args.y_stride);
    return;
  }
  if constexpr (kRanks > 0 && kRows > 1) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (edit[r] >= 0) project<kRanks, kRows, 1>(columns, edits, edit[r], x + r, partial + r);
    sum_over_block(shared, sums);
  }
  int64_t row = first;
#pragma unroll
  for (int r = 0; r < kRows; ++r, ++row) {
    compute_late(row);
    if (edit[r] >= 0)
      write_edited<kRanks, kRows, 1, kScaled>(columns, edits, edit[r], x + r, shared + r, amount + r,
                                              y + row * args.y_stride, args.y_stride);
    else if (edit[r] != kAbsent)
      write_unedited(columns, edit[r], x[r], y + row * args.y_stride);
  }
}

// One row in a block, element by element: any width, any alignment. A row is read once more for each kAnyRanks of rank.
enum : int { kAnyRanks = 4, kAnyThreads = 256 };

template <class Row, class Table>
__global__ void __launch_bounds__(kAnyThreads) steer_any(const SteerArgs args, const int64_t n_rows) {
  using S = typename Row::Scalar;
  MX_DYNAMIC_SHARED(memory);
  S* shared = reinterpret_cast<S*>(memory);
  const int64_t d = args.d;
  const int rank = static_cast<int>(args.rank);
  const int64_t t = blockIdx.x;
  int32_t edit;
  edits_of<1>(&edit, args, t, n_rows);
  S amount;
  amounts_of<1>(&amount, args, t, n_rows);
  const auto* x = static_cast<const typename Row::Stored*>(args.x) + t * args.x_stride;
  auto* y = static_cast<typename Row::Stored*>(args.y) + t * args.y_stride;
  if (edit < 0) {
    const typename Row::Stored nan = Row::narrow(not_a_number<S>());
    for (int64_t c = threadIdx.x; c < d; c += blockDim.x) y[c] = edit == kKeep ? x[c] : nan;
    return;
  }
  const auto* bias = static_cast<const typename Table::Stored*>(args.bias);
  const auto* left = static_cast<const typename Table::Stored*>(args.left) + edit * args.rank * d;
  const auto* right = static_cast<const typename Table::Stored*>(args.right) + edit * args.rank * d;
  const int coordinates = (rank + kAnyRanks - 1) / kAnyRanks * kAnyRanks;
  const int lane = threadIdx.x % kWarp;
  S* partial = shared + threadIdx.x / kWarp * coordinates;
  for (int j = 0; j < rank; j += kAnyRanks) {
    S sums[kAnyRanks] = {};
    for (int64_t c = threadIdx.x; c < d; c += blockDim.x) {
      const S value = Row::widen(x[c]);
#pragma unroll
      for (int i = 0; i < kAnyRanks; ++i)
        if (j + i < rank) sums[i] += value * Table::widen(right[(j + i) * d + c]);
    }
    sum_over_warp<kAnyRanks>(sums, lane);
    constexpr int kLanesPerSum = kWarp / kAnyRanks;
    if (lane % kLanesPerSum == 0) partial[j + lane / kLanesPerSum] = sums[0];
  }
  if (rank > 0) sum_over_block(shared, coordinates);
  for (int64_t c = threadIdx.x; c < d; c += blockDim.x) {
    S change = bias == nullptr ? S(0) : Table::widen(bias[edit * d + c]);
    for (int j = 0; j < rank; ++j) change += shared[j] * Table::widen(left[j * d + c]);
    y[c] = Row::narrow(Row::widen(x[c]) + amount * change);
  }
}

}  // namespace mechanex
