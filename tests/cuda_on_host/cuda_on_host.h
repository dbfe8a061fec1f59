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

enum Wait { kReady, kWarpBarrier, kBlockBarrier, kDone };

struct Fiber {
  ucontext_t context;
  Wait wait = kReady;
  uint64_t slots[2] = {};
  int exchanges = 0;
};

struct Block {
  std::vector<unsigned char> shared;
  std::vector<Fiber> fibers;
  std::function<void()> body;
  ucontext_t scheduler;
  std::exception_ptr error;
  int running = 0;
};

inline thread_local Block* block = nullptr;
inline thread_local Index thread_index, block_index, block_size;

inline void wait(Wait at) {
  Fiber& self = block->fibers[block->running];
  self.wait = at;
  swapcontext(&self.context, &block->scheduler);
}

inline void enter() {
  try {
    block->body();
  } catch (...) {
    block->error = std::current_exception();
  }
  block->fibers[block->running].wait = kDone;
}

// Lets threads [from, to) go on if all of them wait at this barrier.
inline bool release(Block& b, size_t from, size_t to, Wait at) {
  for (size_t i = from; i < to; ++i)
    if (b.fibers[i].wait != at) return false;
  for (size_t i = from; i < to; ++i) b.fibers[i].wait = kReady;
  return true;
}

inline void run_block(unsigned index, int threads, size_t shared, std::mt19937& order, std::function<void()> body) {
  constexpr size_t kStack = 1 << 16;
  static thread_local std::vector<unsigned char> stacks;
  stacks.resize(kStack * threads);
  Block b;
  b.shared.assign(shared, 0xff);
  b.fibers.resize(threads);
  b.body = std::move(body);
  block = &b;
  block_index = {index};
  block_size = {static_cast<unsigned>(threads)};
  for (int i = 0; i < threads; ++i) {
    ucontext_t& context = b.fibers[i].context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks.data() + kStack * i;
    context.uc_stack.ss_size = kStack;
    context.uc_link = &b.scheduler;
    makecontext(&context, enter, 0);
  }
  std::vector<int> ready(threads);
  for (int i = 0; i < threads; ++i) ready[i] = i;
  while (!ready.empty()) {
    std::shuffle(ready.begin(), ready.end(), order);
    for (int i : ready) {
      b.running = i;
      thread_index = {static_cast<unsigned>(i)};
      swapcontext(&b.scheduler, &b.fibers[i].context);
    }
    for (int warp = 0; warp < threads; warp += 32) release(b, warp, warp + 32, kWarpBarrier);
    release(b, 0, threads, kBlockBarrier);
    ready.clear();
    bool finished = true;
    for (int i = 0; i < threads; ++i) {
      if (b.fibers[i].wait == kReady) ready.push_back(i);
      finished = finished && b.fibers[i].wait == kDone;
    }
    if (b.error) std::rethrow_exception(b.error);
    if (ready.empty() && !finished) throw std::runtime_error("threads of a block wait at different barriers");
  }
  block = nullptr;
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
  const int self = block->running;
  const int slot = block->fibers[self].exchanges++ % 2;
  memcpy(&block->fibers[self].slots[slot], &value, sizeof(value));
  wait(kWarpBarrier);
  S out;
  memcpy(&out, &block->fibers[self ^ difference].slots[slot], sizeof(out));
  return out;
}

}  // namespace mechanex
