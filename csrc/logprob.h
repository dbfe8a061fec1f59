// The reduction of the completion_logprob op as plain data, with no Python and no torch in it.
#pragma once

#include <stdint.h>

#include "steer.h"

namespace mechanex {

// One chunk of products, n_columns tokens from `first`, folded into each row's running maximum and sum over the tokens
// that are not its target. A logit is coldness * softcap * tanh(scale * (product + bias) / softcap).
//
// total = total * exp(old maximum - maximum) + sum of exp(logit - maximum). With `factor`, gradients are wanted: it
// gets exp(old maximum - maximum), and each product is replaced by exp(logit - maximum) * (1 - tanh^2), 0 at the
// target.
struct ReduceArgs {
  void* products;  // [n_rows, n_columns], contiguous
  int64_t n_columns;
  const void* bias;       // [n_columns], or null; like the rest double for float64 products and float for others
  const int64_t* target;  // a row's entry outside [first, first + n_columns) is not in this chunk
  int64_t target_stride;
  int64_t first;
  double scale;
  double softcap;  // 0: none
  double coldness;
  void* maximum;  // [n_rows]
  void* total;    // [n_rows]
  void* factor;   // [n_rows], or null
};

// Folds a whole vocabulary into each row's maximum, sum and slope over the tokens that are not its target, the weight
// read once: by several groups of blocks, each of which takes its own tokens and leaves numbers of its own.
struct WalkArgs {
  const void* hidden;  // [n_rows, width], of a half type
  int64_t hidden_stride;
  const void* weight;  // [n_vocab, width], of the same type
  int64_t weight_stride;
  const float* bias;      // [n_vocab], or null
  const int64_t* target;  // one outside the vocabulary is no token
  int64_t target_stride;
  int64_t n_rows, n_vocab, width;
  int64_t n_groups;
  double scale;
  double softcap;  // 0: none
  double coldness;
  float* maximum;  // [groups, n_rows]
  float* total;    // [groups, n_rows]: sums of exp(logit - maximum)
  float* sums;     // [groups, n_rows, width]: of exp(logit - maximum) * (1 - tanh^2) times the token's weights
};

using ReduceFn = void (*)(const ReduceArgs* args, int64_t begin, int64_t end);

// One table per instruction set. Null where torch has no products of that type worth taking.
struct LogprobKernels {
  ReduceFn reduce[kDTypes];
};

}  // namespace mechanex
