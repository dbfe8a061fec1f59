// The CUDA reduction of completion_logprob as a library for the CPU, with the plan that a launch would take.
#include "../../csrc/cuda/logprob.cuh"

#include <stdio.h>

using namespace mechanex;

// The threads of a block, negative where it goes element by element; 0 after a failure, with a line on stderr.
extern "C" int reduce_on_host(int dtype, int64_t n_rows, int64_t n_columns, void* products, const void* bias,
                              const int64_t* target, int64_t target_stride, int64_t first, double scale, double softcap,
                              double coldness, void* maximum, void* total, void* factor, int processors,
                              unsigned seed) {
  ReduceArgs args = {};
  args.products = products;
  args.n_columns = n_columns;
  args.bias = bias;
  args.target = target;
  args.target_stride = target_stride;
  args.first = first;
  args.scale = scale;
  args.softcap = softcap;
  args.coldness = coldness;
  args.maximum = maximum;
  args.total = total;
  args.factor = factor;
  const ReducePlan chosen = reduce_plan(dtype, args, n_rows, processors);
  if (chosen.kernel == nullptr || chosen.threads < 1 || chosen.threads > kReduceThreads || chosen.shared > 48 * 1024) {
    fprintf(stderr, "no launch: %d threads, %zu bytes shared\n", chosen.threads, chosen.shared);
    return 0;
  }
  std::mt19937 order(seed);
  try {
    for (int64_t row = 0; row < n_rows; ++row)
      cuda_on_host::run_block(static_cast<unsigned>(row), chosen.threads, chosen.shared, order,
                              [&] { chosen.kernel(args); });
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return 0;
  }
  return chosen.wide ? chosen.threads : -chosen.threads;
}
