// The steer op by clusters. The blocks of one share the width: each keeps the edits' values at its own columns in
// shared memory for as long as it runs, and walks over the rows. A warp takes several rows at a time, holds its columns
// of them in registers from the sums to the result, and completes the sums with what the other blocks have found. So a
// row is read once, with those that follow on their way, and an edit once for each cluster, whichever rows it is wanted
// for.
#pragma once

#include <stddef.h>

#include "steer.cuh"
#ifdef __CUDACC__
#include "matrices.cuh"
#endif

namespace mechanex {

enum : int { kSliceWarps = 16, kSliceThreads = kSliceWarps * kWarp, kSliceColumns = 512, kSliceStages = 2 };

struct SliceArgs {
  SteerArgs steer;
  int64_t n_rows;
  int64_t n_groups;  // clusters
  int stages;        // tiles of rows that are on their way at the same time
};

// A block's columns of rows: 16-byte accesses, every 32nd of the slice's in a lane.
template <class RowType>
struct Slice {
  using Row = RowType;
  using Stored = typename Row::Stored;
  static constexpr int kWidth = 16 / sizeof(Stored);
  static constexpr int kVectors = kSliceColumns / kWidth / kWarp;
  // Rows that a warp takes at a time: as many as 32 registers hold.
  static constexpr int kRows = 8 / kVectors;
  static constexpr int kTileRows = kSliceWarps * kRows;
  static constexpr size_t kStageBytes = size_t{kTileRows} * kVectors * kWarp * 16;

  int count;  // accesses in the slice
  int lane;

  explicit MX_DEVICE Slice(int columns) : count(columns / kWidth), lane(threadIdx.x % kWarp) {}
  MX_DEVICE int at(int v) const { return v * kWarp + lane; }

  MX_DEVICE void write(Stored* row, int v, const Words& out) const {
    reinterpret_cast<uint4*>(row)[at(v)] = make_uint4(out.at[0], out.at[1], out.at[2], out.at[3]);
  }

  // Accesses of an edit that stand beside one of a row.
  template <class Table>
  static constexpr int kParts = kWidth * static_cast<int>(sizeof(typename Table::Stored)) / 16;

  // Elements between two vectors of edits in shared memory.
  template <class Table>
  static __host__ __device__ int64_t pitch_of(int64_t columns) {
    return (columns / kWidth + kWarp - 1) / kWarp * kWarp * kWidth;
  }

  // The elements of an edit beside vector v of a row, from shared memory, where the lanes of a part lie side by side.
  template <class Table>
  MX_DEVICE void beside(typename Row::Scalar* out, const typename Table::Stored* edit, int v) const {
    constexpr int kEach = kWidth / kParts<Table>;
    const auto* p = reinterpret_cast<const uint4*>(edit) + v * kParts<Table> * kWarp + lane;
#pragma unroll
    for (int part = 0; part < kParts<Table>; ++part) {
      const uint4 raw = load_again(p + part * kWarp);
      const Words words = {{raw.x, raw.y, raw.z, raw.w}};
#pragma unroll
      for (int i = 0; i < kEach; ++i) out[part * kEach + i] = Table::get(words, i);
    }
  }

  // Sends this block's columns of vectors, d apart, to where `beside` reads them.
  template <class Table>
  MX_DEVICE void keep(typename Table::Stored* to, const void* from, int64_t n_vectors, int64_t d,
                      int64_t column) const {
    constexpr int kEach = kWidth / kParts<Table>;
    const int64_t pitch = pitch_of<Table>(count * kWidth);
    const int pieces = count * kParts<Table>;
    for (int64_t i = threadIdx.x; i < n_vectors * pieces; i += blockDim.x) {
      const int64_t vector = i / pieces;
      const int piece = static_cast<int>(i % pieces), access = piece / kParts<Table>, part = piece % kParts<Table>;
      const int place = access / kWarp * kParts<Table> * kWarp + part * kWarp + access % kWarp;
      copy_async(to + vector * pitch + place * kEach,
                 static_cast<const typename Table::Stored*>(from) + vector * d + column + piece * kEach, true);
    }
  }
};

// The edits' values that a block keeps.
template <class TableType>
struct KeptEdits {
  using Table = TableType;
  using Stored = typename Table::Stored;

  Stored *rights, *lefts, *biases;
  int apart, ranks;
  bool biased;

  MX_DEVICE int rank() const { return ranks; }
  MX_DEVICE int pitch() const { return apart; }
  MX_DEVICE bool has_bias() const { return biased; }
  MX_DEVICE const Stored* bias(int32_t edit) const { return biases + edit * apart; }
  MX_DEVICE const Stored* left(int32_t edit) const { return lefts + edit * ranks * apart; }
  MX_DEVICE const Stored* right(int32_t edit) const { return rights + edit * ranks * apart; }
};

// Where things lie in a block's shared memory, in bytes: right vectors, left ones, biases, rows, sums twice,
// coordinates.
template <class Row, class Table>
struct SlicePlaces {
  size_t left, bias, rows, partial, coordinates, end;

  __host__ __device__ SlicePlaces(const SteerArgs& args, int64_t columns, int stages) {
    using Own = Slice<Row>;
    const size_t vector = static_cast<size_t>(Own::template pitch_of<Table>(columns)) * sizeof(typename Table::Stored);
    const size_t factor = static_cast<size_t>(args.n_edits * args.rank) * vector;
    const size_t sums = static_cast<size_t>(args.rank) * Own::kTileRows * sizeof(typename Row::Scalar);
    left = factor;
    bias = 2 * factor;
    rows = bias + (args.bias == nullptr ? 0 : static_cast<size_t>(args.n_edits) * vector);
    partial = rows + stages * Own::kStageBytes;
    coordinates = partial + 2 * sums;
    end = coordinates + sums;
  }
};

template <class Row, class Table, int kRanks>
__global__ void __launch_bounds__(kSliceThreads, 1) steer_slices(const SliceArgs given) {
#if MX_HAS_CLUSTERS
  using S = typename Row::Scalar;
  using Stored = typename Row::Stored;
  using Own = Slice<Row>;
  constexpr int kRows = Own::kRows, kVectors = Own::kVectors;
  MX_DYNAMIC_SHARED(memory);
  const SteerArgs& args = given.steer;
  const int size = cluster_size(), rank = static_cast<int>(args.rank);
  const int64_t group = blockIdx.x / size, groups = given.n_groups, n_rows = given.n_rows;
  const int slice = static_cast<int>(args.d) / size;
  const int64_t column = cluster_rank() * slice, n_tiles = (n_rows + Own::kTileRows - 1) / Own::kTileRows;
  const SlicePlaces<Row, Table> places(args, slice, given.stages);
  const Own columns(slice);
  const int warp = threadIdx.x / kWarp, lane = columns.lane;

  const KeptEdits<Table> edits = {reinterpret_cast<typename Table::Stored*>(memory),
                                  reinterpret_cast<typename Table::Stored*>(memory + places.left),
                                  reinterpret_cast<typename Table::Stored*>(memory + places.bias),
                                  static_cast<int>(Own::template pitch_of<Table>(slice)),
                                  rank,
                                  args.bias != nullptr};
  columns.template keep<Table>(edits.rights, args.right, args.n_edits * rank, args.d, column);
  columns.template keep<Table>(edits.lefts, args.left, args.n_edits * rank, args.d, column);
  if (edits.biased) columns.template keep<Table>(edits.biases, args.bias, args.n_edits, args.d, column);

  const auto* x_at = static_cast<const Stored*>(args.x) + column;
  auto* y_at = static_cast<Stored*>(args.y) + column;
  // A lane's own accesses of its warp's rows: it alone writes and reads them.
  constexpr int kStage = kSliceWarps * kRows * kVectors * kWarp;
  uint4* staged = reinterpret_cast<uint4*>(memory + places.rows) + warp * kRows * kVectors * kWarp + lane;
  const auto ask = [&](int64_t tile, int stage) {
    const int64_t first = tile * Own::kTileRows + warp * kRows;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (first + r >= n_rows || columns.at(v) >= columns.count) continue;
        copy_async(staged + stage * kStage + (r * kVectors + v) * kWarp,
                   reinterpret_cast<const uint4*>(x_at + (first + r) * args.x_stride) + columns.at(v), true);
      }
    }
  };
  for (int stage = 0; stage < given.stages; ++stage) {
    if (group + stage * groups < n_tiles) ask(group + stage * groups, stage);
    commit_copies();
  }
  int32_t edit[kRows];
  edits_of<kRows>(edit, args, group * Own::kTileRows + warp * kRows, n_rows);
  S* partial = reinterpret_cast<S*>(memory + places.partial) + warp * kRows * rank;
  S* coordinates = reinterpret_cast<S*>(memory + places.coordinates) + warp * kRows * rank;

  int stage = 0, side = 0;
  for (int64_t tile = group; tile < n_tiles; tile += groups) {
    if (given.stages == 2)
      await_copies<1>();
    else
      await_copies<0>();
    // The edits are everyone's copies; what follows needs no other wait within the block.
    if (tile == group) __syncthreads();
    Words x[kRows][kVectors];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (columns.at(v) >= columns.count) break;
        const uint4 raw = load_again(staged + stage * kStage + (r * kVectors + v) * kWarp);
        x[r][v] = {{raw.x, raw.y, raw.z, raw.w}};
      }
    }
    const int64_t first = tile * Own::kTileRows + warp * kRows, next = first + groups * Own::kTileRows;
    if (tile + given.stages * groups < n_tiles) ask(tile + given.stages * groups, stage);
    commit_copies();
    int32_t next_edit[kRows];
    edits_of<kRows>(next_edit, args, next, n_rows);
    S amount[kRows];
    amounts_of<kRows>(amount, args, first, n_rows);

    const bool together = share_an_edit<kRows>(edit);
    // The sums of two tiles take turns: whoever writes them has seen everyone arrive who read the former ones.
    S* sums = partial + side * Own::kTileRows * rank;
    if (together) {
      project<kRanks, kRows, kRows>(columns, edits, edit[0], x, sums);
    } else {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (edit[r] >= 0) project<kRanks, kRows, 1>(columns, edits, edit[r], x + r, sums + r);
    }
    await_cluster();
    for (int i = lane; i < kRows * rank; i += kWarp) {
      S total = 0;
      for (int block = 0; block < size; ++block) total += read_from(sums + i, block);
      coordinates[i] = total;
    }
    await_warp();
    if (together) {
      write_edited<kRanks, kRows, kRows, true>(columns, edits, edit[0], x, coordinates, amount,
                                               y_at + first * args.y_stride, args.y_stride);
    } else {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        Stored* row = y_at + (first + r) * args.y_stride;
        if (edit[r] >= 0)
          write_edited<kRanks, kRows, 1, true>(columns, edits, edit[r], x + r, coordinates + r, amount + r, row,
                                               args.y_stride);
        else if (edit[r] != kAbsent)
          write_unedited(columns, edit[r], x[r], row);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) edit[r] = next_edit[r];
    side = 1 - side;
    stage = stage + 1 == given.stages ? 0 : stage + 1;
  }
  // Nobody leaves while another may still read from here.
  await_cluster();
#endif
}

using SliceKernel = void (*)(const SliceArgs given);

struct SlicePlan {
  SliceKernel kernel;  // null: these arguments have none
  int size;            // blocks of a cluster
  int stages;
  int rows;       // of a tile
  size_t shared;  // bytes of a block
};

template <class Row, class Table>
SlicePlan slice_plan_for(const SteerArgs& args, int64_t n_rows, size_t most) {
  constexpr int kRanks[] = {1, 2, 4};
  static const SliceKernel kernels[] = {&steer_slices<Row, Table, 1>, &steer_slices<Row, Table, 2>,
                                        &steer_slices<Row, Table, 4>};
  constexpr int64_t kRowBytes = sizeof(typename Row::Stored);
  SlicePlan found = {nullptr, 0, 0, Slice<Row>::kTileRows, 0};
  if (args.rank < 1 || !takes_wide_accesses(args, n_rows, kRowBytes, sizeof(typename Table::Stored))) return found;
  int ranks = 2;
  while (args.rank % kRanks[ranks] != 0) --ranks;
  for (int stages = kSliceStages; stages >= 1; --stages) {
    for (int size = 1; size <= 8; size *= 2) {
      if (args.d > int64_t{size} * kSliceColumns || args.d % (int64_t{size} * Slice<Row>::kWidth) != 0) continue;
      const size_t shared = SlicePlaces<Row, Table>(args, args.d / size, stages).end;
      if (shared > most) continue;
      found.kernel = kernels[ranks];
      found.size = size;
      found.stages = stages;
      found.shared = shared;
      return found;
    }
  }
  return found;
}

// The plan of rows and edits of these dtypes, if a block may have so many bytes of shared memory.
inline SlicePlan slice_plan(int row_dtype, int table_dtype, const SteerArgs& args, int64_t n_rows, size_t most) {
  switch (row_dtype * kDTypes + table_dtype) {
    case kFloat32* kDTypes + kFloat32:
      return slice_plan_for<Float32, Float32>(args, n_rows, most);
    case kBFloat16* kDTypes + kFloat32:
      return slice_plan_for<BFloat16, Float32>(args, n_rows, most);
    case kBFloat16* kDTypes + kBFloat16:
      return slice_plan_for<BFloat16, BFloat16>(args, n_rows, most);
    case kFloat16* kDTypes + kFloat32:
      return slice_plan_for<Float16, Float32>(args, n_rows, most);
    case kFloat16* kDTypes + kFloat16:
      return slice_plan_for<Float16, Float16>(args, n_rows, most);
    default:
      return {nullptr, 0, 0, 0, 0};
  }
}

}  // namespace mechanex
