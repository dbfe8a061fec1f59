#include <map>
#include <mutex>
#include <tuple>

#include "launch.h"
#include "logprob_walk.cuh"
#include "runtime.h"

namespace mechanex {

namespace {

int attribute_of(int device, cudaDeviceAttr attribute) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

WalkPlan plan_on(int device, int dtype, int64_t n_rows, int64_t width) {
  if (attribute_of(device, cudaDevAttrComputeCapabilityMajor) < 9) return {nullptr, 0, 0, 0};
  const int shared = attribute_of(device, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return walk_plan(dtype, n_rows, width, static_cast<size_t>(shared));
}

// A launch of one cluster; the attribute has to outlive it.
cudaLaunchConfig_t configuration(const WalkPlan& chosen, int64_t groups, cudaLaunchAttribute* cluster, void* stream) {
  cluster->id = cudaLaunchAttributeClusterDimension;
  cluster->val.clusterDim.x = static_cast<unsigned>(chosen.size);
  cluster->val.clusterDim.y = cluster->val.clusterDim.z = 1;
  cudaLaunchConfig_t made = {};
  made.gridDim = dim3(static_cast<unsigned>(groups * chosen.size));
  made.blockDim = dim3(kWalkThreads);
  made.dynamicSmemBytes = chosen.shared;
  made.stream = static_cast<cudaStream_t>(stream);
  made.attrs = cluster;
  made.numAttrs = 1;
  return made;
}

void allow_shared(const WalkPlan& chosen) {
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(chosen.kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(chosen.shared)),
        "cudaFuncSetAttribute");
}

// Clusters of this kind that the device holds at the same time: those of a second round would double the time.
int64_t clusters_at_once(int device, const WalkPlan& chosen) {
  using Key = std::tuple<int, WalkKernel, int, size_t>;
  static std::mutex mutex;
  static std::map<Key, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [at, is_new] = known.try_emplace(Key(device, chosen.kernel, chosen.size, chosen.shared), 0);
  if (is_new) {
    allow_shared(chosen);
    cudaLaunchAttribute cluster;
    const cudaLaunchConfig_t made = configuration(chosen, 1, &cluster, nullptr);
    const auto* kernel = reinterpret_cast<const void*>(chosen.kernel);
    const cudaError_t status = cudaOccupancyMaxActiveClusters(&at->second, kernel, &made);
    if (status != cudaSuccess) {
      known.erase(at);
      check(status, "cudaOccupancyMaxActiveClusters");
    }
  }
  return at->second;
}

}  // namespace

int64_t walk_groups(int dtype, int64_t n_rows, int64_t n_vocab, int64_t width, int device) {
  const OnDevice guard(device);
  const WalkPlan chosen = plan_on(device, dtype, n_rows, width);
  if (chosen.kernel == nullptr || n_vocab < 1) return 0;
  const int64_t tiles = (n_vocab + kWalkTokens - 1) / kWalkTokens;
  const int64_t most = clusters_at_once(device, chosen);
  return tiles < most ? tiles : most;
}

void launch_walk(int dtype, WalkArgs args, int device, void* stream) {
  const OnDevice guard(device);
  const WalkPlan chosen = plan_on(device, dtype, args.n_rows, args.width);
  if (chosen.kernel == nullptr || args.n_groups < 1)
    throw std::invalid_argument("no walk for " + std::to_string(args.n_rows) + " rows " + std::to_string(args.width) +
                                " wide of dtype code " + std::to_string(dtype));
  allow_shared(chosen);
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t made = configuration(chosen, args.n_groups, &cluster, stream);
  int stages = chosen.stages;
  void* parameters[] = {&args, &stages};
  check(cudaLaunchKernelExC(&made, reinterpret_cast<const void*>(chosen.kernel), parameters), "cudaLaunchKernelExC");
}

}  // namespace mechanex
