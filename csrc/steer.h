// The steer op as plain data: what the bindings hand to a kernel, with no Python and no torch in it.
#pragma once

#include <stdint.h>

namespace mechanex {

enum DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3, kDTypes = 4 };

// Largest rank that a kernel takes: a row's coordinates live on its stack.
enum : int64_t { kMaxRank = 64 };

// y[t] = x[t] + bias[k] + left[k]^T (right[k] x[t]) with k = rows[t]; y[t] = x[t], bit by bit, where k is not an edit.
// Strides are in elements; columns are adjacent. The tables are contiguous, float64 for float64 rows and float32 for
// others.
struct SteerArgs {
  const void* x;
  int64_t x_stride;
  void* y;
  int64_t y_stride;
  const int32_t* rows;  // null: edit 0 for every row
  int64_t rows_stride;
  const int64_t* order;  // the order to visit rows in, so that those of one edit follow each other; null: as they come
  const void* bias;      // [n_edits, d], or null
  const void* left;      // [n_edits, rank, d], or null
  const void* right;     // [n_edits, rank, d], or null
  int64_t n_edits;
  int64_t rank;
  int64_t d;
};

using SteerFn = void (*)(const SteerArgs* args, int64_t begin, int64_t end);

// One table per instruction set, each filled by its own object file.
struct CpuKernels {
  const char* name;
  SteerFn steer[kDTypes];
};

}  // namespace mechanex
