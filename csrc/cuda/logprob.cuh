// The reduction of the completion_logprob op: a block owns a row of a chunk of products, reads it once, and once more
// where gradients are wanted.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "logits.cuh"

namespace mechanex {

enum : int { kReduceThreads = 1024 };

// Joins a value of every thread of the block, in an order that the number of threads alone decides. Everyone gets the
// result. `shared` holds a value per warp; the caller waits before it is used again.
template <class S, class Join>
MX_DEVICE S over_block(S value, S empty, S* shared, Join join) {
#pragma unroll
  for (int difference = kReduceWarp / 2; difference > 0; difference /= 2)
    value = join(value, from_lane(value, difference));
  const int lane = threadIdx.x % kReduceWarp;
  if (lane == 0) shared[threadIdx.x / kReduceWarp] = value;
  __syncthreads();
  value = lane < static_cast<int>(blockDim.x) / kReduceWarp ? shared[lane] : empty;
#pragma unroll
  for (int difference = kReduceWarp / 2; difference > 0; difference /= 2)
    value = join(value, from_lane(value, difference));
  return value;
}

// kWidth products and their bias, from one access of 16 bytes each or one element.
template <class Row, int kWidth>
struct Piece {
  using S = typename Row::Scalar;
  using Stored = typename Row::Stored;

  static MX_DEVICE void read(S* values, const Stored* products, const S* bias, int64_t at) {
    if constexpr (kWidth == 1) {
      values[0] = Row::widen(products[at]);
    } else {
      const uint4 raw = load_again(reinterpret_cast<const uint4*>(products + at));
      const Words words = {{raw.x, raw.y, raw.z, raw.w}};
#pragma unroll
      for (int i = 0; i < kWidth; ++i) values[i] = Row::get(words, i);
    }
    if (bias == nullptr) return;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] += bias[at + i];
  }

  static MX_DEVICE void write(Stored* products, int64_t at, const S* values) {
    if constexpr (kWidth == 1) {
      products[at] = Row::narrow(values[0]);
    } else {
      Words words;
      Row::put(words, values);
      *reinterpret_cast<uint4*>(products + at) = make_uint4(words.at[0], words.at[1], words.at[2], words.at[3]);
    }
  }
};

template <class Row, int kWidth>
__global__ void __launch_bounds__(kReduceThreads) reduce_row(const ReduceArgs args) {
  using S = typename Row::Scalar;
  using Values = Piece<Row, kWidth>;
  MX_DYNAMIC_SHARED(memory);
  S* shared = reinterpret_cast<S*>(memory);  // [2][warps]
  const int64_t row = blockIdx.x;
  auto* products = static_cast<typename Row::Stored*>(args.products) + row * args.n_columns;
  const S* bias = static_cast<const S*>(args.bias);
  S* maximum = static_cast<S*>(args.maximum) + row;
  S* total = static_cast<S*>(args.total) + row;
  const Bend<S> bend(args);
  const int64_t own = args.target[row * args.target_stride] - args.first;
  const int64_t begin = static_cast<int64_t>(threadIdx.x) * kWidth;
  const int64_t step = static_cast<int64_t>(blockDim.x) * kWidth;
  const S former = *maximum;

  S highest = minus_infinity<S>();
  S sum = 0;
  for (int64_t c = begin; c < args.n_columns; c += step) {
    S values[kWidth];
    Values::read(values, products, bias, c);
    S higher = highest;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      values[i] = c + i == own ? minus_infinity<S>() : bend.logit(values[i]);
      higher = larger(values[i], higher);
    }
    const S reference = finite(higher);
    sum *= exponential(highest - reference);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum += exponential(values[i] - reference);
    highest = higher;
  }

  const auto join_highest = [](S a, S b) { return larger(a, b); };
  const auto join_sum = [](S a, S b) { return a + b; };
  const S joined = larger(former, over_block(highest, minus_infinity<S>(), shared, join_highest));
  const S reference = finite(joined);
  sum = over_block(sum * exponential(highest - reference), S(0), shared + blockDim.x / kReduceWarp, join_sum);
  if (threadIdx.x == 0) {
    const S rescaled = exponential(former - reference);
    *maximum = joined;
    *total = *total * rescaled + sum;
    if (args.factor != nullptr) static_cast<S*>(args.factor)[row] = rescaled;
  }
  if (args.factor == nullptr) return;
  for (int64_t c = begin; c < args.n_columns; c += step) {
    S values[kWidth];
    Values::read(values, products, bias, c);
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      values[i] = c + i == own ? S(0) : exponential(bend.logit(values[i]) - reference) * bend.steepness(values[i]);
    Values::write(products, c, values);
  }
}

using ReduceKernel = void (*)(const ReduceArgs args);

struct ReducePlan {
  ReduceKernel kernel;
  bool wide;  // accesses of 16 bytes
  int threads;
  size_t shared;  // bytes in a block
};

template <class Row>
ReducePlan reduce_plan_for(const ReduceArgs& args, int64_t n_rows, int processors) {
  using S = typename Row::Scalar;
  constexpr int kWidth = 16 / sizeof(typename Row::Stored);
  const bool wide = reinterpret_cast<uintptr_t>(args.products) % 16 == 0 && args.n_columns % kWidth == 0;
  const int64_t pieces = wide ? args.n_columns / kWidth : args.n_columns;
  // Where there are few rows, one block must keep a multiprocessor's loads busy.
  const int64_t most = n_rows > 2 * processors ? kReduceThreads / 4 : kReduceThreads;
  const int64_t warps = (pieces < most ? pieces + kReduceWarp - 1 : most) / kReduceWarp;
  return {wide ? &reduce_row<Row, kWidth> : &reduce_row<Row, 1>, wide, static_cast<int>(warps) * kReduceWarp,
          static_cast<size_t>(warps) * 2 * sizeof(S)};
}

// The plan for products of this dtype; one without a kernel where there is none.
inline ReducePlan reduce_plan(int dtype, const ReduceArgs& args, int64_t n_rows, int processors) {
  switch (dtype) {
    case kFloat32:
      return reduce_plan_for<Float32>(args, n_rows, processors);
    case kFloat64:
      return reduce_plan_for<Float64>(args, n_rows, processors);
    case kBFloat16:
      return reduce_plan_for<BFloat16>(args, n_rows, processors);
    case kFloat16:
      return reduce_plan_for<Float16>(args, n_rows, processors);
    default:
      return {nullptr, false, 0, 0};
  }
}

}  // namespace mechanex
