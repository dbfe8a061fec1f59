// Which kernel serves a call, and with how many threads.
#pragma once

#include <stddef.h>

#include "steer.cuh"

namespace mechanex {

using SteerKernel = void (*)(const SteerArgs args, const int64_t n_rows);

struct Plan {
  SteerKernel kernel;
  int layout;
  int threads;
  int rows;       // in a block
  size_t shared;  // bytes in a block
};

// The ways to lay rows out, widest first: many rows of one edit; a row in few registers; a row in many; anything.
enum Layout : int { kTile = 0, kRow = 1, kWide = 2, kAny = 3, kLayouts = 4 };

struct LayoutShape {
  int vectors;  // 16-byte accesses of a thread in a row
  int rows;     // in a block
  int threads;  // at most
  int blocks;   // on a multiprocessor, at least: with fewer, all wait for memory at the same time
};

constexpr LayoutShape kShapes[kAny] = {{1, 4, 512, 2}, {1, 1, 1024, 1}, {4, 1, 1024, 1}};

// With at least so many blocks of kTile for each multiprocessor, kTile is the faster: it reads an edit less often. With
// fewer, rows are better spread over more blocks.
enum : int { kTilesPerProcessor = 4 };

template <class Row, class Table, int kLayout, bool kScaled>
SteerKernel tile_kernel(int64_t rank) {
  constexpr LayoutShape s = kShapes[kLayout];
  // Vectors of an edit that are in registers at once: they divide the rank.
  if (rank == 0) return &steer_tile<Row, Table, 0, s.vectors, s.rows, s.threads, s.blocks, kScaled>;
  if (rank % 2 != 0) return &steer_tile<Row, Table, 1, s.vectors, s.rows, s.threads, s.blocks, kScaled>;
  return &steer_tile<Row, Table, 2, s.vectors, s.rows, s.threads, s.blocks, kScaled>;
}

// Rows with strengths take kRow or kWide, one in a block: kTile's four fill the registers without their strengths.
template <class Row, class Table>
SteerKernel kernel_of(int layout, int64_t rank, bool scaled) {
  if (layout == kAny) return &steer_any<Row, Table>;
  if (layout == kTile) return tile_kernel<Row, Table, kTile, false>(rank);
  if (layout == kRow)
    return scaled ? tile_kernel<Row, Table, kRow, true>(rank) : tile_kernel<Row, Table, kRow, false>(rank);
  return scaled ? tile_kernel<Row, Table, kWide, true>(rank) : tile_kernel<Row, Table, kWide, false>(rank);
}

template <class Row, class Table>
Plan plan_for(const SteerArgs& args, int64_t n_rows, int processors) {
  constexpr int64_t kRowBytes = sizeof(typename Row::Stored);
  const int64_t vectors = args.d * kRowBytes / 16;
  const auto fits = [vectors](int layout) { return vectors <= kShapes[layout].vectors * kShapes[layout].threads; };
  const bool scaled = args.strength != nullptr;
  int layout = kAny;
  if (takes_wide_accesses(args, n_rows, kRowBytes, sizeof(typename Table::Stored))) {
    const bool many = !scaled && n_rows >= int64_t{kTilesPerProcessor} * processors * kShapes[kTile].rows;
    if (many && fits(kTile))
      layout = kTile;
    else if (!many && fits(kRow))
      layout = kRow;
    else if (fits(kWide))
      layout = kWide;
  }
  const bool any = layout == kAny;
  const int64_t wanted =
      any ? (args.d < kAnyThreads ? args.d : int64_t{kAnyThreads}) : divided_up(vectors, kShapes[layout].vectors);
  const int threads = static_cast<int>(divided_up(wanted, kWarp) * kWarp);
  const int rows = any ? 1 : kShapes[layout].rows;
  const int64_t ranks = any ? divided_up(args.rank, kAnyRanks) * kAnyRanks : args.rank;
  const int64_t sums = ranks * rows * (threads / kWarp);
  return {kernel_of<Row, Table>(layout, args.rank, scaled), layout, threads, rows,
          static_cast<size_t>(sums) * sizeof(typename Row::Scalar)};
}

// The plan of rows and edits of these dtypes; a plan without a kernel where they don't go together.
inline Plan plan(int row_dtype, int table_dtype, const SteerArgs& args, int64_t n_rows, int processors) {
  switch (row_dtype * kDTypes + table_dtype) {
    case kFloat32* kDTypes + kFloat32:
      return plan_for<Float32, Float32>(args, n_rows, processors);
    case kFloat64* kDTypes + kFloat64:
      return plan_for<Float64, Float64>(args, n_rows, processors);
    case kBFloat16* kDTypes + kFloat32:
      return plan_for<BFloat16, Float32>(args, n_rows, processors);
    case kBFloat16* kDTypes + kBFloat16:
      return plan_for<BFloat16, BFloat16>(args, n_rows, processors);
    case kFloat16* kDTypes + kFloat32:
      return plan_for<Float16, Float32>(args, n_rows, processors);
    case kFloat16* kDTypes + kFloat16:
      return plan_for<Float16, Float16>(args, n_rows, processors);
    default:
      return {nullptr, kAny, 0, 0, 0};
  }
}

}  // namespace mechanex
