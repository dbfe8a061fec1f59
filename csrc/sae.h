// Features of sparse autoencoders as plain data, with no Python and no torch in it.
#pragma once

#include <stdint.h>

#include "steer.h"

namespace mechanex {

// How an encoder is stored: the dtypes of steer.h, and one more.
enum EncoderType : int { kInt8 = kDTypes, kEncoderTypes = kDTypes + 1 };

// p = scale[f] * (encoder[f] . x[t]); everything but the encoder is float64 for a float64 encoder and float32 for
// others. All is contiguous. How a product is summed depends on d alone, so that a row's features don't depend on its
// neighbours, nor a feature on those beside it.
//
// Features: out[t][f] = relu(gain[f] * p + offset[f]) where p + bias[f] > threshold[f], else 0; NaN where that is NaN.
// Top features: of z = (p + bias[f]) * norms[f] each piece of the features keeps the k largest of a row, largest first
// and the first of equal ones; with `sized`, those of largest size. NaN counts as the largest. A place of -1 is empty.
struct SaeArgs {
  const void* x;        // [n_rows, d]
  const void* encoder;  // [n_features, d]
  const void* scale;    // [n_features], or null: 1; like those that follow
  const void* bias;
  const void* threshold;  // null: 0
  const void* gain;       // null: gain 1 and the bias as offset
  const void* offset;
  const void* norms;  // null: 1
  void* out;          // [n_rows, n_features]
  void* values;       // [pieces, n_rows, k]
  int64_t* places;    // [pieces, n_rows, k]
  int64_t n_rows;
  int64_t n_features;
  int64_t d;
  int64_t k;
  int64_t pieces;
  bool sized;
};

// Features: begin and end are features. Top features: they are pieces.
using SaeFn = void (*)(const SaeArgs* args, int64_t begin, int64_t end);

// One table per instruction set, by how the encoder is stored.
struct SaeKernels {
  SaeFn features[kEncoderTypes];
  SaeFn top[kEncoderTypes];
};

}  // namespace mechanex
