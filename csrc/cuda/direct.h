// The steer op on torch's own tensors: launched as it is described.
#pragma once

#include <exception>

#include "../direct.h"
#include "launch.h"

// Tests put the processor here, and launch on it.
#ifndef MX_SERVED_DEVICE
#define MX_SERVED_DEVICE dlpack::kCuda
#endif

namespace mechanex {

// steer_direct(hidden, rows, bias, left, right, strength): the edited tensor, or None where the call isn't plain.
// hidden is [..., d].
inline PyObject* steer_direct(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (n != 6 || torch_given().exchange == nullptr) Py_RETURN_NONE;
  DirectCall call(MX_SERVED_DEVICE);
  void* stream = nullptr;
  if (!call.serves(args) || !call.stream(&stream)) Py_RETURN_NONE;
  PyObject* out = call.result(args[0]);
  if (out == nullptr) {
    if (PyErr_Occurred()) return nullptr;
    Py_RETURN_NONE;
  }
  try {
    // A launch waits while the device's queue is full.
    PyThreadState* state = PyEval_SaveThread();
    struct Resume {
      PyThreadState* state;
      ~Resume() { PyEval_RestoreThread(state); }
    } resume{state};
    launch_steer(call.row_dtype, call.table_dtype, call.args, call.n_rows, call.device, stream);
  } catch (const std::exception& error) {
    Py_DECREF(out);
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  return out;
}

inline PyMethodDef* direct_methods() {
  static PyMethodDef methods[] = {
      setup_method(),
      fast_method("steer_direct", &steer_direct,
                  "steer_direct(hidden, rows, bias, left, right, strength): one steer call on torch's current stream, "
                  "or None."),
      {nullptr, nullptr, 0, nullptr}};
  return methods;
}

}  // namespace mechanex
