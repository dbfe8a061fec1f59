// The steer op on torch's own tensors: checked, described and launched without a line of Python in between, for the
// plain calls that a model's hooks make. Anything else is left to the caller, who says what is wrong with it.
#pragma once

#include <Python.h>

#include <exception>

#include "../dlpack.h"
#include "launch.h"

// Tests put the processor here, and launch on it.
#ifndef MX_SERVED_DEVICE
#define MX_SERVED_DEVICE dlpack::kCuda
#endif

namespace mechanex {

// What torch has given, for the life of the process.
struct Torch {
  const dlpack::Exchange* exchange;
  PyTypeObject* tensor;
  PyTypeObject* parameter;
  PyObject* empty_like;
  PyObject* is_neg;  // the method's name
};

inline Torch& torch_given() {
  static Torch given = {};
  return given;
}

// direct_setup(capsule, Tensor, Parameter, empty_like): whether the direct way can be used with this torch.
inline PyObject* direct_setup(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (n != 4 || !PyType_Check(args[1]) || !PyType_Check(args[2])) {
    PyErr_SetString(PyExc_TypeError, "direct_setup takes a capsule, two types and a function");
    return nullptr;
  }
  const auto* exchange = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(args[0], "dlpack_exchange_api"));
  if (exchange == nullptr) return nullptr;
  if (exchange->major != 1 || exchange->read == nullptr || exchange->current_stream == nullptr) Py_RETURN_FALSE;
  for (Py_ssize_t i = 0; i < n; ++i) Py_INCREF(args[i]);
  torch_given() = {exchange, reinterpret_cast<PyTypeObject*>(args[1]), reinterpret_cast<PyTypeObject*>(args[2]),
                   args[3], PyUnicode_InternFromString("is_neg")};
  Py_RETURN_TRUE;
}

// Whether the object is a plain tensor on a served device whose memory holds its values one after another.
inline bool read_plain(PyObject* object, dlpack::Tensor* out) {
  const Torch& torch = torch_given();
  if (Py_TYPE(object) != torch.tensor && Py_TYPE(object) != torch.parameter) return false;
  if (torch.exchange->read(object, out) != 0) {
    PyErr_Clear();
    return false;
  }
  if (out->device_type != MX_SERVED_DEVICE || out->lanes != 1) return false;
  int64_t stride = 1;
  for (int i = out->ndim - 1; i >= 0; --i) {
    if (out->shape[i] != 1 && out->strides[i] != stride) return false;
    stride *= out->shape[i];
  }
  out->data = static_cast<char*>(out->data) + out->byte_offset;
  // Of a lazily negated view the memory holds other values.
  PyObject* negated = PyObject_CallMethodNoArgs(object, torch.is_neg);
  Py_XDECREF(negated);
  if (negated == nullptr) PyErr_Clear();
  return negated == Py_False;
}

// The dtype's code, or -1.
inline int dtype_of(const dlpack::Tensor& tensor) {
  if (tensor.kind == dlpack::kFloat && tensor.bits == 32) return kFloat32;
  if (tensor.kind == dlpack::kFloat && tensor.bits == 64) return kFloat64;
  if (tensor.kind == dlpack::kBFloat && tensor.bits == 16) return kBFloat16;
  if (tensor.kind == dlpack::kFloat && tensor.bits == 16) return kFloat16;
  return -1;
}

// One call, described; `serves` tells whether the kernels take it as it is.
struct DirectCall {
  SteerArgs args = {};
  int row_dtype = -1;
  int table_dtype = -1;
  int64_t n_rows = 1;
  int device = 0;

  bool serves(PyObject* const* given) {
    PyObject *hidden = given[0], *rows = given[1], *bias = given[2], *left = given[3], *right = given[4];
    PyObject* strength = given[5];
    dlpack::Tensor x, table;
    if (!read_plain(hidden, &x) || x.ndim < 1) return false;
    for (int i = 0; i + 1 < x.ndim; ++i) n_rows *= x.shape[i];
    args.x = x.data;
    args.d = args.x_stride = args.y_stride = x.shape[x.ndim - 1];
    device = x.device;
    row_dtype = dtype_of(x);
    if (row_dtype < 0 || n_rows == 0 || args.d == 0) return false;

    if (!read_plain(bias, &table) || table.ndim != 2 || table.shape[1] != args.d || table.device != device)
      return false;
    args.bias = table.data;
    args.n_edits = table.shape[0];
    table_dtype = dtype_of(table);
    const bool half = row_dtype == kBFloat16 || row_dtype == kFloat16;
    if (table_dtype != row_dtype && !(half && table_dtype == kFloat32)) return false;
    if ((left == Py_None) != (right == Py_None)) return false;
    if (left != Py_None && !(reads_factor(left, &args.left) && reads_factor(right, &args.right))) return false;
    if (strength != Py_None && !reads_strength(strength, x)) return false;
    return rows == Py_None ? args.n_edits == 1 : reads_rows(rows, x);
  }

 private:
  bool reads_factor(PyObject* object, const void** data) {
    dlpack::Tensor factor;
    if (!read_plain(object, &factor) || factor.ndim != 3 || factor.device != device) return false;
    if (factor.shape[0] != args.n_edits || factor.shape[2] != args.d || dtype_of(factor) != table_dtype) return false;
    if (data == &args.right && factor.shape[1] != args.rank) return false;
    *data = factor.data;
    args.rank = factor.shape[1];
    return args.rank > 0 && args.rank <= kMaxRank;
  }

  // Whether there is one number for each row, where the rows are.
  bool is_by_row(const dlpack::Tensor& numbers, const dlpack::Tensor& x) const {
    if (numbers.device != device || numbers.ndim != x.ndim - 1) return false;
    for (int i = 0; i < numbers.ndim; ++i)
      if (numbers.shape[i] != x.shape[i]) return false;
    return true;
  }

  bool reads_strength(PyObject* object, const dlpack::Tensor& x) {
    dlpack::Tensor strength;
    if (!read_plain(object, &strength) || !is_by_row(strength, x)) return false;
    if (dtype_of(strength) != (row_dtype == kFloat64 ? kFloat64 : kFloat32)) return false;
    args.strength = strength.data;
    return true;
  }

  bool reads_rows(PyObject* object, const dlpack::Tensor& x) {
    dlpack::Tensor rows;
    if (!read_plain(object, &rows) || !is_by_row(rows, x)) return false;
    if (rows.kind != dlpack::kInt || rows.bits != 32) return false;
    args.rows = static_cast<const int32_t*>(rows.data);
    args.rows_stride = 1;
    return true;
  }
};

// steer_direct(hidden, rows, bias, left, right, strength): the edited tensor, or None where the call isn't plain.
// hidden is [..., d].
inline PyObject* steer_direct(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (n != 6 || torch_given().exchange == nullptr) Py_RETURN_NONE;
  DirectCall call;
  if (!call.serves(args)) Py_RETURN_NONE;
  PyObject* out = PyObject_CallOneArg(torch_given().empty_like, args[0]);
  if (out == nullptr) return nullptr;
  dlpack::Tensor y;
  void* stream = nullptr;
  if (!read_plain(out, &y) || torch_given().exchange->current_stream(MX_SERVED_DEVICE, call.device, &stream) != 0) {
    Py_DECREF(out);
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  call.args.y = y.data;
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
      {"direct_setup", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&direct_setup)), METH_FASTCALL,
       "direct_setup(capsule, Tensor, Parameter, empty_like): whether steer_direct can be used with this torch."},
      {"steer_direct", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&steer_direct)), METH_FASTCALL,
       "steer_direct(hidden, rows, bias, left, right, strength): one steer call on torch's current stream, or None."},
      {nullptr, nullptr, 0, nullptr}};
  return methods;
}

}  // namespace mechanex
