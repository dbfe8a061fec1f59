// Vectors of rows: loads and stores that widen to the type of the arithmetic and round back to nearest even.
//
// Compiled once per instruction set, so everything here has internal linkage: the linker must never keep one object's
// copy of a function for another object's processor.
#pragma once

#include <stdint.h>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define MX_BYTES 64
#elif defined(__AVX2__)
#define MX_BYTES 32
#else
#define MX_BYTES 16
#endif

#define MX_INLINE inline __attribute__((always_inline))

namespace {

enum : int { kFloats = MX_BYTES / 4, kDoubles = MX_BYTES / 8 };

typedef float FloatV __attribute__((vector_size(MX_BYTES)));
typedef double DoubleV __attribute__((vector_size(MX_BYTES)));
typedef uint32_t WordV __attribute__((vector_size(MX_BYTES)));
typedef uint16_t HalfV __attribute__((vector_size(MX_BYTES / 2)));

template <class To, class From>
MX_INLINE To bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "bits needs equal sizes");
  To out;
  __builtin_memcpy(&out, &value, sizeof(out));
  return out;
}

template <class V, class T>
MX_INLINE V read(const T* p) {
  V out;
  __builtin_memcpy(&out, p, sizeof(out));
  return out;
}

template <class V, class T>
MX_INLINE void write(T* p, V value) {
  __builtin_memcpy(p, &value, sizeof(value));
}

template <class V, class S>
MX_INLINE V broadcast(S value) {
  const V zero = {};
  return (__typeof__(zero[0] + zero[0]))value - zero;
}

// a * b + c, rounded once where the processor can, and by this instruction wherever it is written. Compilers fuse
// nothing themselves (-ffp-contract=off): they would in one of two loops that must give the same bits.
MX_INLINE FloatV multiply_add(FloatV a, FloatV b, FloatV c) {
#if defined(__AVX512F__)
  return bits<FloatV>(_mm512_fmadd_ps(bits<__m512>(a), bits<__m512>(b), bits<__m512>(c)));
#elif defined(__FMA__)
  return bits<FloatV>(_mm256_fmadd_ps(bits<__m256>(a), bits<__m256>(b), bits<__m256>(c)));
#elif defined(__aarch64__)
  return bits<FloatV>(vfmaq_f32(bits<float32x4_t>(c), bits<float32x4_t>(a), bits<float32x4_t>(b)));
#else
  return a * b + c;
#endif
}

MX_INLINE DoubleV multiply_add(DoubleV a, DoubleV b, DoubleV c) {
#if defined(__AVX512F__)
  return bits<DoubleV>(_mm512_fmadd_pd(bits<__m512d>(a), bits<__m512d>(b), bits<__m512d>(c)));
#elif defined(__FMA__)
  return bits<DoubleV>(_mm256_fmadd_pd(bits<__m256d>(a), bits<__m256d>(b), bits<__m256d>(c)));
#elif defined(__aarch64__)
  return bits<DoubleV>(vfmaq_f64(bits<float64x2_t>(c), bits<float64x2_t>(a), bits<float64x2_t>(b)));
#else
  return a * b + c;
#endif
}

// An element type: how it is stored, what the arithmetic runs in, and the way there and back.
struct Float32 {
  using Stored = float;
  using Scalar = float;
  using Vector = FloatV;
  static MX_INLINE Vector load(const Stored* p) { return read<Vector>(p); }
  static MX_INLINE void store(Stored* p, Vector v) { write(p, v); }
};

struct Float64 {
  using Stored = double;
  using Scalar = double;
  using Vector = DoubleV;
  static MX_INLINE Vector load(const Stored* p) { return read<Vector>(p); }
  static MX_INLINE void store(Stored* p, Vector v) { write(p, v); }
};

struct BFloat16 {
  using Stored = uint16_t;
  using Scalar = float;
  using Vector = FloatV;

  static MX_INLINE Vector load(const Stored* p) {
    return bits<Vector>(__builtin_convertvector(read<HalfV>(p), WordV) << 16);
  }

  static MX_INLINE void store(Stored* p, Vector v) {
    const WordV word = bits<WordV>(v);
    const WordV rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    // Rounding could carry a NaN's payload away and leave infinity: keep its top bits and make it quiet.
    const WordV nan = (word >> 16) | 0x40;
    const WordV is_nan = bits<WordV>((word & 0x7fffffff) > 0x7f800000);
    write(p, __builtin_convertvector((rounded & ~is_nan) | (nan & is_nan), HalfV));
  }
};

MX_INLINE float float_of_half(uint16_t half) {
  const uint32_t sign = (uint32_t)(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return bits<float>(sign | 0x7f800000 | ((magnitude & 0x3ff) << 13));
  if (magnitude >= 0x400) return bits<float>(sign | ((magnitude << 13) + ((127 - 15) << 23)));
  const float subnormal = (float)magnitude * 0x1p-24f;
  return bits<float>(sign | bits<uint32_t>(subnormal));
}

MX_INLINE uint16_t half_of_float(float value) {
  const uint32_t word = bits<uint32_t>(value);
  const uint16_t sign = (uint16_t)((word >> 16) & 0x8000);
  const uint32_t magnitude = word & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00 | (uint16_t)((magnitude >> 13) & 0x3ff);
  if (magnitude >= 0x477ff000) return sign | 0x7c00;
  if (magnitude < 0x38800000) {
    // Adding 0.5 lines the half's subnormal unit up with the float's last bit, so that the sum rounds as it must.
    return sign | (uint16_t)(bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000);
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return sign | (uint16_t)((rounded - ((127 - 15) << 23)) >> 13);
}

struct Float16 {
  using Stored = uint16_t;
  using Scalar = float;
  using Vector = FloatV;

#if defined(__AVX512F__)
  // The forms without a mask start from undefined registers, which compilers warn about.
  enum : __mmask16 { kEvery = 0xffff };
#endif

  static MX_INLINE Vector load(const Stored* p) {
#if defined(__AVX512F__)
    return bits<Vector>(_mm512_maskz_cvtph_ps(kEvery, read<__m256i>(p)));
#elif defined(__F16C__)
    return bits<Vector>(_mm256_cvtph_ps(read<__m128i>(p)));
#else
    Vector out;
    for (int i = 0; i < kFloats; ++i) out[i] = float_of_half(p[i]);
    return out;
#endif
  }

  static MX_INLINE void store(Stored* p, Vector v) {
#if defined(__AVX512F__)
    write(p, _mm512_maskz_cvtps_ph(kEvery, bits<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    write(p, _mm256_cvtps_ph(bits<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    for (int i = 0; i < kFloats; ++i) p[i] = half_of_float(v[i]);
#endif
  }
};

// The last columns of a row, fewer than a vector: the rest reads as zero and is never written.
template <class E>
MX_INLINE typename E::Vector load_part(const typename E::Stored* p, int64_t n) {
  typename E::Stored buffer[sizeof(typename E::Vector) / sizeof(typename E::Scalar)] = {};
  __builtin_memcpy(buffer, p, n * sizeof(*p));
  return E::load(buffer);
}

template <class E>
MX_INLINE void store_part(typename E::Stored* p, typename E::Vector v, int64_t n) {
  typename E::Stored buffer[sizeof(typename E::Vector) / sizeof(typename E::Scalar)];
  E::store(buffer, v);
  __builtin_memcpy(p, buffer, n * sizeof(*p));
}

template <class V, class S>
MX_INLINE S sum(V v) {
  S total = 0;
  for (int i = 0; i < (int)(sizeof(V) / sizeof(S)); ++i) total += v[i];
  return total;
}

}  // namespace
