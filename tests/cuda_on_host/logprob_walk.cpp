// The one walk of completion_logprob's gradient as a library for the CPU, with the plan that a launch would take.
#include "../../csrc/cuda/logprob_walk.cuh"

#include <stdio.h>

using namespace mechanex;

// The blocks of a cluster, 0 where no kernel serves the arguments, -1 after a failure, with a line on stderr.
extern "C" int walk_on_host(int dtype, int64_t n_rows, int64_t n_vocab, int64_t width, const void* hidden,
                            int64_t hidden_stride, const void* weight, int64_t weight_stride, const float* bias,
                            const int64_t* target, int64_t target_stride, double scale, double softcap, double coldness,
                            float* maximum, float* total, float* sums, int64_t n_groups, size_t most_shared,
                            unsigned seed) {
  const WalkArgs args = {hidden,        hidden_stride, weight,  weight_stride, bias,     target,
                         target_stride, n_rows,        n_vocab, width,         n_groups, scale,
                         softcap,       coldness,      maximum, total,         sums};
  const WalkPlan chosen = walk_plan(dtype, n_rows, width, most_shared);
  if (chosen.kernel == nullptr) return 0;
  std::mt19937 order(seed);
  try {
    for (int64_t group = 0; group < n_groups; ++group)
      cuda_on_host::run_cluster(static_cast<unsigned>(group * chosen.size), chosen.size, kWalkThreads, chosen.shared,
                                order, [&] { chosen.kernel(args, chosen.stages); });
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return -1;
  }
  return chosen.size;
}
