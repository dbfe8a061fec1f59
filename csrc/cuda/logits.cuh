// From products to logits, and sums of their exponentials that minus infinity doesn't spoil.
#pragma once

#include "../logprob.h"
#ifdef __CUDACC__
#include "device.cuh"
#else
#include "cuda_on_host.h"
#endif
#include "elements.cuh"

namespace mechanex {

enum : int { kReduceWarp = 32 };

// From products to logits, with the derivative that the softcap adds to the chain.
template <class S>
struct Bend {
  S scale, softcap, inverse, coldness;

  template <class Args>
  explicit MX_DEVICE Bend(const Args& args)
      : scale(static_cast<S>(args.scale)),
        softcap(static_cast<S>(args.softcap)),
        inverse(args.softcap == 0 ? S(0) : static_cast<S>(1 / args.softcap)),
        coldness(static_cast<S>(args.coldness)) {}

  MX_DEVICE S logit(S product) const {
    const S z = product * scale;
    return coldness * (softcap == 0 ? z : softcap * hyperbolic_tangent(z * inverse));
  }

  // 1 - tanh^2, without the difference.
  MX_DEVICE S steepness(S product) const {
    if (softcap == 0) return 1;
    const S z = product * scale * inverse;
    const S e = exponential(z < 0 ? z + z : -(z + z));
    return 4 * e / ((1 + e) * (1 + e));
  }
};

// What to take differences from: minus infinity would make them NaN, and any number makes them vanish.
template <class S>
MX_DEVICE S finite(S maximum) {
  return maximum == minus_infinity<S>() ? S(0) : maximum;
}

template <class S>
MX_DEVICE S larger(S a, S b) {
  return a > b ? a : b;
}

}  // namespace mechanex
