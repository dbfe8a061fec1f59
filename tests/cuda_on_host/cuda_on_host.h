// Runs a CUDA kernel's own source on the CPU: every thread of a block is a fiber, resumed in a random order, and stops
// at each barrier. Shared memory starts as NaN. Slow and exact: for finding wrong indices, missing barriers and threads
// that wait at different ones, not for timing.
#pragma once

#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <functional>
#include <random>
#include <stdexcept>
#include <vector>

#define __global__
#define __host__
#define __device__
#define __launch_bounds__(...)
#define MX_DEVICE inline
#define MX_DYNAMIC_SHARED(name) unsigned char* name = cuda_on_host::block->shared.data()

inline void check_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) throw std::runtime_error("a 16-byte access is not aligned");
}

struct uint4 {
  uint32_t x, y, z, w;
  uint4& operator=(const uint4& other) {
    check_aligned(this);
    memcpy(this, &other, sizeof(other));
    return *this;
  }
};

inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace cuda_on_host {

struct Index {
  unsigned x;
};

enum Wait { kReady, kWarpBarrier, kBlockBarrier, kClusterBarrier, kDone };

struct Copy {
  void* to;
  const void* from;
  bool exists;
};

struct Fiber {
  ucontext_t context;
  Wait wait = kReady;
  unsigned char slots[2][32] = {};
  int exchanges = 0;
  std::vector<std::vector<Copy>> copies = {{}};
};

struct Block {
  std::vector<unsigned char> shared;
  std::vector<Fiber> fibers;
  int running = 0;
};

struct Cluster {
  std::vector<Block> blocks;
  std::function<void()> body;
  ucontext_t scheduler;
  std::exception_ptr error;
};

inline thread_local Cluster* cluster = nullptr;
inline thread_local Block* block = nullptr;
inline thread_local Index thread_index, block_index, block_size;

inline void wait(Wait at) {
  Fiber& self = block->fibers[block->running];
  self.wait = at;
  swapcontext(&self.context, &cluster->scheduler);
}

inline void enter() {
  try {
    cluster->body();
  } catch (...) {
    cluster->error = std::current_exception();
  }
  block->fibers[block->running].wait = kDone;
}

inline bool all_wait(const Block& b, size_t from, size_t to, Wait at) {
  for (size_t i = from; i < to; ++i)
    if (b.fibers[i].wait != at) return false;
  return true;
}

// Lets threads [from, to) go on if all of them wait at this barrier.
inline void release(Block& b, size_t from, size_t to, Wait at) {
  if (!all_wait(b, from, to, at)) return;
  for (size_t i = from; i < to; ++i) b.fibers[i].wait = kReady;
}

// Runs blocks [first, first + size) as one cluster.
inline void run_cluster(unsigned first, int size, int threads, size_t shared, std::mt19937& order,
                        std::function<void()> body) {
  constexpr size_t kStack = 1 << 16;
  static thread_local std::vector<unsigned char> stacks;
  stacks.resize(kStack * threads * size);
  Cluster c;
  c.blocks.resize(size);
  c.body = std::move(body);
  cluster = &c;
  block_size = {static_cast<unsigned>(threads)};
  std::vector<int> ready(threads * size);
  for (int i = 0; i < threads * size; ++i) {
    Block& b = c.blocks[i / threads];
    if (b.fibers.empty()) {
      b.shared.assign(shared, 0xff);
      b.fibers.resize(threads);
    }
    ucontext_t& context = b.fibers[i % threads].context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks.data() + kStack * i;
    context.uc_stack.ss_size = kStack;
    context.uc_link = &c.scheduler;
    makecontext(&context, enter, 0);
    ready[i] = i;
  }
  while (!ready.empty()) {
    std::shuffle(ready.begin(), ready.end(), order);
    for (int i : ready) {
      block = &c.blocks[i / threads];
      block->running = i % threads;
      thread_index = {static_cast<unsigned>(i % threads)};
      block_index = {first + i / threads};
      swapcontext(&c.scheduler, &block->fibers[block->running].context);
    }
    bool together = true;
    for (Block& b : c.blocks) {
      for (int warp = 0; warp < threads; warp += 32) release(b, warp, warp + 32, kWarpBarrier);
      release(b, 0, threads, kBlockBarrier);
      together = together && all_wait(b, 0, threads, kClusterBarrier);
    }
    if (together)
      for (Block& b : c.blocks) release(b, 0, threads, kClusterBarrier);
    ready.clear();
    bool finished = true;
    for (int i = 0; i < threads * size; ++i) {
      const Wait at = c.blocks[i / threads].fibers[i % threads].wait;
      if (at == kReady) ready.push_back(i);
      finished = finished && at == kDone;
    }
    if (c.error) std::rethrow_exception(c.error);
    if (ready.empty() && !finished) throw std::runtime_error("threads of a block wait at different barriers");
  }
  block = nullptr;
  cluster = nullptr;
}

inline void run_block(unsigned index, int threads, size_t shared, std::mt19937& order, std::function<void()> body) {
  run_cluster(index, 1, threads, shared, order, std::move(body));
}

// What this lane gives to the others of its warp; they may read it with `given_by` until they give again.
inline int give(const void* value, size_t size) {
  Fiber& self = block->fibers[block->running];
  const int slot = self.exchanges++ % 2;
  memcpy(self.slots[slot], value, size);
  wait(kWarpBarrier);
  return slot;
}

template <class T>
T given_by(int lane, int slot) {
  T out;
  memcpy(&out, block->fibers[block->running / 32 * 32 + lane].slots[slot], sizeof(out));
  return out;
}

}  // namespace cuda_on_host

#define threadIdx cuda_on_host::thread_index
#define blockIdx cuda_on_host::block_index
#define blockDim cuda_on_host::block_size

inline void __syncthreads() { cuda_on_host::wait(cuda_on_host::kBlockBarrier); }

namespace mechanex {

inline uint4 load_once(const uint4* p) {
  check_aligned(p);
  return *p;
}

inline uint4 load_kept(const uint4* p) { return load_once(p); }
inline uint4 load_again(const uint4* p) { return load_once(p); }

inline void compute_late(int64_t&) {}

template <class To, class From>
inline To same_bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "same_bits needs equal sizes");
  To out;
  memcpy(&out, &value, sizeof(out));
  return out;
}

inline float float_of(uint32_t word) { return same_bits<float>(word); }
inline uint32_t word_of(float value) { return same_bits<uint32_t>(value); }
inline double double_of(uint32_t low, uint32_t high) { return same_bits<double>(uint64_t{high} << 32 | low); }
inline uint32_t low_word(double value) { return static_cast<uint32_t>(same_bits<uint64_t>(value)); }
inline uint32_t high_word(double value) { return static_cast<uint32_t>(same_bits<uint64_t>(value) >> 32); }

inline float float_of_half(uint16_t bits) { return static_cast<float>(same_bits<_Float16>(bits)); }
inline uint16_t half_of(float value) { return same_bits<uint16_t>(static_cast<_Float16>(value)); }
inline uint16_t bfloat_of(float value) {
  const uint32_t word = word_of(value);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}
inline uint32_t halves_of(float first, float second) { return uint32_t{half_of(second)} << 16 | half_of(first); }
inline uint32_t bfloats_of(float first, float second) { return uint32_t{bfloat_of(second)} << 16 | bfloat_of(first); }

inline float exponential(float value) { return std::exp(value); }
inline double exponential(double value) { return std::exp(value); }
inline float square_root(float value) { return std::sqrt(value); }
inline double square_root(double value) { return std::sqrt(value); }
inline float hyperbolic_tangent(float value) { return std::tanh(value); }
inline double hyperbolic_tangent(double value) { return std::tanh(value); }

template <class S>
inline S from_lane(S value, int difference) {
  using namespace cuda_on_host;
  const int slot = give(&value, sizeof(value));
  return given_by<S>(block->running % 32 ^ difference, slot);
}

inline void await_warp() { cuda_on_host::wait(cuda_on_host::kWarpBarrier); }

// In place of csrc/cuda/matrices.cuh. Copies arrive when they are waited for, not before.
#define MX_HAS_CLUSTERS 1

inline void copy_async(void* to, const void* from, bool exists) {
  check_aligned(to);
  check_aligned(from);
  cuda_on_host::block->fibers[cuda_on_host::block->running].copies.back().push_back({to, from, exists});
}

inline void commit_copies() { cuda_on_host::block->fibers[cuda_on_host::block->running].copies.emplace_back(); }

template <int kLeft>
inline void await_copies() {
  auto& groups = cuda_on_host::block->fibers[cuda_on_host::block->running].copies;
  while (groups.size() > kLeft + 1) {
    for (const cuda_on_host::Copy& copy : groups.front()) {
      if (copy.exists)
        memcpy(copy.to, copy.from, 16);
      else
        memset(copy.to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

template <bool kTransposed>
inline void load_lanes(uint32_t (&out)[4], const void* row) {
  using namespace cuda_on_host;
  check_aligned(row);
  const int slot = give(&row, sizeof(row)), lane = block->running % 32;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const int wide = lane % 4 * 2, tall = lane / 4;
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int from = kTransposed ? wide + i : tall, at = kTransposed ? tall : wide + i;
      pair[i] = given_by<const uint16_t*>(8 * matrix + from, slot)[at];
    }
    out[matrix] = uint32_t{pair[1]} << 16 | pair[0];
  }
}

inline void load_matrices(uint32_t (&out)[4], const void* row) { load_lanes<false>(out, row); }
inline void load_transposed(uint32_t (&out)[4], const void* row) { load_lanes<true>(out, row); }

template <class Half>
inline void multiply_add(float (&out)[4], const uint32_t (&left)[4], uint32_t right, uint32_t right_below, Half) {
  using namespace cuda_on_host;
  struct Given {
    uint32_t left[4], right[2];
  } mine = {{left[0], left[1], left[2], left[3]}, {right, right_below}};
  const int slot = give(&mine, sizeof(mine)), lane = block->running % 32;
  const auto half = [](uint32_t word, int i) { return Half::widen(static_cast<uint16_t>(word >> (i % 2 * 16))); };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = lane % 4 * 2 + i % 2;
    float sum = out[i];
    for (int k = 0; k < 16; ++k) {
      const Given a = given_by<Given>(row * 4 + k % 8 / 2, slot), b = given_by<Given>(column * 4 + k % 8 / 2, slot);
      sum += half(a.left[i / 2 + k / 8 * 2], k) * half(b.right[k / 8], k);
    }
    out[i] = sum;
  }
}

inline int cluster_size() { return static_cast<int>(cuda_on_host::cluster->blocks.size()); }
inline int cluster_rank() { return static_cast<int>(cuda_on_host::block - cuda_on_host::cluster->blocks.data()); }
inline void await_cluster() { cuda_on_host::wait(cuda_on_host::kClusterBarrier); }

template <class T>
inline T read_from(const T* p, int rank) {
  using namespace cuda_on_host;
  const auto at = reinterpret_cast<const unsigned char*>(p) - block->shared.data();
  return *reinterpret_cast<const T*>(cluster->blocks[rank].shared.data() + at);
}

}  // namespace mechanex
