// What touches the hardware of products of tiles: copies that go on beside the arithmetic, tensor cores, and blocks of
// a cluster that read each other's shared memory. tests/cuda_on_host stands in for this file too.
#pragma once

#include <stdint.h>

#include "device.cuh"

// Clusters came with compute capability 9.0; code for older GPUs has the kernel without its body.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define MX_HAS_CLUSTERS 1
#else
#define MX_HAS_CLUSTERS 0
#endif

namespace mechanex {

MX_DEVICE uint32_t in_shared(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Sends 16 bytes to shared memory, zeros where they don't exist; both addresses are aligned.
MX_DEVICE void copy_async(void* to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(in_shared(to)), "l"(from), "r"(exists ? 16 : 0)
               : "memory");
}

// Ends a group of copies.
MX_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's groups of copies, all but the last kLeft.
template <int kLeft>
MX_DEVICE void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Four 8 x 8 matrices of half types. Lane 8 i + j gives the address of row j of matrix i; a lane gets, of each matrix,
// the elements 2 (lane % 4) and the next of row lane / 4, in one word.
MX_DEVICE void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(in_shared(row))
               : "memory");
}

// The same of the transposed matrices.
MX_DEVICE void load_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(in_shared(row))
               : "memory");
}

// out += left x right for left [16, 16], right [16, 8] and out [16, 8]. A lane holds of left: rows lane / 4 and + 8,
// columns 2 (lane % 4) and the next, then those + 8 (as four matrices that were loaded: rows first). Of right: the
// transposed of two matrices. Of out: row lane / 4, columns 2 (lane % 4) and the next; then row + 8.
MX_DEVICE void multiply_add(float (&out)[4], const uint32_t (&left)[4], uint32_t right, uint32_t right_below,
                            BFloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(out[0]), "+f"(out[1]), "+f"(out[2]), "+f"(out[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right), "r"(right_below));
}

MX_DEVICE void multiply_add(float (&out)[4], const uint32_t (&left)[4], uint32_t right, uint32_t right_below, Float16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(out[0]), "+f"(out[1]), "+f"(out[2]), "+f"(out[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right), "r"(right_below));
}

#if MX_HAS_CLUSTERS
MX_DEVICE int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

MX_DEVICE int cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}

// All threads of the cluster wait for each other, and see what was written before.
MX_DEVICE void await_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// What another block of the cluster has at the same place of its shared memory.
MX_DEVICE uint32_t in_block(const void* p, int rank) {
  uint32_t at;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(in_shared(p)), "r"(rank));
  return at;
}

MX_DEVICE float read_from(const float* p, int rank) {
  float value;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(in_block(p, rank)) : "memory");
  return value;
}

MX_DEVICE uint4 read_from(const uint4* p, int rank) {
  uint4 v;
  asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(in_block(p, rank))
               : "memory");
  return v;
}
#else
MX_DEVICE float read_from(const float*, int) { return 0; }
#endif

}  // namespace mechanex
