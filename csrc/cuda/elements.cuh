// Element types: how one is stored, what the arithmetic runs in, and the way there and back, alone or 16 bytes at once.
#pragma once

#include <stdint.h>

namespace mechanex {

struct alignas(16) Words {
  uint32_t at[4];
};

struct Float32 {
  using Stored = float;
  using Scalar = float;
  static MX_DEVICE Scalar widen(Stored value) { return value; }
  static MX_DEVICE Stored narrow(Scalar value) { return value; }
  static MX_DEVICE Scalar get(const Words& words, int i) { return float_of(words.at[i]); }
  static MX_DEVICE void put(Words& words, const Scalar* values) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words.at[i] = word_of(values[i]);
  }
};

struct Float64 {
  using Stored = double;
  using Scalar = double;
  static MX_DEVICE Scalar widen(Stored value) { return value; }
  static MX_DEVICE Stored narrow(Scalar value) { return value; }
  static MX_DEVICE Scalar get(const Words& words, int i) { return double_of(words.at[2 * i], words.at[2 * i + 1]); }
  static MX_DEVICE void put(Words& words, const Scalar* values) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      words.at[2 * i] = low_word(values[i]);
      words.at[2 * i + 1] = high_word(values[i]);
    }
  }
};

struct BFloat16 {
  using Stored = uint16_t;
  using Scalar = float;
  static MX_DEVICE Scalar widen(Stored value) { return float_of(static_cast<uint32_t>(value) << 16); }
  static MX_DEVICE Stored narrow(Scalar value) { return bfloat_of(value); }
  static MX_DEVICE Scalar get(const Words& words, int i) {
    return float_of(i % 2 == 0 ? words.at[i / 2] << 16 : words.at[i / 2] & 0xffff0000u);
  }
  static MX_DEVICE void put(Words& words, const Scalar* values) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words.at[i] = bfloats_of(values[2 * i], values[2 * i + 1]);
  }
};

struct Float16 {
  using Stored = uint16_t;
  using Scalar = float;
  static MX_DEVICE Scalar widen(Stored value) { return float_of_half(value); }
  static MX_DEVICE Stored narrow(Scalar value) { return half_of(value); }
  static MX_DEVICE Scalar get(const Words& words, int i) {
    return float_of_half(static_cast<uint16_t>(words.at[i / 2] >> (i % 2 * 16)));
  }
  static MX_DEVICE void put(Words& words, const Scalar* values) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words.at[i] = halves_of(values[2 * i], values[2 * i + 1]);
  }
};

template <class S>
MX_DEVICE S not_a_number();
template <>
MX_DEVICE float not_a_number<float>() {
  return float_of(0x7fc00000u);
}
template <>
MX_DEVICE double not_a_number<double>() {
  return double_of(0u, 0x7ff80000u);
}

template <class S>
MX_DEVICE S minus_infinity();
template <>
MX_DEVICE float minus_infinity<float>() {
  return float_of(0xff800000u);
}
template <>
MX_DEVICE double minus_infinity<double>() {
  return double_of(0u, 0xfff00000u);
}

}  // namespace mechanex
