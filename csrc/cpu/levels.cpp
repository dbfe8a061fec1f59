#include "levels.h"

#ifdef MECHANEX_X86_LEVELS
#include <cpuid.h>
#endif

namespace mechanex {

extern "C" const CpuKernels* mechanex_cpu_generic();
extern "C" const SteerManyKernels* mechanex_cpu_steer_many_generic();
extern "C" const LogprobKernels* mechanex_cpu_logprob_generic();
extern "C" const SaeKernels* mechanex_cpu_sae_generic();
#ifdef MECHANEX_X86_LEVELS
extern "C" const CpuKernels* mechanex_cpu_avx2();
extern "C" const SteerManyKernels* mechanex_cpu_steer_many_avx2();
extern "C" const LogprobKernels* mechanex_cpu_logprob_avx2();
extern "C" const SaeKernels* mechanex_cpu_sae_avx2();
extern "C" const CpuKernels* mechanex_cpu_avx512();
extern "C" const SteerManyKernels* mechanex_cpu_steer_many_avx512();
extern "C" const LogprobKernels* mechanex_cpu_logprob_avx512();
extern "C" const SaeKernels* mechanex_cpu_sae_avx512();
#endif

#ifdef MECHANEX_X86_LEVELS
// Not by __builtin_cpu_supports, which knows the name in newer compilers only.
static bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}
#endif

const CpuLevel* cpu_levels() {
#ifdef MECHANEX_X86_LEVELS
  __builtin_cpu_init();
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const CpuLevel levels[kCpuLevels] = {
      {"generic", mechanex_cpu_generic(), mechanex_cpu_steer_many_generic(), mechanex_cpu_logprob_generic(),
       mechanex_cpu_sae_generic(), true},
      {"avx2", mechanex_cpu_avx2(), mechanex_cpu_steer_many_avx2(), mechanex_cpu_logprob_avx2(),
       mechanex_cpu_sae_avx2(), avx2},
      {"avx512", mechanex_cpu_avx512(), mechanex_cpu_steer_many_avx512(), mechanex_cpu_logprob_avx512(),
       mechanex_cpu_sae_avx512(), avx512},
  };
#else
  static const CpuLevel levels[kCpuLevels] = {
      {"generic", mechanex_cpu_generic(), mechanex_cpu_steer_many_generic(), mechanex_cpu_logprob_generic(),
       mechanex_cpu_sae_generic(), true},
      {"avx2", nullptr, nullptr, nullptr, nullptr, false},
      {"avx512", nullptr, nullptr, nullptr, nullptr, false},
  };
#endif
  return levels;
}

}  // namespace mechanex
