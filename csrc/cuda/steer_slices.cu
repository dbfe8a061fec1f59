#include "clusters.h"
#include "launch.h"
#include "steer_slices.cuh"

namespace mechanex {

bool launch_steer_slices(int row_dtype, int table_dtype, const SteerArgs& args, int64_t n_rows, int device,
                         void* stream) {
  if (n_rows <= 0 || args.d <= 0) return true;
  const OnDevice guard(device);
  if (!has_clusters(device)) return false;
  const SlicePlan chosen = slice_plan(row_dtype, table_dtype, args, n_rows, most_shared(device));
  if (chosen.kernel == nullptr) return false;
  const Clustered kind = {reinterpret_cast<const void*>(chosen.kernel), chosen.size, kSliceThreads, chosen.shared};
  const int64_t tiles = divided_up(n_rows, chosen.rows), most = clusters_at_once(device, kind);
  if (most < 1) return false;
  SliceArgs given = {args, n_rows, tiles < most ? tiles : most, chosen.stages};
  void* parameters[] = {&given};
  launch_clusters(kind, given.n_groups, parameters, stream);
  return true;
}

}  // namespace mechanex
