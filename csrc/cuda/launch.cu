#include "launch.h"
#include "plan.cuh"
#include "runtime.h"

namespace mechanex {

void check_device(int device) {
  int devices = 0;
  check(cudaGetDeviceCount(&devices), "cudaGetDeviceCount");
  if (device < 0 || device >= devices)
    throw std::invalid_argument("no device " + std::to_string(device) + ": the driver shows " +
                                std::to_string(devices));
  const OnDevice guard(device);
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel_of<Float32, Float32>(kRow, 0, false)), "cudaFuncGetAttributes");
}

void launch_steer(int row_dtype, int table_dtype, SteerArgs args, int64_t n_rows, int device, void* stream) {
  if (n_rows <= 0 || args.d <= 0) return;
  const OnDevice guard(device);
  const Plan chosen = plan(row_dtype, table_dtype, args, n_rows, processors_of(device));
  if (chosen.kernel == nullptr)
    throw std::invalid_argument("no kernel for rows of dtype code " + std::to_string(row_dtype) + " and edits of " +
                                std::to_string(table_dtype));
  const int64_t row_bytes = row_dtype == kFloat64 ? 8 : row_dtype == kFloat32 ? 4 : 2;
  while (n_rows > 0) {
    const int64_t blocks = divided_up(n_rows, chosen.rows) < kMaxBlocks ? divided_up(n_rows, chosen.rows) : kMaxBlocks;
    void* parameters[] = {&args, &n_rows};
    check(cudaLaunchKernel(reinterpret_cast<const void*>(chosen.kernel), dim3(static_cast<unsigned>(blocks)),
                           dim3(static_cast<unsigned>(chosen.threads)), parameters, chosen.shared,
                           static_cast<cudaStream_t>(stream)),
          "cudaLaunchKernel");
    const int64_t done = blocks * chosen.rows;
    n_rows -= done;
    args.x = static_cast<const char*>(args.x) + done * args.x_stride * row_bytes;
    args.y = static_cast<char*>(args.y) + done * args.y_stride * row_bytes;
    if (args.rows != nullptr) args.rows += done * args.rows_stride;
    if (args.strength != nullptr)
      args.strength = static_cast<const char*>(args.strength) + done * (row_dtype == kFloat64 ? 8 : 4);
  }
}

int runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version), "cudaRuntimeGetVersion");
  return version;
}

int driver_version() {
  int version = 0;
  check(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
  return version;
}

}  // namespace mechanex
