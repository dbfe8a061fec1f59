// The CUDA kernels as the bindings see them: no Python and no kernel code.
#pragma once

#include <string>

#include "../logprob.h"
#include "../steer.h"

namespace mechanex {

// Throws std::runtime_error with the runtime's words unless this build's kernels can run on the device.
void check_device(int device);

// Puts one steer call on a stream of the device and returns without waiting. SteerArgs as in steer.h, with addresses of
// the device; the edits' dtype is the rows' own, or float32 for rows of a half type. A row whose index is outside the
// table becomes NaN. Throws std::invalid_argument for dtypes that don't go together, std::runtime_error for what the
// runtime refuses; errors of a kernel that already runs show up where the stream is next waited for.
void launch_steer(int row_dtype, int table_dtype, SteerArgs args, int64_t n_rows, int device, void* stream);

// Likewise by clusters of blocks that share the width; false, and nothing done, where this device or this build has no
// such kernel for these arguments.
bool launch_steer_slices(int row_dtype, int table_dtype, const SteerArgs& args, int64_t n_rows, int device,
                         void* stream);

// Likewise the general steer op; SteerManyArgs as in steer.h.
void launch_steer_many(int row_dtype, int table_dtype, SteerManyArgs args, int64_t n_rows, int device, void* stream);

// Likewise folds one chunk of products of this dtype into what is kept of each row; ReduceArgs as in logprob.h.
void launch_reduce(int dtype, ReduceArgs args, int64_t n_rows, int device, void* stream);

// The groups of blocks among which one walk over a vocabulary is shared (WalkArgs in logprob.h); 0 where this device or
// this build has no kernel for hidden states of this dtype and size. Outputs hold one part for each.
int64_t walk_groups(int dtype, int64_t n_rows, int64_t n_vocab, int64_t width, int device);

// Likewise puts that walk on a stream; args.n_groups as walk_groups gave them.
void launch_walk(int dtype, WalkArgs args, int device, void* stream);

// Versions of the runtime in this build and of the one that the driver serves, as 1000 * major + 10 * minor.
int runtime_version();
int driver_version();

}  // namespace mechanex
