// Vectors of the instruction set that this translation unit is compiled for, and loads and stores of every dtype.
//
// A kernel is written once for a vector type and a scalar type: both have the arithmetic operators. So the elements left
// over at the end of a row go through the same operations, and an element's result does not depend on its place.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX__)
#include <immintrin.h>
#endif

// For functions called once every few elements: left to itself, the compiler stops inlining in a file of so many kernels.
#if defined(__SANITIZE_ADDRESS__)
#define SYNCBN_INLINE inline  // every copy is instrumented, for which the compiler would take many minutes
#else
#define SYNCBN_INLINE inline __attribute__((always_inline))
#endif

namespace simd {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

constexpr int kFloats = kBytes / 4;
constexpr int kDoubles = kBytes / 8;

typedef float Float __attribute__((vector_size(kBytes)));
typedef double Double __attribute__((vector_size(kBytes)));
typedef float HalfFloat __attribute__((vector_size(kBytes / 2)));  // as many floats as Double has doubles

// As many doubles as Float has floats.
struct Doubles {
  Double low, high;
};
inline Doubles operator+(const Doubles& a, const Doubles& b) { return {a.low + b.low, a.high + b.high}; }
inline Doubles operator-(const Doubles& a, const Doubles& b) { return {a.low - b.low, a.high - b.high}; }

// The float type with as many lanes as the float64 type D.
template <class D> struct Narrow;
template <> struct Narrow<Doubles> { using type = Float; };
template <> struct Narrow<Double> { using type = HalfFloat; };
template <> struct Narrow<double> { using type = float; };

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

template <class V> struct Lanes { static constexpr int value = 1; };
template <> struct Lanes<Float> { static constexpr int value = kFloats; };
template <> struct Lanes<Double> { static constexpr int value = kDoubles; };
template <> struct Lanes<Doubles> { static constexpr int value = kFloats; };
template <> struct Lanes<HalfFloat> { static constexpr int value = kDoubles; };

template <class V, class S> inline V bits_of(const S& s) {
  static_assert(sizeof(V) == sizeof(S), "a bit cast keeps the size");
  V v;
  std::memcpy(&v, &s, sizeof v);
  return v;
}

template <class V, class T> inline V raw(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// For a vector V of floats or doubles: its scalar, and unsigned integers in as many lanes.
template <class V> struct Bits;
template <> struct Bits<Float> {
  typedef float Scalar;
  typedef uint16_t U16 __attribute__((vector_size(kBytes / 2)));
  typedef uint32_t U32 __attribute__((vector_size(kBytes)));
  typedef U32 Same;
};
template <> struct Bits<HalfFloat> {
  typedef float Scalar;
  typedef uint16_t U16 __attribute__((vector_size(kBytes / 4)));
  typedef uint32_t U32 __attribute__((vector_size(kBytes / 2)));
  typedef U32 Same;
};
template <> struct Bits<float> { typedef float Scalar; typedef uint32_t Same; };
template <> struct Bits<Double> {
  typedef double Scalar;
  typedef uint64_t Same __attribute__((vector_size(kBytes)));
};
template <> struct Bits<double> { typedef double Scalar; typedef uint64_t Same; };

// ---- scalars to and from float ------------------------------------------------------------------------------------

inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline float widen(bfloat16 v) { return bits_of<float>(uint32_t(v.bits) << 16); }
inline float widen(float16 v) { return float(bits_of<_Float16>(v.bits)); }

inline void narrow(float v, float* p) { *p = v; }
inline void narrow(double v, double* p) { *p = v; }
inline void narrow(float v, bfloat16* p) {
  const uint32_t u = bits_of<uint32_t>(v);
  // Rounds to nearest, ties to even; a NaN is truncated, which leaves it a NaN (see rounded).
  p->bits = uint16_t((u + (v == v ? 0x7fff + ((u >> 16) & 1) : 0)) >> 16);
}
inline void narrow(float v, float16* p) { p->bits = bits_of<uint16_t>(_Float16(v)); }

// ---- load: V's lanes of any dtype, in V's precision ---------------------------------------------------------------

template <class V> struct Load;

template <> struct Load<float> {
  template <class T> static float from(const T* p) { return widen(*p); }
};
template <> struct Load<double> {
  template <class T> static double from(const T* p) { return widen(*p); }
};

template <class V> inline V load_floats(const float* p) { return raw<V>(p); }
template <class V> inline V load_floats(const bfloat16* p) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return bits_of<V>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw<__m256i>(p)), 16));
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return bits_of<V>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw<__m128i>(p)), 16));
  if constexpr (sizeof(V) == 16)
    return bits_of<V>(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_cvtsi64_si128(raw<int64_t>(p))), 16));
#endif
  typedef typename Bits<V>::U32 U32;
  return bits_of<V>(__builtin_convertvector(raw<typename Bits<V>::U16>(p), U32) << 16);
}
template <class V> inline V load_floats(const float16* p) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return bits_of<V>(_mm512_cvtph_ps(raw<__m256i>(p)));
#endif
#if defined(__F16C__)
  if constexpr (sizeof(V) == 32) return bits_of<V>(_mm256_cvtph_ps(raw<__m128i>(p)));
  if constexpr (sizeof(V) == 16) return bits_of<V>(_mm_cvtph_ps(_mm_cvtsi64_si128(raw<int64_t>(p))));
#endif
  V v;
  for (int i = 0; i < Lanes<V>::value; ++i) v[i] = widen(p[i]);
  return v;
}

template <> struct Load<Float> {
  template <class T> static Float from(const T* p) { return load_floats<Float>(p); }
};
template <> struct Load<HalfFloat> {
  template <class T> static HalfFloat from(const T* p) { return load_floats<HalfFloat>(p); }
};
inline Double widen(HalfFloat v) {
  // One instruction; of __builtin_convertvector GCC 12 makes four.
#if defined(__AVX512F__)
  return bits_of<Double>(_mm512_cvtps_pd(bits_of<__m256>(v)));
#elif defined(__AVX__)
  return bits_of<Double>(_mm256_cvtps_pd(bits_of<__m128>(v)));
#else
  return __builtin_convertvector(v, Double);
#endif
}
inline Double widen(Double v) { return v; }

template <> struct Load<Double> {
  template <class T> static Double from(const T* p) { return widen(load_floats<HalfFloat>(p)); }
  static Double from(const double* p) { return raw<Double>(p); }
};

inline Doubles widen(Float v) {
#if defined(__AVX512F__)
  const __m512d bits = bits_of<__m512d>(v);
  return {widen(bits_of<HalfFloat>(_mm512_castpd512_pd256(bits))), widen(bits_of<HalfFloat>(_mm512_extractf64x4_pd(bits, 1)))};
#elif defined(__AVX__)
  const __m256 bits = bits_of<__m256>(v);
  return {widen(bits_of<HalfFloat>(_mm256_castps256_ps128(bits))), widen(bits_of<HalfFloat>(_mm256_extractf128_ps(bits, 1)))};
#else
  HalfFloat halves[2];
  std::memcpy(halves, &v, sizeof v);
  return {widen(halves[0]), widen(halves[1])};
#endif
}

template <> struct Load<Doubles> {
  template <class T> static Doubles from(const T* p) { return widen(load_floats<Float>(p)); }
  // Each half is widened as it is loaded.
  static Doubles from(const float* p) { return {Load<Double>::from(p), Load<Double>::from(p + kDoubles)}; }
  static Doubles from(const double* p) { return {Load<Double>::from(p), Load<Double>::from(p + kDoubles)}; }
};

template <class V, class T> inline V load(const T* p) { return Load<V>::from(p); }

// ---- store: rounded once to the dtype -----------------------------------------------------------------------------

inline void store(float v, float* p) { narrow(v, p); }
inline void store(float v, bfloat16* p) { narrow(v, p); }
inline void store(float v, float16* p) { narrow(v, p); }
inline void store(double v, double* p) { narrow(v, p); }
inline void store(Float v, float* p) { std::memcpy(p, &v, sizeof v); }
inline void store(Double v, double* p) { std::memcpy(p, &v, sizeof v); }
// The bits whose upper half is v rounded to bfloat16. A NaN is truncated, which leaves it a NaN: those that arithmetic
// returns are quiet, with the highest bit of their mantissa set.
inline Bits<Float>::U32 rounded(Float v) {
  typedef Bits<Float>::U32 U32;
  const U32 u = bits_of<U32>(v);
  return u + ((0x7fff + ((u >> 16) & 1)) & (U32)(v == v));
}
inline void store(Float v, bfloat16* p) {
  typedef Bits<Float>::U32 U32;
  [[maybe_unused]] typedef Bits<Float>::U16 U16;
  const U32 wide = rounded(v) >> 16;
#if defined(__AVX512F__)
  const __m256i out = _mm512_cvtepi32_epi16(bits_of<__m512i>(wide));
#elif defined(__AVX2__)
  const __m256i w = bits_of<__m256i>(wide);
  const __m128i out = _mm_packus_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
#else
  const U16 out = __builtin_convertvector(wide, U16);
#endif
  std::memcpy(p, &out, sizeof out);
}
inline void store(Float v, float16* p) {
#if defined(__AVX512F__)
  const __m256i h = _mm512_cvtps_ph(bits_of<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &h, sizeof h);
#elif defined(__F16C__)
  const __m128i h = _mm256_cvtps_ph(bits_of<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &h, sizeof h);
#else
  for (int i = 0; i < kFloats; ++i) narrow(v[i], p + i);
#endif
}

inline void store(HalfFloat v, float* p) { std::memcpy(p, &v, sizeof v); }
template <class T> inline void store(HalfFloat v, T* p) {
  for (int i = 0; i < kDoubles; ++i) narrow(v[i], p + i);
}

// ---- prefetches, and streaming stores ------------------------------------------------------------------------------

// Prefetches kCount elements, for writing if kToWrite. Addresses beyond an array do no harm.
template <int kCount, bool kToWrite = false, class T> SYNCBN_INLINE void prefetch(const T* p) {
  for (size_t byte = 0; byte < kCount * sizeof(T); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + byte, kToWrite);
}

#if defined(__AVX__)
constexpr bool kStreams = true;
inline void stream_bytes(__m128i v, void* p) { _mm_stream_si128(static_cast<__m128i*>(p), v); }
inline void stream_bytes(__m256i v, void* p) { _mm256_stream_si256(static_cast<__m256i*>(p), v); }
#if defined(__AVX512F__)
inline void stream_bytes(__m512i v, void* p) { _mm512_stream_si512(static_cast<__m512i*>(p), v); }
#endif
// Makes what was streamed visible to other threads.
inline void end_of_stream() { _mm_sfence(); }

template <int kSize> struct Bytes;
template <> struct Bytes<16> { using type = __m128i; };
template <> struct Bytes<32> { using type = __m256i; };
#if defined(__AVX512F__)
template <> struct Bytes<64> { using type = __m512i; };
#endif
#else
constexpr bool kStreams = false;
inline void end_of_stream() {}
#endif

// As store; if `streaming`, vectors go past the caches, and p must be a multiple of the bytes that they take there.
template <class V, class T> inline void put(V v, T* p, [[maybe_unused]] bool streaming) {
#if defined(__AVX__)
  if constexpr (Lanes<V>::value > 1) {
    if (streaming) {
      alignas(64) T out[Lanes<V>::value];
      store(v, out);
      return stream_bytes(raw<typename Bytes<sizeof out>::type>(out), p);
    }
  }
#endif
  store(v, p);
}

// ---- pairs: two vectors of consecutive elements, in an order that load_pair chooses and put_pair undoes -------------

template <class V> struct Pair { V first, second; };

// Whether a pair has the lower 64 bits of each 128 in its first vector and the upper 64 in its second: of bfloat16, which
// is then widened and narrowed without moving elements between lanes of 128 bits. Else it has the lower and upper half.
template <class T> constexpr bool kByLane = std::is_same_v<T, bfloat16> &&
#if defined(__AVX2__)
                                            true;
#else
                                            false;
#endif

template <class V, class T> SYNCBN_INLINE Pair<V> load_pair(const T* p) {
#if defined(__AVX512F__)
  if constexpr (kByLane<T>) {
    const __m512i v = raw<__m512i>(p), zero = _mm512_setzero_si512();
    return {bits_of<V>(_mm512_unpacklo_epi16(zero, v)), bits_of<V>(_mm512_unpackhi_epi16(zero, v))};
  }
#elif defined(__AVX2__)
  if constexpr (kByLane<T>) {
    const __m256i v = raw<__m256i>(p), zero = _mm256_setzero_si256();
    return {bits_of<V>(_mm256_unpacklo_epi16(zero, v)), bits_of<V>(_mm256_unpackhi_epi16(zero, v))};
  }
#endif
  return {load<V>(p), load<V>(p + Lanes<V>::value)};
}

// Of the numbers at p, one for each element of a pair of T, those for its first or its second vector.
template <class T, bool kSecond, class V, class S> SYNCBN_INLINE V load_half(const S* p) {
#if defined(__AVX512F__)
  if constexpr (kByLane<T>)
    return bits_of<V>(_mm512_shuffle_f32x4(raw<__m512>(p), raw<__m512>(p + 16), kSecond ? 0xdd : 0x88));
#elif defined(__AVX2__)
  if constexpr (kByLane<T>) {
    p += kSecond ? 4 : 0;
    return bits_of<V>(_mm256_insertf128_ps(_mm256_castps128_ps256(raw<__m128>(p)), raw<__m128>(p + 8), 1));
  }
#endif
  return load<V>(p + (kSecond ? Lanes<V>::value : 0));
}

#if defined(__AVX2__)
// A pair by lane (see kByLane) as bfloat16, in the order of memory.
template <class V> SYNCBN_INLINE auto packed(const Pair<V>& v) {
  using Vector = typename Bytes<kBytes>::type;
  const auto first = bits_of<Vector>(rounded(v.first) >> 16), second = bits_of<Vector>(rounded(v.second) >> 16);
#if defined(__AVX512F__)
  return _mm512_packus_epi32(first, second);
#else
  return _mm256_packus_epi32(first, second);
#endif
}
template <class Vector> SYNCBN_INLINE void put_bytes(const Vector& v, void* p, bool streaming) {
  if (streaming) stream_bytes(v, p);
  else std::memcpy(p, &v, sizeof v);
}
#endif

template <class V, class T> SYNCBN_INLINE void put_pair(const Pair<V>& v, T* p, bool streaming) {
#if defined(__AVX2__)
  if constexpr (kByLane<T>) return put_bytes(packed(v), p, streaming);
#endif
  put(v.first, p, streaming), put(v.second, p + Lanes<V>::value, streaming);
}

// ---- arithmetic ---------------------------------------------------------------------------------------------------

// a * b + c, rounded once or twice: for sums, whose last bits the contract leaves open.
inline double fma(double a, double b, double c) { return a * b + c; }
inline Double fma(Double a, Double b, Double c) {
#if defined(__AVX512F__)
  return bits_of<Double>(_mm512_fmadd_pd(bits_of<__m512d>(a), bits_of<__m512d>(b), bits_of<__m512d>(c)));
#elif defined(__FMA__)
  return bits_of<Double>(_mm256_fmadd_pd(bits_of<__m256d>(a), bits_of<__m256d>(b), bits_of<__m256d>(c)));
#else
  return a * b + c;
#endif
}

constexpr double inverse_factorial(int i) { return i ? inverse_factorial(i - 1) / i : 1.0; }

// exp(v) for v in [-88, 88], beyond which v is clamped; NaN stays. exp(v) = 2^k * exp(r) with |r| <= log(2) / 2, and
// exp(r) by its series, of which the first term left out is below the roundoff.
template <class V> inline V exp(V v) {
  typedef typename Bits<V>::Scalar S;
  typedef typename Bits<V>::Same U;
  constexpr bool wide = sizeof(S) == 8;
  constexpr int mantissa = wide ? 52 : 23;
  constexpr S shift = wide ? S(6755399441055744.0) : S(12582912.0);  // 1.5 * 2^mantissa: adding it rounds to integers
  v = v > S(88) ? V{} + S(88) : v;
  v = v < S(-88) ? V{} - S(88) : v;
  const V shifted = v * S(1.4426950408889634) + shift;
  const V k = shifted - shift;
  // log(2) in two parts, of which the first has few enough bits for k * part to be exact.
  const V r = (v - k * S(wide ? 0.69314718036912382 : 0.693359375)) - k * S(wide ? 1.9082149292705877e-10 : -2.1219444e-4);
  constexpr int terms = wide ? 13 : 7;
  V series = V{} + S(inverse_factorial(terms));
#pragma GCC unroll 16
  for (int i = terms - 1; i >= 0; --i) series = series * r + S(inverse_factorial(i));
  const U exponent = (bits_of<U>(shifted) - bits_of<typename Bits<S>::Same>(shift) + (wide ? 1023 : 127)) << mantissa;
  return series * bits_of<V>(exponent);
}

inline double sum(Double v) {
  double total = 0;
  for (int i = 0; i < kDoubles; i += 2) total += v[i] + v[i + 1];
  return total;
}

}  // namespace simd
