#include "launch.h"
#include "logprob.cuh"
#include "runtime.h"

namespace mechanex {

void launch_reduce(int dtype, ReduceArgs args, int64_t n_rows, int device, void* stream) {
  if (n_rows <= 0 || args.n_columns <= 0) return;
  const OnDevice guard(device);
  const ReducePlan chosen = reduce_plan(dtype, args, n_rows, processors_of(device));
  if (chosen.kernel == nullptr)
    throw std::invalid_argument("no reduction for products of dtype code " + std::to_string(dtype));
  if (n_rows > kMaxBlocks) throw std::invalid_argument("too many rows for one launch: " + std::to_string(n_rows));
  void* parameters[] = {&args};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(chosen.kernel), dim3(static_cast<unsigned>(n_rows)),
                         dim3(static_cast<unsigned>(chosen.threads)), parameters, chosen.shared,
                         static_cast<cudaStream_t>(stream)),
        "cudaLaunchKernel");
}

}  // namespace mechanex
