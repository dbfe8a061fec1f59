// The direct way as a Python module whose kernels run on the CPU, on the CPU's tensors.
#define MX_SERVED_DEVICE dlpack::kCpu
#include <Python.h>

#include "../../csrc/cuda/direct.h"
#include "../../csrc/cuda/plan.cuh"

namespace mechanex {

static int launches = 0;

void launch_steer(int row_dtype, int table_dtype, SteerArgs args, int64_t n_rows, int, void*) {
  const Plan chosen = plan(row_dtype, table_dtype, args, n_rows, 0);
  if (chosen.kernel == nullptr) throw std::invalid_argument("no kernel for these dtypes");
  std::mt19937 order(0);
  for (int64_t b = 0; b < divided_up(n_rows, chosen.rows); ++b)
    cuda_on_host::run_block(static_cast<unsigned>(b), chosen.threads, chosen.shared, order,
                            [&] { chosen.kernel(args, n_rows); });
  ++launches;
}

}  // namespace mechanex

static PyObject* launched(PyObject*, PyObject*) { return PyLong_FromLong(mechanex::launches); }

PyMODINIT_FUNC PyInit_direct_on_host() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "direct_on_host", nullptr, -1, nullptr, nullptr, nullptr,
                                   nullptr,               nullptr};
  static PyMethodDef more[] = {{"launched", &launched, METH_NOARGS, "Launches so far."}, {nullptr, nullptr, 0, nullptr}};
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  if (PyModule_AddFunctions(module, mechanex::direct_methods()) != 0 || PyModule_AddFunctions(module, more) != 0)
    return nullptr;
  return module;
}
