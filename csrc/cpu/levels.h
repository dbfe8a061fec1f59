// The compiled instruction-set levels and the one in use.
#pragma once

#include "../logprob.h"
#include "../sae.h"
#include "../steer.h"

namespace mechanex {

// Best last. A level that this build does not contain is null.
struct CpuLevel {
  const char* name;
  const CpuKernels* kernels;
  const SteerManyKernels* many;
  const LogprobKernels* logprob;
  const SaeKernels* sae;
  bool runs_here;
};

enum : int { kCpuLevels = 3 };

const CpuLevel* cpu_levels();

}  // namespace mechanex
