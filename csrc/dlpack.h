// What is read of DLPack's C interface, version 1, by which torch shows its tensors to others without being linked.
#pragma once

#include <stdint.h>

namespace mechanex {
namespace dlpack {

enum : int32_t { kCpu = 1, kCuda = 2 };
enum : uint8_t { kInt = 0, kFloat = 2, kBFloat = 4 };

struct Tensor {
  void* data;
  int32_t device_type;
  int32_t device;
  int32_t ndim;
  uint8_t kind;
  uint8_t bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

// Both return 0, or -1 with a Python exception set. What a Tensor points at belongs to the object that was read.
using FromPython = int (*)(void* object, Tensor* out);
using CurrentStream = int (*)(int32_t device_type, int32_t device, void** stream);

struct Exchange {
  uint32_t major;
  uint32_t minor;
  void* previous;
  void* allocate;
  void* manage;
  void* give;
  FromPython read;
  CurrentStream current_stream;
};

}  // namespace dlpack
}  // namespace mechanex
