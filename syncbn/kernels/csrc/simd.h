// Vectors of the instruction set that this translation unit is compiled for, and loads and stores of every dtype.
//
// A kernel is written once for a vector type and a scalar type: both have the arithmetic operators, so that the tail of a
// row goes through the very operations of its body and an element's result does not depend on where it stands.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
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

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

template <class V> struct Lanes { static constexpr int value = 1; };
template <> struct Lanes<Float> { static constexpr int value = kFloats; };
template <> struct Lanes<Double> { static constexpr int value = kDoubles; };
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

// Unsigned vectors with as many lanes as the float vector V.
template <class V> struct Bits;
template <> struct Bits<Float> {
  typedef uint16_t U16 __attribute__((vector_size(kBytes / 2)));
  typedef uint32_t U32 __attribute__((vector_size(kBytes)));
};
template <> struct Bits<HalfFloat> {
  typedef uint16_t U16 __attribute__((vector_size(kBytes / 4)));
  typedef uint32_t U32 __attribute__((vector_size(kBytes / 2)));
};

// ---- scalars to and from float ------------------------------------------------------------------------------------

inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline float widen(bfloat16 v) { return bits_of<float>(uint32_t(v.bits) << 16); }
inline float widen(float16 v) { return float(bits_of<_Float16>(v.bits)); }

inline void narrow(float v, float* p) { *p = v; }
inline void narrow(double v, double* p) { *p = v; }
inline void narrow(float v, bfloat16* p) {
  const uint32_t u = bits_of<uint32_t>(v);
  // To nearest, ties to even; a NaN stays one.
  p->bits = v != v ? uint16_t(0x7fc0) : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
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
template <> struct Load<Double> {
  template <class T> static Double from(const T* p) {
    return __builtin_convertvector(load_floats<HalfFloat>(p), Double);
  }
  static Double from(const double* p) { return raw<Double>(p); }
};

template <class V, class T> inline V load(const T* p) { return Load<V>::from(p); }

// ---- store: rounded once to the dtype -----------------------------------------------------------------------------

inline void store(float v, float* p) { narrow(v, p); }
inline void store(float v, bfloat16* p) { narrow(v, p); }
inline void store(float v, float16* p) { narrow(v, p); }
inline void store(double v, double* p) { narrow(v, p); }
inline void store(Float v, float* p) { std::memcpy(p, &v, sizeof v); }
inline void store(Double v, double* p) { std::memcpy(p, &v, sizeof v); }
inline void store(Float v, bfloat16* p) {
  typedef Bits<Float>::U32 U32;
  [[maybe_unused]] typedef Bits<Float>::U16 U16;
  const U32 u = bits_of<U32>(v);
  const U32 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const U32 is_nan = (U32)(v != v);
  const U32 wide = (rounded & ~is_nan) | (is_nan & 0x7fc0);
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

inline double sum(Double v) {
  double total = 0;
  for (int i = 0; i < kDoubles; ++i) total += v[i];
  return total;
}

}  // namespace simd
