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

using ReduceFn = void (*)(const ReduceArgs* args, int64_t begin, int64_t end);

// One table per instruction set. Null where torch has no products of that type worth taking.
struct LogprobKernels {
  ReduceFn reduce[kDTypes];
};

}  // namespace mechanex
