// The general steer op: a row's edits one after another, with strengths and gates. One row in a block, element by
// element: every thread keeps to its own columns from the first edit to the last, so that only sums are exchanged.
#pragma once

#include "steer.cuh"

namespace mechanex {

enum : int { kManyThreads = 512 };

// What a gate makes of q, for the kinds that read it.
template <class S>
MX_DEVICE S opening(int32_t kind, S q) {
  if (kind == kStep) return q > 0 ? S(1) : S(0);
  if (kind == kRelu) return q <= 0 ? S(0) : q;
  if (kind == kSigmoid) return S(1) / (S(1) + exponential(-q));
  return not_a_number<S>();
}

// Numbers that a warp sums up in an edit: the coordinates, the gate's q and the row's square sum.
inline __host__ __device__ int many_sums(int64_t rank) {
  return static_cast<int>((rank + 2 + kAnyRanks - 1) / kAnyRanks * kAnyRanks);
}

// Rows of half types wait in shared memory between edits; others in their place in y.
template <class Row>
constexpr bool kWaitsInPlace = sizeof(typename Row::Stored) == sizeof(typename Row::Scalar);

template <class Row, class Table>
__global__ void __launch_bounds__(kManyThreads, 2) steer_many(const SteerManyArgs args) {
  using S = typename Row::Scalar;
  MX_DYNAMIC_SHARED(memory);
  S* shared = reinterpret_cast<S*>(memory);
  const int64_t d = args.d, t = blockIdx.x;
  const int rank = static_cast<int>(args.rank), edits = static_cast<int>(args.edits);
  const int sums = many_sums(rank);
  const int lane = threadIdx.x % kWarp;
  S* partial = shared + threadIdx.x / kWarp * sums;
  const auto* x = static_cast<const typename Row::Stored*>(args.x) + t * args.x_stride;
  auto* y = static_cast<typename Row::Stored*>(args.y) + t * args.y_stride;

  bool any = false, outside = false;
  for (int i = 0; i < edits; ++i) {
    const int32_t k = args.rows == nullptr ? 0 : args.rows[t * edits + i];
    any = any || k != -1;
    outside = outside || k < -1 || k >= args.n_edits;
  }
  if (outside || !any) {
    const typename Row::Stored nan = Row::narrow(not_a_number<S>());
    for (int64_t c = threadIdx.x; c < d; c += blockDim.x) y[c] = outside ? nan : x[c];
    return;
  }

  S* row;
  if constexpr (kWaitsInPlace<Row>)
    row = y;
  else
    row = shared + blockDim.x / kWarp * sums;
  for (int64_t c = threadIdx.x; c < d; c += blockDim.x) row[c] = Row::widen(x[c]);

  for (int i = 0; i < edits; ++i) {
    const int64_t k = args.rows == nullptr ? 0 : args.rows[t * edits + i];
    if (k < 0) continue;
    const int32_t kind = args.kinds == nullptr ? static_cast<int32_t>(kNone) : args.kinds[k];
    const bool gated = kind != kNone && kind != kNorm;
    const auto* bias = static_cast<const typename Table::Stored*>(args.bias) + k * d;
    const auto* left = static_cast<const typename Table::Stored*>(args.left) + k * rank * d;
    const auto* right = static_cast<const typename Table::Stored*>(args.right) + k * rank * d;
    const auto* weight = static_cast<const typename Table::Stored*>(args.weight) + k * d;
    const int needed = kind == kNorm ? rank + 2 : gated ? rank + 1 : rank;
    // Everyone has read what the former edit left there.
    __syncthreads();
    for (int j = 0; j < needed; j += kAnyRanks) {
      S own[kAnyRanks] = {};
      for (int64_t c = threadIdx.x; c < d; c += blockDim.x) {
        const S value = row[c];
#pragma unroll
        for (int n = 0; n < kAnyRanks; ++n) {
          if (j + n < rank)
            own[n] += value * Table::widen(right[(j + n) * d + c]);
          else if (j + n == rank && gated)
            own[n] += value * Table::widen(weight[c]);
          else if (j + n == rank + 1 && kind == kNorm)
            own[n] += value * value;
        }
      }
      sum_over_warp<kAnyRanks>(own, lane);
      constexpr int kLanesPerSum = kWarp / kAnyRanks;
      if (lane % kLanesPerSum == 0) partial[j + lane / kLanesPerSum] = own[0];
    }
    if (needed > 0) sum_over_block(shared, sums);

    S amount = args.strength == nullptr ? S(1) : static_cast<const S*>(args.strength)[t * edits + i];
    if (gated) amount *= opening<S>(kind, shared[rank] + static_cast<const S*>(args.offset)[k]);
    S after = 0;
    for (int64_t c = threadIdx.x; c < d; c += blockDim.x) {
      S change = Table::widen(bias[c]);
      for (int j = 0; j < rank; ++j) change += shared[j] * Table::widen(left[j * d + c]);
      const S value = row[c] + amount * change;
      row[c] = value;
      after += value * value;
    }
    if (kind != kNorm) continue;
    const S before = shared[rank + 1];
    __syncthreads();
    sum_over_warp<1>(&after, lane);
    if (lane == 0) shared[threadIdx.x / kWarp] = after;
    sum_over_block(shared, 1);
    if (shared[0] == 0) continue;
    const S ratio = square_root(before) / square_root(shared[0]);
    for (int64_t c = threadIdx.x; c < d; c += blockDim.x) row[c] *= ratio;
  }
  if constexpr (!kWaitsInPlace<Row>)
    for (int64_t c = threadIdx.x; c < d; c += blockDim.x) y[c] = Row::narrow(row[c]);
}

struct ManyPlan {
  void (*kernel)(const SteerManyArgs args);
  int threads;
  size_t shared;  // bytes in a block
};

template <class Row, class Table>
ManyPlan many_plan_for(const SteerManyArgs& args) {
  const int64_t wanted = args.d < kManyThreads ? args.d : int64_t{kManyThreads};
  const int warps = static_cast<int>((wanted + kWarp - 1) / kWarp);
  const int64_t numbers = int64_t{warps} * many_sums(args.rank) + (kWaitsInPlace<Row> ? 0 : args.d);
  return {&steer_many<Row, Table>, warps * kWarp, static_cast<size_t>(numbers) * sizeof(typename Row::Scalar)};
}

// The plan of rows and edits of these dtypes; a plan without a kernel where they don't go together.
inline ManyPlan many_plan(int row_dtype, int table_dtype, const SteerManyArgs& args) {
  switch (row_dtype * kDTypes + table_dtype) {
    case kFloat32* kDTypes + kFloat32:
      return many_plan_for<Float32, Float32>(args);
    case kFloat64* kDTypes + kFloat64:
      return many_plan_for<Float64, Float64>(args);
    case kBFloat16* kDTypes + kFloat32:
      return many_plan_for<BFloat16, Float32>(args);
    case kBFloat16* kDTypes + kBFloat16:
      return many_plan_for<BFloat16, BFloat16>(args);
    case kFloat16* kDTypes + kFloat32:
      return many_plan_for<Float16, Float32>(args);
    case kFloat16* kDTypes + kFloat16:
      return many_plan_for<Float16, Float16>(args);
    default:
      return {nullptr, 0, 0};
  }
}

}  // namespace mechanex
