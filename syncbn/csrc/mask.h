// Masks: which positions of an (n, c, s) array are valid. What is not valid is replaced by 0, whatever stands there, NaN
// and infinity included.
#pragma once

#include "simd.h"

namespace simd {

// What of a vector is valid: all of it, the lanes whose byte is not 0, or all or nothing.
struct AllValid {};
struct LanesValid { const uint8_t* bytes; };
struct RowValid { bool is_valid; };

template <class V> struct IsDoubles : std::is_same<V, Doubles> {};

// In each lane of V all bits, or none, of an unsigned integer.
template <class V> SYNCBN_INLINE typename Bits<V>::Same lanes_of(RowValid valid) {
  typedef typename Bits<V>::Same U;
  typedef typename Bits<typename Bits<V>::Scalar>::Same Lane;
  return U{} - Lane(valid.is_valid);
}
template <class V> SYNCBN_INLINE typename Bits<V>::Same lanes_of(LanesValid valid) {
  typedef typename Bits<V>::Same U;
#if defined(__AVX2__)
  constexpr int lanes = Lanes<V>::value;
  if constexpr (lanes == 8 && sizeof(V) == 32)
    return bits_of<U>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(raw<int64_t>(valid.bytes)))) != 0;
  if constexpr (lanes == 4 && sizeof(V) == 32)
    return bits_of<U>(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(raw<int32_t>(valid.bytes)))) != 0;
  if constexpr (lanes == 4 && sizeof(V) == 16)
    return bits_of<U>(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(raw<int32_t>(valid.bytes)))) != 0;
#endif
  U u{};
  for (int i = 0; i < Lanes<V>::value; ++i) u[i] = valid.bytes[i];
  return u != 0;
}

// v where it is valid, else 0.
template <class V> SYNCBN_INLINE V keep(V v, AllValid) { return v; }
template <class V> SYNCBN_INLINE V keep(V v, RowValid valid) {
  if constexpr (IsDoubles<V>::value) return {keep(v.low, valid), keep(v.high, valid)};
  else if constexpr (Lanes<V>::value == 1) return valid.is_valid ? v : V(0);
  else return bits_of<V>(bits_of<typename Bits<V>::Same>(v) & lanes_of<V>(valid));
}
template <class V> SYNCBN_INLINE V keep(V v, LanesValid valid) {
  if constexpr (Lanes<V>::value == 1) {
    return *valid.bytes ? v : V(0);
  } else {
#if defined(__AVX512F__)
    if constexpr (Lanes<V>::value == 16) {
      const __m128i bytes = raw<__m128i>(valid.bytes);
      const __mmask16 k = _mm_test_epi8_mask(bytes, bytes);
      if constexpr (IsDoubles<V>::value)
        return {bits_of<Double>(_mm512_maskz_mov_pd(__mmask8(k), bits_of<__m512d>(v.low))),
                bits_of<Double>(_mm512_maskz_mov_pd(__mmask8(k >> 8), bits_of<__m512d>(v.high)))};
      else return bits_of<V>(_mm512_maskz_mov_ps(k, bits_of<__m512>(v)));
    } else {
      const __m128i bytes = _mm_cvtsi64_si128(raw<int64_t>(valid.bytes));
      const __mmask8 k = __mmask8(_mm_test_epi8_mask(bytes, bytes));
      if constexpr (sizeof(V) == 64) return bits_of<V>(_mm512_maskz_mov_pd(k, bits_of<__m512d>(v)));
      else return bits_of<V>(_mm256_maskz_mov_ps(k, bits_of<__m256>(v)));
    }
#else
    if constexpr (IsDoubles<V>::value)
      return {keep(v.low, valid), keep(v.high, LanesValid{valid.bytes + kDoubles})};
    else return bits_of<V>(bits_of<typename Bits<V>::Same>(v) & lanes_of<V>(valid));
#endif
  }
}

// As put_pair of v with 0 for what is not valid.
template <class V, class T> SYNCBN_INLINE void put_pair(const Pair<V>& v, T* p, bool streaming, AllValid) {
  put_pair(v, p, streaming);
}
template <class V, class T> SYNCBN_INLINE void put_pair(const Pair<V>& v, T* p, bool streaming, RowValid valid) {
  put_pair(Pair<V>{keep(v.first, valid), keep(v.second, valid)}, p, streaming);
}
template <class V, class T> SYNCBN_INLINE void put_pair(const Pair<V>& v, T* p, bool streaming, LanesValid valid) {
#if defined(__AVX2__)
  if constexpr (kByLane<T>) {  // the bytes in the pair's order, as load_pair has it
    constexpr int half = Lanes<V>::value;
    uint16_t both[2 * half];
#if defined(__AVX512F__)
    const __m512i wide = _mm512_cvtepu8_epi16(raw<__m256i>(valid.bytes));
#else
    const __m256i wide = _mm256_cvtepu8_epi16(raw<__m128i>(valid.bytes));
#endif
    std::memcpy(both, &wide, sizeof wide);
    const Pair<V> lanes = load_pair<V>(reinterpret_cast<const bfloat16*>(both));
    typedef typename Bits<V>::Same U;
    const auto kept = [](const V& values, const V& valid_lanes) {
      return bits_of<V>(bits_of<U>(values) & (U)(bits_of<U>(valid_lanes) != 0));
    };
    return put_pair(Pair<V>{kept(v.first, lanes.first), kept(v.second, lanes.second)}, p, streaming);
  }
#endif
  put_pair(Pair<V>{keep(v.first, valid), keep(v.second, LanesValid{valid.bytes + Lanes<V>::value})}, p, streaming);
}

}  // namespace simd

namespace {

// What the loops ask, at every vector, for what of it is valid. s > 1: `row` of a row's first element and its position,
// then `lanes` of an element. s == 1: `all_lanes` of a row's number.
struct NoMask {
  NoMask row(long, long) const { return {}; }
  simd::AllValid lanes(long) const { return {}; }
  simd::AllValid all_lanes(long) const { return {}; }
};
struct Mask {
  const uint8_t* valid;  // (n, s), a byte each
  long shift = 0;        // from an element's number to its position's
  Mask row(long element, long position) const { return {valid, position - element}; }
  simd::LanesValid lanes(long i) const { return {valid + (i + shift)}; }
  simd::RowValid all_lanes(long row) const { return {valid[row] != 0}; }
};

// Calls f(mask) with the mask at `valid`, or with none for null.
template <class F> void with_mask(const uint8_t* valid, const F& f) {
  if (valid) f(Mask{valid});
  else f(NoMask{});
}

}  // namespace
