// The steer op as plain data: what the bindings hand to a kernel, with no Python and no torch in it.
#pragma once

#include <stdint.h>

namespace mechanex {

enum DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3, kDTypes = 4 };

// Largest rank that a kernel takes: a row's coordinates live on its stack.
enum : int64_t { kMaxRank = 64 };

// y[t] = x[t] + strength[t] * (bias[k] + left[k]^T (right[k] x[t])) with k = rows[t]; y[t] = x[t], bit by bit, where k
// is not an edit. Strides are in elements; columns are adjacent. The tables are contiguous, float64 for float64 rows
// and float32 for others.
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
  const void* strength;  // [n_rows] of the arithmetic's type, or null: 1 (the CPU's kernels take none)
};

// Codes of gates, as in mechanex/ops/gate.py; with q = weight[k] . x + offset[k]. Any other code makes the row NaN.
enum GateKind : int32_t { kNone = 0, kStep = 1, kSigmoid = 2, kRelu = 3, kNorm = 4 };

// Each row takes the edits k = rows[t][0], rows[t][1], ... in order, every one of what the former ones made:
// x = x + strength[t][i] * gate_k(q) * (bias[k] + left[k]^T (right[k] x)), and after kNorm the row gets back the norm
// that it had. A row without an edit is copied bit by bit. Everything but x and y is contiguous; strengths, offsets and
// tables are float64 for float64 rows and float32 for others (CUDA: the tables may be of the rows' own half type).
struct SteerManyArgs {
  const void* x;
  int64_t x_stride;
  void* y;
  int64_t y_stride;
  const int32_t* rows;   // [n_rows, edits]; null: edit 0 for every row
  int64_t edits;         // of a row
  const void* strength;  // [n_rows, edits], or null: 1
  const void* bias;      // [n_edits, d]
  const void* left;      // [n_edits, rank, d], or null
  const void* right;     // [n_edits, rank, d], or null
  const int32_t* kinds;  // [n_edits], or null: no gates
  const void* weight;    // [n_edits, d], or null
  const void* offset;    // [n_edits], or null
  int64_t n_edits;
  int64_t rank;
  int64_t d;
};

// The scratch holds d numbers of the arithmetic's type for this call alone.
using SteerManyFn = void (*)(const SteerManyArgs* args, int64_t begin, int64_t end, void* scratch);

struct SteerManyKernels {
  SteerManyFn steer_many[kDTypes];
};

using SteerFn = void (*)(const SteerArgs* args, int64_t begin, int64_t end);

// One table per instruction set, each filled by its own object file.
struct CpuKernels {
  const char* name;
  SteerFn steer[kDTypes];
};

}  // namespace mechanex
