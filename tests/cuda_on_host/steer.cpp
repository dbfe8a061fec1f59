// The CUDA steer kernels as a library for the CPU, with the plan that a launch would take.
#include <stdio.h>

#include "../../csrc/cuda/plan.cuh"
#include "../../csrc/cuda/steer_many.cuh"
#include "../../csrc/cuda/steer_slices.cuh"

using namespace mechanex;

// The layout that was taken, or -1 with a line on stderr.
extern "C" int steer_on_host(int dtype, int table_dtype, int64_t n_rows, int64_t d, const void* x, int64_t x_stride,
                             void* y, int64_t y_stride, const int32_t* rows, int64_t rows_stride, const void* strength,
                             const void* bias, const void* left, const void* right, int64_t n_edits, int64_t rank,
                             int processors, unsigned seed) {
  const SteerArgs args = {x,    x_stride, y,     y_stride, rows, rows_stride, nullptr,
                          bias, left,     right, n_edits,  rank, d,           strength};
  if (n_rows == 0 || d == 0) return kAny;
  const Plan chosen = plan(dtype, table_dtype, args, n_rows, processors);
  if (chosen.kernel == nullptr || chosen.threads > 1024 || chosen.shared > 48 * 1024) {
    fprintf(stderr, "no launch: %d threads, %zu bytes shared\n", chosen.threads, chosen.shared);
    return -1;
  }
  std::mt19937 order(seed);
  try {
    for (int64_t b = 0; b < divided_up(n_rows, chosen.rows); ++b)
      cuda_on_host::run_block(static_cast<unsigned>(b), chosen.threads, chosen.shared, order,
                              [&] { chosen.kernel(args, n_rows); });
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return -1;
  }
  return chosen.layout;
}

// By clusters, of which the device holds so many: their blocks, 0 where no kernel serves the arguments, -1 after a
// failure, with a line on stderr.
extern "C" int steer_slices_on_host(int dtype, int table_dtype, int64_t n_rows, int64_t d, const void* x,
                                    int64_t x_stride, void* y, int64_t y_stride, const int32_t* rows,
                                    int64_t rows_stride, const void* strength, const void* bias, const void* left,
                                    const void* right, int64_t n_edits, int64_t rank, int64_t clusters,
                                    size_t most_shared, unsigned seed) {
  const SteerArgs args = {x,    x_stride, y,     y_stride, rows, rows_stride, nullptr,
                          bias, left,     right, n_edits,  rank, d,           strength};
  if (n_rows == 0 || d == 0) return 0;
  const SlicePlan chosen = slice_plan(dtype, table_dtype, args, n_rows, most_shared);
  if (chosen.kernel == nullptr) return 0;
  const int64_t tiles = divided_up(n_rows, chosen.rows), groups = tiles < clusters ? tiles : clusters;
  const SliceArgs given = {args, n_rows, groups, chosen.stages};
  std::mt19937 order(seed);
  try {
    for (int64_t group = 0; group < groups; ++group)
      cuda_on_host::run_cluster(static_cast<unsigned>(group * chosen.size), chosen.size, kSliceThreads, chosen.shared,
                                order, [&] { chosen.kernel(given); });
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return -1;
  }
  return chosen.size;
}

// The general op likewise: the threads of a block, or -1 with a line on stderr.
extern "C" int steer_many_on_host(int dtype, int table_dtype, int64_t n_rows, int64_t d, const void* x,
                                  int64_t x_stride, void* y, int64_t y_stride, const int32_t* rows, int64_t edits,
                                  const void* strength, const void* bias, const void* left, const void* right,
                                  const int32_t* kinds, const void* weight, const void* offset, int64_t n_edits,
                                  int64_t rank, unsigned seed) {
  const SteerManyArgs args = {x,    x_stride, y,     y_stride, rows,   edits,   strength, bias,
                              left, right,    kinds, weight,   offset, n_edits, rank,     d};
  if (n_rows == 0 || d == 0) return 0;
  const ManyPlan chosen = many_plan(dtype, table_dtype, args);
  if (chosen.kernel == nullptr || chosen.threads > kManyThreads || chosen.shared > 99 * 1024) {
    fprintf(stderr, "no launch: %d threads, %zu bytes shared\n", chosen.threads, chosen.shared);
    return -1;
  }
  std::mt19937 order(seed);
  try {
    for (int64_t t = 0; t < n_rows; ++t)
      cuda_on_host::run_block(static_cast<unsigned>(t), chosen.threads, chosen.shared, order,
                              [&] { chosen.kernel(args); });
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return -1;
  }
  return chosen.threads;
}
