#include <map>
#include <mutex>
#include <tuple>

#include "clusters.h"

namespace mechanex {

namespace {

// A launch of clusters; the attribute has to outlive it.
cudaLaunchConfig_t configuration(const Clustered& kind, int64_t clusters, cudaLaunchAttribute* cluster, void* stream) {
  cluster->id = cudaLaunchAttributeClusterDimension;
  cluster->val.clusterDim.x = static_cast<unsigned>(kind.size);
  cluster->val.clusterDim.y = cluster->val.clusterDim.z = 1;
  cudaLaunchConfig_t made = {};
  made.gridDim = dim3(static_cast<unsigned>(clusters * kind.size));
  made.blockDim = dim3(static_cast<unsigned>(kind.threads));
  made.dynamicSmemBytes = kind.shared;
  made.stream = static_cast<cudaStream_t>(stream);
  made.attrs = cluster;
  made.numAttrs = 1;
  return made;
}

// Whether the device runs code of a kernel that was compiled for clusters. Where a module has none for this device, the
// driver makes it from PTX for an older one, in which the kernel's body is empty.
bool is_compiled_for_clusters(const void* kernel) {
  cudaFuncAttributes found;
  check(cudaFuncGetAttributes(&found, kernel), "cudaFuncGetAttributes");
  return found.ptxVersion >= 90 && found.binaryVersion >= 90;
}

}  // namespace

int64_t clusters_at_once(int device, const Clustered& kind) {
  using Key = std::tuple<int, const void*, int, size_t>;
  static std::mutex mutex;
  static std::map<Key, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const Key key(device, kind.kernel, kind.size, kind.shared);
  const auto at = known.find(key);
  if (at != known.end()) return at->second;
  if (!is_compiled_for_clusters(kind.kernel)) return known[key] = 0;
  // All that there is, since the last word on a kernel counts for every size of it.
  check(cudaFuncSetAttribute(kind.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(most_shared(device))),
        "cudaFuncSetAttribute");
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t made = configuration(kind, 1, &cluster, nullptr);
  int most = 0;
  check(cudaOccupancyMaxActiveClusters(&most, kind.kernel, &made), "cudaOccupancyMaxActiveClusters");
  known[key] = most;
  return most;
}

void launch_clusters(const Clustered& kind, int64_t clusters, void** parameters, void* stream) {
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t made = configuration(kind, clusters, &cluster, stream);
  check(cudaLaunchKernelExC(&made, kind.kernel, parameters), "cudaLaunchKernelExC");
}

}  // namespace mechanex
