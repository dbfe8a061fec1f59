// Features of sparse autoencoders: products of rows with an encoder that is read once, and what is made of them. Like
// steer.cpp: one source, one object per instruction set, no library calls but memcpy, nothing with external linkage but
// the table at the end.
#include "../sae.h"

#include "vectors.h"

using namespace mechanex;

namespace {

#if MX_BYTES == 64
typedef int8_t ByteV __attribute__((vector_size(16)));
#elif MX_BYTES == 32
typedef int8_t ByteV __attribute__((vector_size(8)));
#else
typedef int8_t ByteV __attribute__((vector_size(4)));
#endif

struct Int8 {
  using Stored = int8_t;
  using Scalar = float;
  using Vector = FloatV;
  static MX_INLINE Vector load(const Stored* p) {
#if defined(__AVX512F__)
    return bits<Vector>(_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, read<__m128i>(p))));
#elif defined(__AVX2__)
    return bits<Vector>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))));
#else
    return __builtin_convertvector(read<ByteV>(p), Vector);
#endif
  }
};

// The sum of a vector's lanes, halves to halves.
typedef float Float4 __attribute__((vector_size(16)));
typedef double Double2 __attribute__((vector_size(16)));

template <class Part, class V>
MX_INLINE Part folded(V v) {
  struct Parts {
    Part part[MX_BYTES / 16];
  };
  Parts parts = bits<Parts>(v);
  for (int n = MX_BYTES / 32; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) parts.part[i] += parts.part[i + n];
  return parts.part[0];
}

MX_INLINE float total(FloatV v) {
  const Float4 four = folded<Float4>(v);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

MX_INLINE double total(DoubleV v) {
  const Double2 two = folded<Double2>(v);
  return two[0] + two[1];
}

// Rows that share one reading of a feature, and features that are read side by side. However many there are, each
// product is one sum over the columns, in the same order.
constexpr int kRows = 4, kFeatures = 4;

template <class Wide, class Table, int M, int J>
__attribute__((noinline)) void products(const typename Wide::Scalar* x, const typename Table::Stored* encoder,
                                        int64_t d, typename Wide::Scalar (*out)[kFeatures]) {
  using V = typename Wide::Vector;
  using S = typename Wide::Scalar;
  constexpr int64_t kWidth = sizeof(V) / sizeof(S);
  constexpr int64_t kRead = J * kWidth * sizeof(typename Table::Stored), kLine = 64;
  V sums[M][J] = {};
  int64_t c = 0;
  for (; c + kWidth <= d; c += kWidth) {
    // Side by side, rows are too short for the processor to see where they go on.
    const char* next = (const char*)(encoder + J * (d + c));
    for (int64_t byte = 0; byte < kRead; byte += kLine) __builtin_prefetch(next + byte);
    V values[M];
    for (int m = 0; m < M; ++m) values[m] = Wide::load(x + m * d + c);
    for (int j = 0; j < J; ++j) {
      const V weight = Table::load(encoder + j * d + c);
      for (int m = 0; m < M; ++m) sums[m][j] = multiply_add(values[m], weight, sums[m][j]);
    }
  }
  if (c < d) {
    for (int m = 0; m < M; ++m) {
      const V value = load_part<Wide>(x + m * d + c, d - c);
      for (int j = 0; j < J; ++j)
        sums[m][j] = multiply_add(value, load_part<Table>(encoder + j * d + c, d - c), sums[m][j]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < J; ++j) out[m][j] = total(sums[m][j]);
}

// Calls take(t, f, product) for every row and the features from first to end, these in order for each row.
template <class Wide, class Table, class Take>
MX_INLINE void walk(const SaeArgs* args, int64_t first, int64_t end, Take take) {
  using S = typename Wide::Scalar;
  const S* x = (const S*)args->x;
  const int64_t d = args->d;
  const S* scale = (const S*)args->scale;
  S found[kRows][kFeatures];
  int64_t n, rows;
  for (int64_t f = first; f < end; f += n) {
    const typename Table::Stored* encoder = (const typename Table::Stored*)args->encoder + f * d;
    n = end - f < kFeatures ? 1 : kFeatures;
    for (int64_t t = 0; t < args->n_rows; t += rows) {
      rows = args->n_rows - t < kRows ? 1 : kRows;
      if (rows == 1 && n == 1)
        products<Wide, Table, 1, 1>(x + t * d, encoder, d, found);
      else if (rows == 1)
        products<Wide, Table, 1, kFeatures>(x + t * d, encoder, d, found);
      else if (n == 1)
        products<Wide, Table, kRows, 1>(x + t * d, encoder, d, found);
      else
        products<Wide, Table, kRows, kFeatures>(x + t * d, encoder, d, found);
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t j = 0; j < n; ++j) take(t + m, f + j, scale == nullptr ? found[m][j] : found[m][j] * scale[f + j]);
    }
  }
}

template <class Wide, class Table>
void features(const SaeArgs* args, int64_t begin, int64_t end) {
  using S = typename Wide::Scalar;
  S* out = (S*)args->out;
  const S *bias = (const S*)args->bias, *threshold = (const S*)args->threshold;
  const S *gain = (const S*)args->gain, *offset = (const S*)args->offset;
  walk<Wide, Table>(args, begin, end, [&](int64_t t, int64_t f, S p) {
    const S z = p + bias[f];
    const S said = gain == nullptr ? z : p * gain[f] + offset[f];
    const S level = threshold == nullptr ? 0 : threshold[f];
    // Comparisons with NaN are false: what is said comes back as it is unless it is a number below 0.
    const S open = said < 0 ? 0 : said;
    out[t * args->n_features + f] = z > level ? open : (z == z ? 0 : z);
  });
}

template <class S>
MX_INLINE S size(S value) {
  return value < 0 ? -value : value;
}

// Whether a goes before b, which came first.
template <class S>
MX_INLINE bool goes_before(S a, S b, bool sized) {
  if (sized) {
    a = size(a);
    b = size(b);
  }
  return a > b || (a != a && b == b);
}

template <class Wide, class Table>
void top(const SaeArgs* args, int64_t begin, int64_t end) {
  using S = typename Wide::Scalar;
  const S *bias = (const S*)args->bias, *norms = (const S*)args->norms;
  const int64_t k = args->k;
  for (int64_t piece = begin; piece < end; ++piece) {
    S* values = (S*)args->values + piece * args->n_rows * k;
    int64_t* places = args->places + piece * args->n_rows * k;
    for (int64_t i = 0; i < args->n_rows * k; ++i) {
      places[i] = -1;
      values[i] = __builtin_nanf("");
    }
    const int64_t first = piece * args->n_features / args->pieces;
    const int64_t last = (piece + 1) * args->n_features / args->pieces;
    walk<Wide, Table>(args, first, last, [&](int64_t t, int64_t f, S p) {
      S z = p + bias[f];
      if (norms != nullptr) z *= norms[f];
      S* mine = values + t * k;
      // Nearly all end here. Nothing is at most the NaN of an empty place.
      if (args->sized ? size(z) <= size(mine[k - 1]) : z <= mine[k - 1]) return;
      int64_t* where = places + t * k;
      if (where[k - 1] >= 0 && !goes_before(z, mine[k - 1], args->sized)) return;
      int64_t i = k - 1;
      for (; i > 0 && (where[i - 1] < 0 || goes_before(z, mine[i - 1], args->sized)); --i) {
        mine[i] = mine[i - 1];
        where[i] = where[i - 1];
      }
      mine[i] = z;
      where[i] = f;
    });
  }
}

}  // namespace

#define MX_JOIN(a, b) a##b
#define MX_TABLE(level) MX_JOIN(mechanex_cpu_sae_, level)

extern "C" const SaeKernels* MX_TABLE(MECHANEX_LEVEL)() {
  static const SaeKernels table = {{features<Float32, Float32>, features<Float64, Float64>, features<Float32, BFloat16>,
                                    features<Float32, Float16>, features<Float32, Int8>},
                                   {top<Float32, Float32>, top<Float64, Float64>, top<Float32, BFloat16>,
                                    top<Float32, Float16>, top<Float32, Int8>}};
  return &table;
}
