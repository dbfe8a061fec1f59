// Launches of Triton's steer kernel (kernels/steer.py) that were made once, made again for other tensors.
#pragma once

#include "direct.h"

namespace mechanex {

// What a compiled kernel was compiled for. As bytes it is the key of a launch; no byte is left unwritten.
struct ReplayKey {
  int64_t d;
  int32_t rank;
  int32_t device;
  int8_t row_dtype;
  int8_t table_dtype;
  int8_t by_row;
  int8_t many;
  int32_t aligned;  // a bit for each address that is given: whether it is a multiple of 16
};
static_assert(sizeof(ReplayKey) == 24, "padding would be part of the key");

// How a launch is made again: launch(x, y, z, stream, *fixed, *arguments), or with the arguments as one tuple.
struct Replay {
  PyObject* launch;
  int64_t rows;         // that a program works on
  PyObject* columns;    // programs side by side
  PyObject* fixed;      // tuple
  PyObject* constants;  // tuple, the last arguments
  bool nested;

  static constexpr Py_ssize_t kMostFixed = 24, kMostConstants = 8;

  bool read(PyObject* entry) {
    if (!PyTuple_Check(entry) || PyTuple_GET_SIZE(entry) != 6) return false;
    launch = PyTuple_GET_ITEM(entry, 0);
    rows = PyLong_AsLongLong(PyTuple_GET_ITEM(entry, 1));
    columns = PyTuple_GET_ITEM(entry, 2);
    fixed = PyTuple_GET_ITEM(entry, 3);
    constants = PyTuple_GET_ITEM(entry, 4);
    nested = PyTuple_GET_ITEM(entry, 5) == Py_True;
    return rows > 0 && PyTuple_Check(fixed) && PyTuple_Check(constants) && PyTuple_GET_SIZE(fixed) <= kMostFixed &&
           PyTuple_GET_SIZE(constants) <= kMostConstants;
  }
};

// References that a launch is given, let go of afterwards.
template <int kMost>
struct Given {
  PyObject* at[kMost];
  Py_ssize_t n = 0;

  Given() = default;
  Given(const Given&) = delete;
  Given& operator=(const Given&) = delete;
  ~Given() {
    for (Py_ssize_t i = 0; i < n; ++i) Py_XDECREF(at[i]);
  }
  void own(PyObject* object) { at[n++] = object; }
  void borrow(PyObject* object) {
    Py_INCREF(object);
    own(object);
  }
  void borrow_all(PyObject* tuple) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i) borrow(PyTuple_GET_ITEM(tuple, i));
  }
  void number(int64_t value) { own(PyLong_FromLongLong(value)); }
  void address(const void* data) {
    data == nullptr ? borrow(Py_None) : own(PyLong_FromVoidPtr(const_cast<void*>(data)));
  }
  bool whole() const {
    for (Py_ssize_t i = 0; i < n; ++i)
      if (at[i] == nullptr) return false;
    return true;
  }
};

// Makes the launch; whether it was made, with an exception set where not.
inline bool replay(const Replay& how, const DirectCall& call, void* stream) {
  Given<16 + Replay::kMostConstants> arguments;
  const SteerArgs& args = call.args;
  for (const void* data : {args.x, static_cast<const void*>(args.y), static_cast<const void*>(args.rows), args.bias,
                           args.left, args.right})
    arguments.address(data);
  for (int64_t number : {call.n_rows, args.n_edits, args.d, args.x_stride, args.rows_stride}) arguments.number(number);
  arguments.borrow_all(how.constants);

  Given<4 + Replay::kMostFixed + 16 + Replay::kMostConstants> given;
  given.number((call.n_rows + how.rows - 1) / how.rows);
  given.borrow(how.columns);
  given.number(1);
  given.own(PyLong_FromVoidPtr(stream));
  given.borrow_all(how.fixed);
  if (!arguments.whole()) return false;
  if (how.nested) {
    PyObject* together = PyTuple_New(arguments.n);
    for (Py_ssize_t i = 0; together != nullptr && i < arguments.n; ++i) {
      Py_INCREF(arguments.at[i]);
      PyTuple_SET_ITEM(together, i, arguments.at[i]);
    }
    given.own(together);
  } else {
    for (Py_ssize_t i = 0; i < arguments.n; ++i) given.borrow(arguments.at[i]);
  }
  if (!given.whole()) return false;
  PyObject* done = PyObject_Vectorcall(how.launch, given.at, static_cast<size_t>(given.n), nullptr);
  Py_XDECREF(done);
  return done != nullptr;
}

// steer_replayed(hidden, rows, bias, left, right, launches, device_type, many): the edited tensor by one of the
// launches, a dict; the key under which the one for this call is missing; or None where the call isn't plain. `many` is
// the number of rows from which on a program takes several.
inline PyObject* steer_replayed(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (n != 8 || torch_given().exchange == nullptr || !PyDict_Check(args[5])) Py_RETURN_NONE;
  DirectCall call(static_cast<int32_t>(PyLong_AsLong(args[6])));
  PyObject* const given[] = {args[0], args[1], args[2], args[3], args[4], Py_None};
  void* stream = nullptr;
  if (!call.serves(given) || !call.stream(&stream)) Py_RETURN_NONE;
  const SteerArgs& edit = call.args;
  // Beyond this a number is of another type to Triton.
  constexpr int64_t kMost = 0x7fffffff;
  if (call.n_rows > kMost || edit.n_edits > kMost || edit.d > kMost) Py_RETURN_NONE;
  PyObject* out = call.result(args[0]);
  if (out == nullptr) {
    if (PyErr_Occurred()) return nullptr;
    Py_RETURN_NONE;
  }
  const auto is_aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  if (!is_aligned(edit.y)) {
    Py_DECREF(out);
    Py_RETURN_NONE;
  }
  ReplayKey key = {};
  key.d = edit.d;
  key.rank = static_cast<int32_t>(edit.rank);
  key.device = call.device;
  key.row_dtype = static_cast<int8_t>(call.row_dtype);
  key.table_dtype = static_cast<int8_t>(call.table_dtype);
  key.by_row = edit.rows != nullptr;
  key.many = call.n_rows >= PyLong_AsLongLong(args[7]);
  int bit = 0;
  for (const void* data : {edit.x, static_cast<const void*>(edit.rows), edit.bias, edit.left, edit.right})
    key.aligned |= is_aligned(data) << bit++;

  PyObject* name = PyBytes_FromStringAndSize(reinterpret_cast<const char*>(&key), sizeof(key));
  PyObject* entry = name == nullptr ? nullptr : PyDict_GetItemWithError(args[5], name);
  Replay how;
  if (entry == nullptr) {
    Py_DECREF(out);
    return PyErr_Occurred() ? (Py_XDECREF(name), nullptr) : name;
  }
  Py_DECREF(name);
  if (!how.read(entry) || !replay(how, call, stream)) {
    Py_DECREF(out);
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "a launch is a tuple of six: see csrc/replay.h");
    return nullptr;
  }
  return out;
}

}  // namespace mechanex
