#include "clusters.h"
#include "launch.h"
#include "logprob_walk.cuh"

namespace mechanex {

namespace {

WalkPlan plan_on(int device, int dtype, int64_t n_rows, int64_t width) {
  if (!has_clusters(device)) return {nullptr, 0, 0, 0};
  return walk_plan(dtype, n_rows, width, most_shared(device));
}

Clustered kind_of(const WalkPlan& chosen) {
  return {reinterpret_cast<const void*>(chosen.kernel), chosen.size, kWalkThreads, chosen.shared};
}

}  // namespace

int64_t walk_groups(int dtype, int64_t n_rows, int64_t n_vocab, int64_t width, int device) {
  const OnDevice guard(device);
  const WalkPlan chosen = plan_on(device, dtype, n_rows, width);
  if (chosen.kernel == nullptr || n_vocab < 1) return 0;
  const int64_t tiles = (n_vocab + kWalkTokens - 1) / kWalkTokens;
  const int64_t most = clusters_at_once(device, kind_of(chosen));
  return tiles < most ? tiles : most;
}

void launch_walk(int dtype, WalkArgs args, int device, void* stream) {
  const OnDevice guard(device);
  const WalkPlan chosen = plan_on(device, dtype, args.n_rows, args.width);
  if (chosen.kernel == nullptr || args.n_groups < 1 || clusters_at_once(device, kind_of(chosen)) < 1)
    throw std::invalid_argument("no walk for " + std::to_string(args.n_rows) + " rows " + std::to_string(args.width) +
                                " wide of dtype code " + std::to_string(dtype));
  int stages = chosen.stages;
  void* parameters[] = {&args, &stages};
  launch_clusters(kind_of(chosen), args.n_groups, parameters, stream);
}

}  // namespace mechanex
