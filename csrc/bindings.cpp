// The Python door of the CPU kernels: raw addresses in, nothing of torch included or linked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/levels.h"
#include "direct.h"
#include "replay.h"

namespace py = pybind11;

namespace mechanex {
namespace {

// torch's own `torch_parallel_for` (torch/csrc/stable/c/shim.h): 0 on success.
using ParallelFor = int32_t (*)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);

std::atomic<ParallelFor> parallel_for{nullptr};
std::atomic<const CpuLevel*> in_use{nullptr};

// Rows are shared out in pieces of at least this many elements: less is not worth waking a thread.
constexpr int64_t kSteerGrain = 1 << 15;
constexpr int64_t kReduceGrain = 1 << 13;  // an exponential costs several times as much as an edit

// Below this many elements the call is shorter than handing the interpreter over.
constexpr int64_t kKeepInterpreter = 1 << 13;

std::vector<std::string> runnable_levels() {
  std::vector<std::string> names;
  for (int i = 0; i < kCpuLevels; ++i)
    if (cpu_levels()[i].runs_here) names.emplace_back(cpu_levels()[i].name);
  return names;
}

void select_level(const std::string& name) {
  const CpuLevel* found = nullptr;
  bool known = name.empty();
  for (int i = 0; i < kCpuLevels; ++i) {
    const CpuLevel& level = cpu_levels()[i];
    if (name == level.name) known = true;
    if (level.runs_here && (name.empty() || name == level.name)) found = &level;
  }
  if (!known) throw py::value_error("unknown instruction set '" + name + "': choose generic, avx2 or avx512");
  if (found == nullptr) {
    std::string message = "this processor or build does not have the instruction set '" + name + "'; it has";
    for (const std::string& level : runnable_levels()) message += " " + level;
    throw py::value_error(message);
  }
  in_use = found;
}

std::string level() { return in_use.load()->name; }

template <class Args>
struct Job {
  void (*run)(const Args* args, int64_t begin, int64_t end);
  Args args;
};

template <class Args>
void run_piece(int64_t begin, int64_t end, void* job) {
  const Job<Args>* self = static_cast<const Job<Args>*>(job);
  self->run(&self->args, begin, end);
}

// Runs the job over its rows of n elements each, on torch's threads where there is enough to do.
template <class Args>
void run_rows(Job<Args>& job, int64_t n_rows, int64_t n, int64_t grain) {
  if (n_rows * n <= kKeepInterpreter) {
    job.run(&job.args, 0, n_rows);
    return;
  }
  py::gil_scoped_release release;
  const int64_t rows = grain / n > 1 ? grain / n : 1;
  const ParallelFor share = parallel_for.load();
  if (share == nullptr || share(0, n_rows, rows, run_piece<Args>, &job) != 0) job.run(&job.args, 0, n_rows);
}

// The first row whose index is outside the table, or n_rows.
int64_t first_outside(const SteerArgs& args, int64_t n_rows) {
  for (int64_t t = 0; t < n_rows; ++t) {
    const int64_t k = args.rows[t * args.rows_stride];
    if (k < -1 || k >= args.n_edits) return t;
  }
  return n_rows;
}

void check_rows(const SteerArgs& args, int64_t n_rows) {
  const int64_t t = first_outside(args, n_rows);
  if (t < n_rows)
    throw py::index_error("rows[" + std::to_string(t) + "] is " + std::to_string(args.rows[t * args.rows_stride]) +
                          ", but the table holds " + std::to_string(args.n_edits) +
                          " edit(s): give -1 (no edit) or an index below that");
}

// Rows sorted by edit, in their order otherwise. Empty where it would not pay: a table of rank 1 or less is small, and
// rows that already stand together share its reading as they are.
std::vector<int64_t> order_by_edit(const SteerArgs& args, int64_t n_rows) {
  if (args.rows == nullptr || args.rank < 2) return {};
  const auto edit = [&](int64_t t) { return args.rows[t * args.rows_stride]; };
  int64_t changes = 0;
  for (int64_t t = 1; t < n_rows; ++t) changes += edit(t) != edit(t - 1);
  if (2 * changes < n_rows) return {};
  std::vector<int64_t> next(args.n_edits + 2, 0), order(n_rows);
  for (int64_t t = 0; t < n_rows; ++t) ++next[edit(t) + 2];
  for (size_t k = 1; k < next.size(); ++k) next[k] += next[k - 1];
  for (int64_t t = 0; t < n_rows; ++t) order[next[edit(t) + 1]++] = t;
  return order;
}

// Runs one steer call whose indices are inside the table.
void run_steer(int dtype, const SteerArgs& args, int64_t n_rows) {
  Job<SteerArgs> job = {in_use.load()->kernels->steer[dtype], args};
  const std::vector<int64_t> order = order_by_edit(job.args, n_rows);
  if (!order.empty()) job.args.order = order.data();
  run_rows(job, n_rows, args.d, kSteerGrain);
}

void steer(int dtype, int64_t n_rows, int64_t d, uintptr_t x, int64_t x_stride, uintptr_t y, int64_t y_stride,
           uintptr_t rows, int64_t rows_stride, uintptr_t bias, uintptr_t left, uintptr_t right, int64_t n_edits,
           int64_t rank) {
  if (dtype < 0 || dtype >= kDTypes) throw py::value_error("unknown dtype code " + std::to_string(dtype));
  if (rank < 0 || rank > kMaxRank) throw py::value_error("rank must be from 0 to 64, got " + std::to_string(rank));
  if (n_rows <= 0 || d <= 0) return;
  const SteerArgs args = {reinterpret_cast<const void*>(x),
                          x_stride,
                          reinterpret_cast<void*>(y),
                          y_stride,
                          reinterpret_cast<const int32_t*>(rows),
                          rows_stride,
                          nullptr,
                          reinterpret_cast<const void*>(bias),
                          reinterpret_cast<const void*>(left),
                          reinterpret_cast<const void*>(right),
                          n_edits,
                          rank,
                          d,
                          nullptr};
  if (args.rows != nullptr) check_rows(args, n_rows);
  run_steer(dtype, args, n_rows);
}

// steer_direct(hidden, rows, bias, left, right, strength): the edited tensor, or None where the call isn't plain.
// hidden is [..., d].
PyObject* steer_direct(PyObject*, PyObject* const* given, Py_ssize_t n) {
  if (n != 6 || given[5] != Py_None || torch_given().exchange == nullptr) Py_RETURN_NONE;
  DirectCall call(dlpack::kCpu);
  if (!call.serves(given)) Py_RETURN_NONE;
  if (call.table_dtype != (call.row_dtype == kFloat64 ? kFloat64 : kFloat32)) Py_RETURN_NONE;
  if (call.args.rows != nullptr && first_outside(call.args, call.n_rows) < call.n_rows) Py_RETURN_NONE;
  PyObject* out = call.result(given[0]);
  if (out == nullptr) {
    if (PyErr_Occurred()) return nullptr;
    Py_RETURN_NONE;
  }
  try {
    run_steer(call.row_dtype, call.args, call.n_rows);
  } catch (const std::exception& error) {
    Py_DECREF(out);
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  return out;
}

PyMethodDef* direct_methods() {
  static PyMethodDef methods[] = {
      setup_method(),
      fast_method("steer_direct", &steer_direct,
                  "steer_direct(hidden, rows, bias, left, right, strength): one steer call on the CPU, or None."),
      fast_method("steer_replayed", &steer_replayed,
                  "steer_replayed(hidden, rows, bias, left, right, launches, device_type, many): one steer call by a "
                  "launch of Triton's, the key of the one that is missing, or None."),
      {nullptr, nullptr, 0, nullptr}};
  return methods;
}

// As SteerManyArgs, with the kernel that takes them.
struct ManyArgs {
  SteerManyArgs args;
  SteerManyFn run;
};

void run_many(const ManyArgs* many, int64_t begin, int64_t end) {
  std::vector<double> scratch(many->args.d);  // enough for either type of the arithmetic
  many->run(&many->args, begin, end, scratch.data());
}

void steer_many(int dtype, int64_t n_rows, int64_t d, uintptr_t x, int64_t x_stride, uintptr_t y, int64_t y_stride,
                uintptr_t rows, int64_t edits, uintptr_t strength, uintptr_t bias, uintptr_t left, uintptr_t right,
                uintptr_t kinds, uintptr_t weight, uintptr_t offset, int64_t n_edits, int64_t rank) {
  if (dtype < 0 || dtype >= kDTypes) throw py::value_error("unknown dtype code " + std::to_string(dtype));
  if (rank < 0 || rank > kMaxRank) throw py::value_error("rank must be from 0 to 64, got " + std::to_string(rank));
  if (n_rows <= 0 || d <= 0) return;
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
  if (args.rows != nullptr) {
    SteerArgs one = {};
    one.rows = args.rows;
    one.rows_stride = 1;
    one.n_edits = n_edits;
    check_rows(one, n_rows * edits);
  }
  Job<ManyArgs> job = {run_many, {args, in_use.load()->many->steer_many[dtype]}};
  run_rows(job, n_rows, d, kSteerGrain);
}

void reduce(int dtype, int64_t n_rows, int64_t n_columns, uintptr_t products, uintptr_t bias, uintptr_t target,
            int64_t target_stride, int64_t first, double scale, double softcap, double coldness, uintptr_t maximum,
            uintptr_t total, uintptr_t factor) {
  if (dtype < 0 || dtype >= kDTypes) throw py::value_error("unknown dtype code " + std::to_string(dtype));
  const ReduceFn run = in_use.load()->logprob->reduce[dtype];
  if (run == nullptr) throw py::value_error("no reduction for dtype code " + std::to_string(dtype));
  if (n_rows <= 0 || n_columns <= 0) return;
  Job<ReduceArgs> job = {
      run,
      {reinterpret_cast<void*>(products), n_columns, reinterpret_cast<const void*>(bias),
       reinterpret_cast<const int64_t*>(target), target_stride, first, scale, softcap, coldness,
       reinterpret_cast<void*>(maximum), reinterpret_cast<void*>(total), reinterpret_cast<void*>(factor)}};
  run_rows(job, n_rows, n_columns, kReduceGrain);
}

// Numbers of an encoder that are worth waking a thread for.
constexpr int64_t kSaeGrain = 1 << 15;

void check_encoder(int type, int64_t n_features, int64_t d) {
  if (type < 0 || type >= kEncoderTypes) throw py::value_error("unknown encoder code " + std::to_string(type));
  if (n_features < 0 || d < 0) throw py::value_error("sizes are 0 or more");
}

SaeArgs sae_args(int64_t n_rows, int64_t n_features, int64_t d, uintptr_t x, uintptr_t encoder, uintptr_t scale,
                 uintptr_t bias) {
  SaeArgs args = {};
  args.x = reinterpret_cast<const void*>(x);
  args.encoder = reinterpret_cast<const void*>(encoder);
  args.scale = reinterpret_cast<const void*>(scale);
  args.bias = reinterpret_cast<const void*>(bias);
  args.n_rows = n_rows;
  args.n_features = n_features;
  args.d = d;
  return args;
}

void sae_features(int type, int64_t n_rows, int64_t n_features, int64_t d, uintptr_t x, uintptr_t encoder,
                  uintptr_t scale, uintptr_t bias, uintptr_t threshold, uintptr_t gain, uintptr_t offset,
                  uintptr_t out) {
  check_encoder(type, n_features, d);
  if (n_rows <= 0 || n_features <= 0) return;
  Job<SaeArgs> job = {in_use.load()->sae->features[type], sae_args(n_rows, n_features, d, x, encoder, scale, bias)};
  job.args.threshold = reinterpret_cast<const void*>(threshold);
  job.args.gain = reinterpret_cast<const void*>(gain);
  job.args.offset = reinterpret_cast<const void*>(offset);
  job.args.out = reinterpret_cast<void*>(out);
  run_rows(job, n_features, d > 0 ? d : 1, kSaeGrain);
}

// The k best of a row, of the lists that the pieces made, each of which has its best first.
template <class S>
void merge(const SaeArgs& args, int64_t t, std::vector<int64_t>& at, S* values, int64_t* places) {
  const auto size = [&](S value) { return args.sized && value < 0 ? -value : value; };
  for (int64_t& i : at) i = 0;
  for (int64_t i = 0; i < args.k; ++i) {
    int64_t best = -1;
    S found = 0;
    for (int64_t piece = 0; piece < args.pieces; ++piece) {
      const int64_t place = (piece * args.n_rows + t) * args.k + at[piece];
      if (at[piece] >= args.k || args.places[place] < 0) continue;
      const S value = static_cast<const S*>(args.values)[place];
      // Pieces follow each other, so that an earlier one has the first of equal features.
      if (best < 0 || size(value) > size(found) || (value != value && found == found)) {
        best = piece;
        found = value;
      }
    }
    places[t * args.k + i] = args.places[(best * args.n_rows + t) * args.k + at[best]++];
    values[t * args.k + i] = !args.sized && found < 0 ? 0 : found;
  }
}

void sae_top_features(int type, int64_t n_rows, int64_t n_features, int64_t d, uintptr_t x, uintptr_t encoder,
                      uintptr_t scale, uintptr_t bias, uintptr_t norms, int64_t k, bool sized, int64_t pieces,
                      uintptr_t values, uintptr_t places) {
  check_encoder(type, n_features, d);
  if (k < 1 || k > n_features) throw py::value_error("k is from 1 to the number of features");
  if (n_rows <= 0) return;
  Job<SaeArgs> job = {in_use.load()->sae->top[type], sae_args(n_rows, n_features, d, x, encoder, scale, bias)};
  const int64_t most = n_features * d / kSaeGrain;
  job.args.pieces = pieces < 1 || most < 1 ? 1 : (pieces > most ? most : pieces);
  job.args.norms = reinterpret_cast<const void*>(norms);
  job.args.k = k;
  job.args.sized = sized;
  const bool wide = type == kFloat64;
  std::vector<double> kept((job.args.pieces * n_rows * k * (wide ? 8 : 4) + 7) / 8);
  std::vector<int64_t> kept_places(job.args.pieces * n_rows * k);
  job.args.values = kept.data();
  job.args.places = kept_places.data();
  run_rows(job, job.args.pieces, n_features * d / job.args.pieces + 1, kSaeGrain);
  py::gil_scoped_release release;
  std::vector<int64_t> at(job.args.pieces);
  for (int64_t t = 0; t < n_rows; ++t) {
    if (wide)
      merge(job.args, t, at, reinterpret_cast<double*>(values), reinterpret_cast<int64_t*>(places));
    else
      merge(job.args, t, at, reinterpret_cast<float*>(values), reinterpret_cast<int64_t*>(places));
  }
}

}  // namespace
}  // namespace mechanex

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  using namespace mechanex;
  m.doc() = "Compiled CPU kernels of mechanex; use them through mechanex.backends.";
  m.attr("__version__") = MECHANEX_VERSION;
  m.attr("max_rank") = static_cast<int64_t>(kMaxRank);
  m.def("levels", &runnable_levels, "Instruction sets that this build and this processor share, best last.");
  m.def("level", &level, "The instruction set in use.");
  m.def("select_level", &select_level, "Use one instruction set; an empty name takes the best.");
  m.def(
      "set_parallel_for", [](uintptr_t address) { parallel_for = reinterpret_cast<ParallelFor>(address); },
      "Address of torch's torch_parallel_for, or 0 to run on the caller's thread.");
  // One more whenever a function takes other arguments or gives something else; modules.py asks for this number.
  m.attr("interface") = 2;
  m.def("steer", &steer, "One steer call over raw addresses; see csrc/steer.h.");
  if (PyModule_AddFunctions(m.ptr(), direct_methods()) != 0) throw py::error_already_set();
  m.def("steer_many", &steer_many, "One call of the general steer op, likewise.");
  m.def("reduce", &reduce, "One chunk of completion_logprob over raw addresses; see csrc/logprob.h.");
  m.def("sae_features", &sae_features, "Features of an encoder over raw addresses; see csrc/sae.h.");
  m.def("sae_top_features", &sae_top_features, "The k largest features of every row, likewise.");
  select_level("");
}
