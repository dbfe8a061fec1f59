// What touches the hardware: wide loads and stores, rounding to the half types, exchange within a warp.
// tests/cuda_on_host stands in for this file where the kernels are checked without a GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#define MX_DEVICE __device__ __forceinline__
#define MX_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace mechanex {

// 16 bytes of a row. Nobody reads them again, so they leave the first cache to the edits.
MX_DEVICE uint4 load_once(const uint4* p) {
  uint4 v;
  // volatile: it must not sink below the wait for the row index.
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// 16 bytes of an edit, which the next rows read too.
MX_DEVICE uint4 load_kept(const uint4* p) { return __ldg(p); }

// 16 bytes that the same thread may write later.
MX_DEVICE uint4 load_again(const uint4* p) { return *p; }

// Keeps what follows from a value out of registers until here.
MX_DEVICE void compute_late(int64_t& value) { asm volatile("" : "+l"(value)); }

MX_DEVICE float float_of(uint32_t word) { return __uint_as_float(word); }
MX_DEVICE uint32_t word_of(float value) { return __float_as_uint(value); }
MX_DEVICE double double_of(uint32_t low, uint32_t high) { return __hiloint2double(high, low); }
MX_DEVICE uint32_t low_word(double value) { return __double2loint(value); }
MX_DEVICE uint32_t high_word(double value) { return __double2hiint(value); }

MX_DEVICE float float_of_half(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
MX_DEVICE uint16_t half_of(float value) { return __half_as_ushort(__float2half_rn(value)); }
MX_DEVICE uint16_t bfloat_of(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }

// Two values in one word, the first in its low half.
MX_DEVICE uint32_t halves_of(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return static_cast<uint32_t>(__half_as_ushort(pair.y)) << 16 | __half_as_ushort(pair.x);
}

MX_DEVICE uint32_t bfloats_of(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16 | __bfloat16_as_ushort(pair.x);
}

MX_DEVICE float exponential(float value) { return expf(value); }
MX_DEVICE double exponential(double value) { return exp(value); }
MX_DEVICE float square_root(float value) { return sqrtf(value); }
MX_DEVICE double square_root(double value) { return sqrt(value); }
MX_DEVICE float hyperbolic_tangent(float value) { return tanhf(value); }
MX_DEVICE double hyperbolic_tangent(double value) { return tanh(value); }

template <class S>
MX_DEVICE S from_lane(S value, int difference) {
  return __shfl_xor_sync(0xffffffffu, value, difference);
}

// Threads of a warp wait for each other, and see what was written before.
MX_DEVICE void await_warp() { __syncwarp(); }

}  // namespace mechanex
