// Launches of clusters: blocks that run at the same time and read each other's shared memory.
#pragma once

#include "runtime.h"

namespace mechanex {

// A kernel that runs in clusters.
struct Clustered {
  const void* kernel;
  int size;  // blocks of a cluster
  int threads;
  size_t shared;  // bytes of a block
};

inline bool has_clusters(int device) { return attribute_of<cudaDevAttrComputeCapabilityMajor>(device) >= 9; }

// Most bytes of shared memory that a block may have.
inline size_t most_shared(int device) {
  return static_cast<size_t>(attribute_of<cudaDevAttrMaxSharedMemoryPerBlockOptin>(device));
}

// How many clusters of this kind the device, the current one, holds at the same time; those beyond wait for a second
// round. 0 where the module has only older code for the kernel, whose body is empty. The first call allows the kernel
// all of a block's shared memory.
int64_t clusters_at_once(int device, const Clustered& kind);

// Puts so many clusters on a stream of the current device, after clusters_at_once found room for some.
void launch_clusters(const Clustered& kind, int64_t clusters, void** parameters, void* stream);

}  // namespace mechanex
