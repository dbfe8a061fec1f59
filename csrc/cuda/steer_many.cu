#include "launch.h"
#include "runtime.h"
#include "steer_many.cuh"

namespace mechanex {

// What a block may ask of shared memory without being allowed more.
enum : size_t { kUsualShared = 48 * 1024 };

void launch_steer_many(int row_dtype, int table_dtype, SteerManyArgs args, int64_t n_rows, int device, void* stream) {
  if (n_rows <= 0 || args.d <= 0) return;
  if (n_rows > kMaxBlocks) throw std::invalid_argument("more rows than a launch holds: " + std::to_string(n_rows));
  const OnDevice guard(device);
  const ManyPlan chosen = many_plan(row_dtype, table_dtype, args);
  if (chosen.kernel == nullptr)
    throw std::invalid_argument("no kernel for rows of dtype code " + std::to_string(row_dtype) + " and edits of " +
                                std::to_string(table_dtype));
  const void* kernel = reinterpret_cast<const void*>(chosen.kernel);
  if (chosen.shared > kUsualShared)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(chosen.shared)),
          "cudaFuncSetAttribute");
  void* parameters[] = {&args};
  check(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(n_rows)), dim3(static_cast<unsigned>(chosen.threads)),
                         parameters, chosen.shared, static_cast<cudaStream_t>(stream)),
        "cudaLaunchKernel");
}

}  // namespace mechanex
