// One walk over the vocabulary for completion_logprob with its gradient: a tile of the unembedding is on chip once, and
// used twice, for the logits and for the mean of its rows under them.
//
// The blocks of a cluster share the width: each holds its own columns of the hidden states, of a tile of tokens and of
// the sums. They add their parts of the logits by reading each other's shared memory, each for its own rows, and hand
// the exponentials round in the same way. As in attention, what was summed under a former maximum is scaled down.
#pragma once

#include "logits.cuh"
#ifdef __CUDACC__
#include "matrices.cuh"
#endif

namespace mechanex {

enum : int {
  kWalkWarps = 8,
  kWalkThreads = kWalkWarps * kReduceWarp,
  kWalkTokens = 64,  // of a tile
  kWalkSlice = 512,  // most columns of a block
  kWalkRows = 64,    // most rows of a launch
  kWalkPad = 8,      // half types behind a row in shared memory, so that rows begin in other banks
  kPartialPad = 4,
  kPairs = kWalkSlice / 16 / kWalkWarps,  // most pairs of 8 columns that a warp sums
};

// Where things lie in a block's shared memory, in bytes; rows are padded to whole tiles of 16.
struct WalkPlaces {
  int pitch;
  size_t tiles, partial, shares, factors, maximum, total, own, end;

  __host__ __device__ WalkPlaces(int rows, int slice, int stages) : pitch(slice + kWalkPad) {
    const size_t row = static_cast<size_t>(pitch) * 2;
    tiles = rows * row;
    partial = tiles + stages * kWalkTokens * row;
    shares = partial + static_cast<size_t>(rows) * (kWalkTokens + kPartialPad) * 4;
    factors = shares + static_cast<size_t>(rows) * (kWalkTokens + kWalkPad) * 2;
    maximum = factors + rows * 4;
    total = maximum + rows * 4;
    own = total + rows * 4;
    end = own + rows * 4;
  }
};

// What a shares' half type is multiplied by on its way through a product: float16 would lose those under 2^-25.
template <class Half>
constexpr float kShareUnit = 1.0f;
template <>
constexpr float kShareUnit<Float16> = 32768.0f;

template <class Half>
MX_DEVICE void load_tile(const WalkArgs& args, typename Half::Stored* tile, int pitch, int64_t first, int column,
                         int slice) {
  const int pieces = slice / 8;
  for (int i = threadIdx.x; i < kWalkTokens * pieces; i += kWalkThreads) {
    const int token = i / pieces, piece = i % pieces;
    const bool exists = first + token < args.n_vocab;
    const auto* weight = static_cast<const typename Half::Stored*>(args.weight);
    const auto* from = exists ? weight + (first + token) * args.weight_stride + column + piece * 8 : weight;
    copy_async(tile + token * pitch + piece * 8, from, exists);
  }
}

// This block's part of the logits of a tile: rows of hidden times tokens, over its own columns.
template <class Half, int kRowTiles>
MX_DEVICE void partial_logits(const typename Half::Stored* hidden, const typename Half::Stored* tile, int pitch,
                              int slice, float* partial) {
  constexpr int kTall = kRowTiles < 2 ? kRowTiles : 2;  // tiles of rows that a warp takes
  constexpr int kGroups = kRowTiles / kTall;
  constexpr int kWide = kGroups;  // tiles of 8 tokens that it takes
  const int warp = threadIdx.x / kReduceWarp, lane = threadIdx.x % kReduceWarp;
  const int row = warp % kGroups * kTall * 16, token = warp / kGroups * kWide * 8;
  float out[kTall][kWide][4] = {};
  const auto* left_at = hidden + (row + lane % 16) * pitch + lane / 16 * 8;
  const auto* right_at = tile + (token + lane % 8) * pitch + lane / 8 * 8;
  for (int k = 0; k < slice; k += 32) {
    uint32_t right[kWide][4];
#pragma unroll
    for (int n = 0; n < kWide; ++n) load_matrices(right[n], right_at + n * 8 * pitch + k);
#pragma unroll
    for (int m = 0; m < kTall; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t left[4];
        load_matrices(left, left_at + m * 16 * pitch + k + half * 16);
#pragma unroll
        for (int n = 0; n < kWide; ++n)
          multiply_add(out[m][n], left, right[n][2 * half], right[n][2 * half + 1], Half());
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kTall; ++m) {
#pragma unroll
    for (int n = 0; n < kWide; ++n) {
      float* at = partial + (row + m * 16 + lane / 4) * (kWalkTokens + kPartialPad) + token + n * 8 + lane % 4 * 2;
      at[0] = out[m][n][0];
      at[1] = out[m][n][1];
      at += 8 * (kWalkTokens + kPartialPad);
      at[0] = out[m][n][2];
      at[1] = out[m][n][3];
    }
  }
}

// The logits of a row of the tile, by one warp: exponentials into shares, maximum and total carried on.
template <class Half>
MX_DEVICE void fold_row(const WalkArgs& args, const Bend<float>& bend, const float* partial, int size, int64_t first,
                        int64_t own, typename Half::Stored* shares, float* factor, float* maximum, float* total) {
  const int lane = threadIdx.x % kReduceWarp;
  constexpr int kEach = kWalkTokens / kReduceWarp;
  float logit[kEach], steep[kEach], highest = minus_infinity<float>();
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int column = lane + i * kReduceWarp;
    float product = 0;
    for (int rank = 0; rank < size; ++rank) product += read_from(partial + column, rank);
    const int64_t token = first + column;
    if (args.bias != nullptr && token < args.n_vocab) product += args.bias[token];
    steep[i] = bend.steepness(product);
    logit[i] = token < args.n_vocab && token != own ? bend.logit(product) : minus_infinity<float>();
    highest = larger(logit[i], highest);
  }
#pragma unroll
  for (int difference = kReduceWarp / 2; difference > 0; difference /= 2)
    highest = larger(highest, from_lane(highest, difference));
  const float former = *maximum, joined = larger(former, highest), reference = finite(joined);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const float share = exponential(logit[i] - reference);
    sum += share;
    // What isn't a token, or is the target, has a share of 0 whatever its product.
    const float counted = logit[i] == minus_infinity<float>() ? 0.0f : share * steep[i];
    shares[lane + i * kReduceWarp] = Half::narrow(counted * kShareUnit<Half>);
  }
#pragma unroll
  for (int difference = kReduceWarp / 2; difference > 0; difference /= 2) sum += from_lane(sum, difference);
  const float rescaled = exponential(former - reference);
  if (lane == 0) {
    *total = *total * rescaled + sum;
    *maximum = joined;
    *factor = rescaled;
  }
}

template <class Half, int kRowTiles>
__global__ void __launch_bounds__(kWalkThreads, 1) walk_vocabulary(const WalkArgs args, const int stages) {
#if MX_HAS_CLUSTERS
  using Stored = typename Half::Stored;
  constexpr int kRows = 16 * kRowTiles, kSharePitch = kWalkTokens + kWalkPad;
  MX_DYNAMIC_SHARED(memory);
  const int rank = cluster_rank(), size = cluster_size();
  const int slice = static_cast<int>(args.width) / size, column = rank * slice;
  const int64_t group = blockIdx.x / size, groups = args.n_groups;
  const WalkPlaces places(kRows, slice, stages);
  const int pitch = places.pitch;
  Stored* hidden = reinterpret_cast<Stored*>(memory);
  Stored* tiles = reinterpret_cast<Stored*>(memory + places.tiles);
  float* partial = reinterpret_cast<float*>(memory + places.partial);
  Stored* shares = reinterpret_cast<Stored*>(memory + places.shares);
  float* factors = reinterpret_cast<float*>(memory + places.factors);
  float* maximum = reinterpret_cast<float*>(memory + places.maximum);
  float* total = reinterpret_cast<float*>(memory + places.total);
  int32_t* own = reinterpret_cast<int32_t*>(memory + places.own);
  const int warp = threadIdx.x / kReduceWarp, lane = threadIdx.x % kReduceWarp;
  const Bend<float> bend(args);

  const int64_t n_tiles = (args.n_vocab + kWalkTokens - 1) / kWalkTokens;
  const int tile_numbers = kWalkTokens * pitch;
  for (int stage = 0; stage < stages - 1; ++stage) {
    const int64_t tile = group + stage * groups;
    if (tile < n_tiles) load_tile<Half>(args, tiles + stage * tile_numbers, pitch, tile * kWalkTokens, column, slice);
    commit_copies();
  }
  for (int i = threadIdx.x; i < kRows * slice; i += kWalkThreads) {
    const int row = i / slice, at = i % slice;
    const auto* x = static_cast<const Stored*>(args.hidden) + row * args.hidden_stride + column;
    hidden[row * pitch + at] = row < args.n_rows ? x[at] : Stored(0);
  }
  for (int row = threadIdx.x; row < kRows; row += kWalkThreads) {
    const int64_t token = row < args.n_rows ? args.target[row * args.target_stride] : -1;
    own[row] = token >= 0 && token < args.n_vocab ? static_cast<int32_t>(token) : -1;
    maximum[row] = minus_infinity<float>();
    total[row] = 0;
  }

  float sums[kRowTiles][kPairs][2][4] = {};
  const int rows_each = kRows / size, my_rows = rank * rows_each;
  int stage = 0;
  for (int64_t tile = group; tile < n_tiles; tile += groups) {
    // The last stages - 2 groups of copies may still be under way; everyone is done with the tile before this one.
    if (stages == 3)
      await_copies<1>();
    else
      await_copies<0>();
    __syncthreads();
    const int64_t later = tile + (stages - 1) * groups;
    const int free_stage = stage == 0 ? stages - 1 : stage - 1;
    if (later < n_tiles)
      load_tile<Half>(args, tiles + free_stage * tile_numbers, pitch, later * kWalkTokens, column, slice);
    commit_copies();
    const Stored* weight = tiles + stage * tile_numbers;
    partial_logits<Half, kRowTiles>(hidden, weight, pitch, slice, partial);
    await_cluster();
    for (int row = my_rows + warp; row < my_rows + rows_each; row += kWalkWarps)
      fold_row<Half>(args, bend, partial + row * (kWalkTokens + kPartialPad), size, tile * kWalkTokens, own[row],
                     shares + row * kSharePitch, factors + row, maximum + row, total + row);
    await_cluster();
    constexpr int kPieces = kWalkTokens / 8;
    for (int i = threadIdx.x; i < kRows * kPieces; i += kWalkThreads) {
      const int row = i / kPieces, owner = row / rows_each;
      if (owner == rank) continue;
      uint4* at = reinterpret_cast<uint4*>(shares + row * kSharePitch) + i % kPieces;
      *at = read_from(at, owner);
      if (i % kPieces == 0) factors[row] = read_from(factors + row, owner);
    }
    __syncthreads();

#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      const float upper = factors[m * 16 + lane / 4], lower = factors[m * 16 + lane / 4 + 8];
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          sums[m][p][n][0] *= upper;
          sums[m][p][n][1] *= upper;
          sums[m][p][n][2] *= lower;
          sums[m][p][n][3] *= lower;
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kWalkTokens; k += 16) {
      uint32_t left[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
        load_matrices(left[m], shares + (m * 16 + lane % 16) * kSharePitch + k + lane / 16 * 8);
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        const int pair = warp + p * kWalkWarps;
        if (pair * 16 >= slice) break;
        uint32_t right[4];
        load_transposed(right, weight + (k + lane % 16) * pitch + pair * 16 + lane / 16 * 8);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          multiply_add(sums[m][p][0], left[m], right[0], right[1], Half());
          multiply_add(sums[m][p][1], left[m], right[2], right[3], Half());
        }
      }
    }
    stage = stage + 1 == stages ? 0 : stage + 1;
  }

  for (int row = my_rows + static_cast<int>(threadIdx.x); row < my_rows + rows_each && row < args.n_rows;
       row += kWalkThreads) {
    args.maximum[group * args.n_rows + row] = maximum[row];
    args.total[group * args.n_rows + row] = total[row];
  }
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const int pair = warp + p * kWalkWarps;
      if (pair * 16 >= slice) break;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int row = m * 16 + lane / 4 + i % 4 / 2 * 8;
        const int at = column + pair * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (row < args.n_rows)
          args.sums[(group * args.n_rows + row) * args.width + at] = sums[m][p][i / 4][i % 4] / kShareUnit<Half>;
      }
    }
  }
  // Nobody leaves while another may still read from here.
  await_cluster();
#endif
}

using WalkKernel = void (*)(const WalkArgs args, int stages);

struct WalkPlan {
  WalkKernel kernel;  // null: these arguments have none
  int size;           // blocks of a cluster
  int stages;
  size_t shared;  // bytes of a block
};

template <class Half>
WalkKernel walk_kernel(int row_tiles) {
  return row_tiles == 1   ? &walk_vocabulary<Half, 1>
         : row_tiles == 2 ? &walk_vocabulary<Half, 2>
                          : &walk_vocabulary<Half, 4>;
}

// The plan for hidden states of this dtype, if a block may have this much shared memory.
inline WalkPlan walk_plan(int dtype, int64_t n_rows, int64_t width, size_t most_shared) {
  const WalkPlan none = {nullptr, 0, 0, 0};
  if ((dtype != kBFloat16 && dtype != kFloat16) || n_rows < 1 || n_rows > kWalkRows) return none;
  int size = 1;
  while (size < 8 && width > size * kWalkSlice) size *= 2;
  if (width < 1 || width > size * kWalkSlice || width % (32 * size) != 0) return none;
  const int row_tiles = n_rows <= 16 ? 1 : n_rows <= 32 ? 2 : 4;
  for (int stages = 3; stages >= 2; --stages) {
    const size_t shared = WalkPlaces(16 * row_tiles, static_cast<int>(width) / size, stages).end;
    if (shared <= most_shared)
      return {dtype == kBFloat16 ? walk_kernel<BFloat16>(row_tiles) : walk_kernel<Float16>(row_tiles), size, stages,
              shared};
  }
  return none;
}

}  // namespace mechanex
