// The Python door of the CUDA kernels: raw addresses and a raw stream in, nothing of torch included or linked.
#include <pybind11/pybind11.h>

#include "direct.h"
#include "launch.h"

namespace py = pybind11;

namespace mechanex {
namespace {

// One steer call; whether the kernels that were asked for serve it.
template <bool kSlices>
bool steer(int dtype, int table_dtype, int64_t n_rows, int64_t d, uintptr_t x, int64_t x_stride, uintptr_t y,
           int64_t y_stride, uintptr_t rows, int64_t rows_stride, uintptr_t strength, uintptr_t bias, uintptr_t left,
           uintptr_t right, int64_t n_edits, int64_t rank, int device, uintptr_t stream) {
  if (rank < 0 || rank > kMaxRank) throw py::value_error("rank must be from 0 to 64, got " + std::to_string(rank));
  SteerArgs args = {};
  args.x = reinterpret_cast<const void*>(x);
  args.x_stride = x_stride;
  args.y = reinterpret_cast<void*>(y);
  args.y_stride = y_stride;
  args.rows = reinterpret_cast<const int32_t*>(rows);
  args.rows_stride = rows_stride;
  args.strength = reinterpret_cast<const void*>(strength);
  args.bias = reinterpret_cast<const void*>(bias);
  args.left = reinterpret_cast<const void*>(left);
  args.right = reinterpret_cast<const void*>(right);
  args.n_edits = n_edits;
  args.rank = rank;
  args.d = d;
  // A launch waits while the device's queue is full.
  py::gil_scoped_release release;
  if (kSlices) return launch_steer_slices(dtype, table_dtype, args, n_rows, device, reinterpret_cast<void*>(stream));
  launch_steer(dtype, table_dtype, args, n_rows, device, reinterpret_cast<void*>(stream));
  return true;
}

void steer_many(int dtype, int table_dtype, int64_t n_rows, int64_t d, uintptr_t x, int64_t x_stride, uintptr_t y,
                int64_t y_stride, uintptr_t rows, int64_t edits, uintptr_t strength, uintptr_t bias, uintptr_t left,
                uintptr_t right, uintptr_t kinds, uintptr_t weight, uintptr_t offset, int64_t n_edits, int64_t rank,
                int device, uintptr_t stream) {
  if (rank < 0 || rank > kMaxRank) throw py::value_error("rank must be from 0 to 64, got " + std::to_string(rank));
  SteerManyArgs args = {};
  args.x = reinterpret_cast<const void*>(x);
  args.x_stride = x_stride;
  args.y = reinterpret_cast<void*>(y);
  args.y_stride = y_stride;
  args.rows = reinterpret_cast<const int32_t*>(rows);
  args.edits = edits;
  args.strength = reinterpret_cast<const void*>(strength);
  args.bias = reinterpret_cast<const void*>(bias);
  args.left = reinterpret_cast<const void*>(left);
  args.right = reinterpret_cast<const void*>(right);
  args.kinds = reinterpret_cast<const int32_t*>(kinds);
  args.weight = reinterpret_cast<const void*>(weight);
  args.offset = reinterpret_cast<const void*>(offset);
  args.n_edits = n_edits;
  args.rank = rank;
  args.d = d;
  py::gil_scoped_release release;
  launch_steer_many(dtype, table_dtype, args, n_rows, device, reinterpret_cast<void*>(stream));
}

void reduce(int dtype, int64_t n_rows, int64_t n_columns, uintptr_t products, uintptr_t bias, uintptr_t target,
            int64_t target_stride, int64_t first, double scale, double softcap, double coldness, uintptr_t maximum,
            uintptr_t total, uintptr_t factor, int device, uintptr_t stream) {
  ReduceArgs args = {};
  args.products = reinterpret_cast<void*>(products);
  args.n_columns = n_columns;
  args.bias = reinterpret_cast<const void*>(bias);
  args.target = reinterpret_cast<const int64_t*>(target);
  args.target_stride = target_stride;
  args.first = first;
  args.scale = scale;
  args.softcap = softcap;
  args.coldness = coldness;
  args.maximum = reinterpret_cast<void*>(maximum);
  args.total = reinterpret_cast<void*>(total);
  args.factor = reinterpret_cast<void*>(factor);
  py::gil_scoped_release release;
  launch_reduce(dtype, args, n_rows, device, reinterpret_cast<void*>(stream));
}

void walk(int dtype, int64_t n_rows, int64_t n_vocab, int64_t width, uintptr_t hidden, int64_t hidden_stride,
          uintptr_t weight, int64_t weight_stride, uintptr_t bias, uintptr_t target, int64_t target_stride,
          double scale, double softcap, double coldness, uintptr_t maximum, uintptr_t total, uintptr_t sums,
          int64_t n_groups, int device, uintptr_t stream) {
  WalkArgs args = {};
  args.hidden = reinterpret_cast<const void*>(hidden);
  args.hidden_stride = hidden_stride;
  args.weight = reinterpret_cast<const void*>(weight);
  args.weight_stride = weight_stride;
  args.bias = reinterpret_cast<const float*>(bias);
  args.target = reinterpret_cast<const int64_t*>(target);
  args.target_stride = target_stride;
  args.n_rows = n_rows;
  args.n_vocab = n_vocab;
  args.width = width;
  args.n_groups = n_groups;
  args.scale = scale;
  args.softcap = softcap;
  args.coldness = coldness;
  args.maximum = reinterpret_cast<float*>(maximum);
  args.total = reinterpret_cast<float*>(total);
  args.sums = reinterpret_cast<float*>(sums);
  py::gil_scoped_release release;
  launch_walk(dtype, args, device, reinterpret_cast<void*>(stream));
}

}  // namespace
}  // namespace mechanex

PYBIND11_MODULE(_native_cuda, m, py::mod_gil_not_used()) {
  using namespace mechanex;
  m.doc() = "Compiled CUDA kernels of mechanex; use them through mechanex.backends.";
  m.attr("__version__") = MECHANEX_VERSION;
  // One more whenever a function takes other arguments or gives something else; modules.py asks for this number.
  m.attr("interface") = 2;
  m.attr("max_rank") = static_cast<int64_t>(kMaxRank);
  m.attr("architectures") = MECHANEX_CUDA_BUILT;
  m.def("runtime_version", &runtime_version, "Version of the CUDA runtime inside, as 1000 * major + 10 * minor.");
  m.def("driver_version", &driver_version, "Version that the driver serves, likewise; 0 without a driver.");
  m.def("check_device", &check_device, "Raise RuntimeError unless the kernels can run on this device.");
  m.def("steer", &steer<false>, "Put one steer call on a stream, by raw addresses; see csrc/cuda/launch.h.");
  m.def("steer_slices", &steer<true>, "Likewise by clusters; False where there is no such kernel.");
  m.def("steer_many", &steer_many, "Put one call of the general steer op on a stream, likewise.");
  if (PyModule_AddFunctions(m.ptr(), direct_methods()) != 0) throw py::error_already_set();
  m.def("reduce", &reduce, "Put one chunk of completion_logprob on a stream, likewise.");
  m.def("walk_groups", &walk_groups, "Parts into which one walk over a vocabulary is shared; 0: there is no kernel.");
  m.def("walk", &walk, "Put one walk over a vocabulary on a stream, by raw addresses.");
}
