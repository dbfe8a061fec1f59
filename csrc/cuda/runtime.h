// What every launch needs of the CUDA runtime.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <stdexcept>
#include <string>

namespace mechanex {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  // The runtime keeps the error for whoever asks next; it is told here.
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) +
                           ")");
}

// Makes a device the thread's current one and puts the former back.
class OnDevice {
 public:
  explicit OnDevice(int device) : device_(device) {
    check(cudaGetDevice(&former_), "cudaGetDevice");
    if (former_ != device_) check(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~OnDevice() {
    if (former_ != device_) cudaSetDevice(former_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int device_;
  int former_ = 0;
};

// What a device has, asked for once.
template <cudaDeviceAttr kAttribute>
int attribute_of(int device) {
  static std::atomic<int> known[64];
  const bool kept = device < 64;
  int value = kept ? known[device].load(std::memory_order_relaxed) : 0;
  if (value == 0) {
    check(cudaDeviceGetAttribute(&value, kAttribute, device), "cudaDeviceGetAttribute");
    if (kept) known[device].store(value, std::memory_order_relaxed);
  }
  return value;
}

inline int processors_of(int device) { return attribute_of<cudaDevAttrMultiProcessorCount>(device); }

// Largest number of blocks in a launch.
constexpr int64_t kMaxBlocks = 0x7fffffff;

}  // namespace mechanex
