// exp and tanh on vectors, to about an ulp, in code that needs no library.
//
// Internal linkage throughout, like vectors.h: this is compiled once per instruction set.
#pragma once

#include "vectors.h"

namespace {

typedef int32_t IntV __attribute__((vector_size(MX_BYTES)));
typedef int64_t LongV __attribute__((vector_size(MX_BYTES)));

// What differs between the two types of the arithmetic.
template <class V>
struct Real;

template <>
struct Real<FloatV> {
  using Scalar = float;
  using Int = IntV;
  using Word = int32_t;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr int kTerms = 7;                 // the next one is below half an ulp on [-ln2/2, ln2/2]
  static constexpr float kRound = 0x1.8p23f;       // adding it leaves an integer in the last bits
  static constexpr float kLn2High = 0x1.62e4p-1f;  // few bits, so that a multiple of it is exact
  static constexpr float kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kLowest = -87.0f;  // below, exp is as good as 0
  static constexpr float kTanhIsOne = 10.0f;
};

template <>
struct Real<DoubleV> {
  using Scalar = double;
  using Int = LongV;
  using Word = int64_t;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr int kTerms = 13;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLn2High = 0x1.62e42fefap-1;
  static constexpr double kLn2Low = 0x1.cf79abc9e3b3ap-40;
  static constexpr double kLowest = -708.0;
  static constexpr double kTanhIsOne = 20.0;
};

// The masks are what comparisons give.
template <class V, class Mask>
MX_INLINE V choose(Mask mask, V yes, V no) {
  using Int = typename Real<V>::Int;
  return bits<V>((bits<Int>(yes) & bits<Int>(mask)) | (bits<Int>(no) & ~bits<Int>(mask)));
}

constexpr double inverse_factorial(int n) { return n < 2 ? 1.0 : inverse_factorial(n - 1) / n; }

// exp(x) = power * (1 + rest), power = 2^k, |x - k ln2| <= ln2/2.
template <class V>
struct Split {
  V power, rest;
};

template <class V>
MX_INLINE Split<V> split_exp(V x) {
  using R = Real<V>;
  using S = typename R::Scalar;
  using Int = typename R::Int;
  const V shifted = multiply_add(x, broadcast<V>(0x1.71547652b82fep+0), broadcast<V>(R::kRound));
  const V k = shifted - R::kRound;
  const Int exponent = bits<Int>(shifted) - bits<Int>(broadcast<V>(R::kRound));
  const V high = multiply_add(-k, broadcast<V>(R::kLn2High), x);
  const V r = multiply_add(-k, broadcast<V>(R::kLn2Low), high);
  V sum = broadcast<V>((S)inverse_factorial(R::kTerms));
#pragma GCC unroll 16
  for (int i = R::kTerms - 1; i >= 1; --i) sum = multiply_add(sum, r, broadcast<V>((S)inverse_factorial(i)));
  return {bits<V>((exponent + R::kBias) << R::kMantissa), sum * r};
}

// exp for x <= 0 or little above; 0 where the result would not be a normal number. NaN stays.
template <class V>
MX_INLINE V vector_exp(V x) {
  const Split<V> e = split_exp(x);
  return choose(x < Real<V>::kLowest, V{}, multiply_add(e.power, e.rest, e.power));
}

// tanh x = e / (e + 2) with e = exp(2x) - 1, which loses nothing where x is small. NaN stays.
template <class V>
MX_INLINE V vector_tanh(V x) {
  using R = Real<V>;
  using Int = typename R::Int;
  const Int sign = bits<Int>(x) & bits<Int>(broadcast<V>(-0.0));
  V size = bits<V>(bits<Int>(x) ^ sign);
  size = choose(size > R::kTanhIsOne, broadcast<V>(R::kTanhIsOne), size);
  const Split<V> e = split_exp(size + size);
  const V minus_one = multiply_add(e.power, e.rest, e.power - 1);
  return bits<V>(bits<Int>(minus_one / (minus_one + 2)) | sign);
}

}  // namespace
