// Steer calls on torch's own tensors: checked and described without a line of Python in between, for the plain calls
// that a model's hooks make. Anything else is left to the caller, who says what is wrong with it.
#pragma once

#include <Python.h>

#include "dlpack.h"
#include "steer.h"

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

// Whether the object is a plain tensor on this type of device whose memory holds its numbers one after another.
inline bool read_adjacent(PyObject* object, int32_t device_type, dlpack::Tensor* out) {
  const Torch& torch = torch_given();
  if (Py_TYPE(object) != torch.tensor && Py_TYPE(object) != torch.parameter) return false;
  if (torch.exchange->read(object, out) != 0) {
    PyErr_Clear();
    return false;
  }
  if (out->device_type != device_type || out->lanes != 1) return false;
  int64_t stride = 1;
  for (int i = out->ndim - 1; i >= 0; --i) {
    if (out->shape[i] != 1 && out->strides[i] != stride) return false;
    stride *= out->shape[i];
  }
  out->data = static_cast<char*>(out->data) + out->byte_offset;
  return true;
}

// Likewise, and the numbers are the tensor's values: of a lazily negated view the memory holds other ones.
inline bool read_plain(PyObject* object, int32_t device_type, dlpack::Tensor* out) {
  if (!read_adjacent(object, device_type, out)) return false;
  PyObject* negated = PyObject_CallMethodNoArgs(object, torch_given().is_neg);
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
  explicit DirectCall(int32_t on_type) : device_type(on_type) {}

  SteerArgs args = {};
  int row_dtype = -1;
  int table_dtype = -1;
  int64_t n_rows = 1;
  int32_t device_type;
  int device = 0;

  // Of hidden [..., d], rows, bias, left, right and strength.
  bool serves(PyObject* const* given) {
    PyObject *hidden = given[0], *rows = given[1], *bias = given[2], *left = given[3], *right = given[4];
    PyObject* strength = given[5];
    dlpack::Tensor x, table;
    if (!read_plain(hidden, device_type, &x) || x.ndim < 1) return false;
    for (int i = 0; i + 1 < x.ndim; ++i) n_rows *= x.shape[i];
    args.x = x.data;
    args.d = args.x_stride = args.y_stride = x.shape[x.ndim - 1];
    device = x.device;
    row_dtype = dtype_of(x);
    if (row_dtype < 0 || n_rows == 0 || args.d == 0) return false;

    if (!read_plain(bias, device_type, &table) || table.ndim != 2 || table.shape[1] != args.d) return false;
    if (table.device != device) return false;
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

  // A new tensor like `hidden` for the result, whose place the description then has; null with an exception set, or
  // without one where it can't be read.
  PyObject* result(PyObject* hidden) {
    PyObject* out = PyObject_CallOneArg(torch_given().empty_like, hidden);
    dlpack::Tensor y;
    if (out == nullptr) return nullptr;
    if (!read_adjacent(out, device_type, &y)) {
      Py_DECREF(out);
      return nullptr;
    }
    args.y = y.data;
    return out;
  }

  // Torch's current stream on the call's device; whether it could be asked for.
  bool stream(void** found) const {
    if (torch_given().exchange->current_stream(device_type, device, found) == 0) return true;
    PyErr_Clear();
    return false;
  }

 private:
  bool reads_factor(PyObject* object, const void** data) {
    dlpack::Tensor factor;
    if (!read_plain(object, device_type, &factor) || factor.ndim != 3 || factor.device != device) return false;
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
    if (!read_plain(object, device_type, &strength) || !is_by_row(strength, x)) return false;
    if (dtype_of(strength) != (row_dtype == kFloat64 ? kFloat64 : kFloat32)) return false;
    args.strength = strength.data;
    return true;
  }

  bool reads_rows(PyObject* object, const dlpack::Tensor& x) {
    dlpack::Tensor rows;
    if (!read_plain(object, device_type, &rows) || !is_by_row(rows, x)) return false;
    if (rows.kind != dlpack::kInt || rows.bits != 32) return false;
    args.rows = static_cast<const int32_t*>(rows.data);
    args.rows_stride = 1;
    return true;
  }
};

// A function of the C interface as a method table has it.
using FastCall = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

inline PyMethodDef fast_method(const char* name, FastCall function, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, doc};
}

inline PyMethodDef setup_method() {
  return fast_method("direct_setup", &direct_setup,
                     "direct_setup(capsule, Tensor, Parameter, empty_like): whether torch's tensors can be read.");
}

}  // namespace mechanex
