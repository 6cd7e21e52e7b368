// Masks: which positions of an (n, c, s) array are valid. What is not valid is replaced by 0, whatever stands there, NaN
// and infinity included.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace simd {

// What of a vector is valid: all of it, or the lanes whose byte is not 0.
struct AllValid {};
struct LanesValid { const uint8_t* bytes; };

template <class V> struct IsDoubles : std::is_same<V, Doubles> {};

// In each lane of V all bits, or none, of an unsigned integer.
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

// As load, with 0 for what is not valid.
template <class V, class T> SYNCBN_INLINE V load_valid(const T* p, AllValid) { return load<V>(p); }
template <class V, class T> SYNCBN_INLINE V load_valid(const T* p, LanesValid valid) {
#if defined(__AVX512F__)
  if constexpr (IsDoubles<V>::value && std::is_same_v<T, float>) {  // each half, as it is widened
    const __m128i bytes = raw<__m128i>(valid.bytes);
    const __mmask16 k = _mm_test_epi8_mask(bytes, bytes);
    return {bits_of<Double>(_mm512_maskz_cvtps_pd(__mmask8(k), raw<__m256>(p))),
            bits_of<Double>(_mm512_maskz_cvtps_pd(__mmask8(k >> 8), raw<__m256>(p + kDoubles)))};
  }
#endif
  return keep(load<V>(p), valid);
}

// As put_pair of v with 0 for what is not valid.
template <class V, class T> SYNCBN_INLINE void put_pair(const Pair<V>& v, T* p, bool streaming, AllValid) {
  put_pair(v, p, streaming);
}
template <class V, class T> SYNCBN_INLINE void put_pair(const Pair<V>& v, T* p, bool streaming, LanesValid valid) {
#if defined(__AVX512F__)
  if constexpr (kByLane<T>) {
    const __m256i bytes = raw<__m256i>(valid.bytes);
    return put_bytes(_mm512_maskz_mov_epi16(_mm256_test_epi8_mask(bytes, bytes), packed(v)), p, streaming);
  }
#elif defined(__AVX2__)
  if constexpr (kByLane<T>) {
    const __m256i wide = _mm256_cvtepu8_epi16(raw<__m128i>(valid.bytes));
    const __m256i is_not = _mm256_cmpeq_epi16(wide, _mm256_setzero_si256());
    return put_bytes(_mm256_andnot_si256(is_not, packed(v)), p, streaming);
  }
#endif
  put_pair(Pair<V>{keep(v.first, valid), keep(v.second, LanesValid{valid.bytes + Lanes<V>::value})}, p, streaming);
}

}  // namespace simd

namespace {

// What the loops ask, at every vector, for what of it is valid. s > 1: `row` of a row's first element and its position,
// then `lanes` of an element. s == 1: `Columns`, of which `row` and then `lanes` of an element of the row.
struct NoMask {
  NoMask row(long, long) const { return {}; }
  simd::AllValid lanes(long) const { return {}; }
  struct Columns {
    explicit Columns(const NoMask&, long) {}
    static constexpr long rows() { return 1L << 62; }
    void expand(long, long) {}
    NoMask row(long) const { return {}; }
  };
};

struct Mask {
  const uint8_t* valid;  // (n, s), a byte each
  const uint8_t* end;
  long together;   // s == 1: bytes for each row
  long shift = 0;  // s > 1: from an element's number to its position's
  Mask row(long element, long position) const { return {valid, end, together, position - element}; }
  simd::LanesValid lanes(long i) const { return {valid + (i + shift)}; }
  class Columns;
};

// A mask of rows of c channels. Where several short rows are taken as one, a vector has elements of some of them: then
// bytes are repeated, one for each element, for as many rows as leave room in the first-level cache. Else a row is valid
// or not.
class Mask::Columns {
 public:
  struct Row {
    const uint8_t* bytes;
    long index;  // all bits or none: which of them an element takes
    simd::LanesValid lanes(long j) const { return {bytes + (j & index)}; }
  };

  Columns(const Mask& mask, long c) : mask_(mask), c_(c), narrow_(c / mask.together) {
#if defined(__AVX2__)
    for (long j = 0; mask.together > 1 && j < c; ++j) {
      if (j % kChunk == 0) base_[j / kChunk] = j / narrow_;
      places_[j] = uint8_t(j / narrow_ - base_[j / kChunk]);
    }
#endif
  }
  // The number of rows that can be expanded at once, an even one.
  long rows() const { return mask_.together > 1 ? kHeld / c_ & -2L : 1L << 62; }
  // Before `row` of rows [first, first + count).
  void expand(long first, long count) {
    if (mask_.together == 1) return;
    first_ = first;
    uint8_t* to = expanded_;
    const uint8_t* from = mask_.valid + first * mask_.together;
    for (long r = 0; r < count; ++r, to += c_, from += mask_.together) {
#if defined(__AVX2__)
      if (mask_.end - from >= mask_.together + kLoaded) {
        for (long j = 0; j < c_; j += kChunk) {
          const __m256i bytes = _mm256_broadcastsi128_si256(simd::raw<__m128i>(from + base_[j / kChunk]));
          const __m256i repeated = _mm256_shuffle_epi8(bytes, simd::raw<__m256i>(places_ + j));
          std::memcpy(to + j, &repeated, sizeof repeated);
        }
        continue;
      }
#endif
      uint8_t* p = to;
      for (long k = 0; k < mask_.together; ++k, p += narrow_) {
        const uint64_t eight = from[k] * 0x0101010101010101u;
        for (long j = 0; j < narrow_; j += 8) std::memcpy(p + j, &eight, 8);  // what is too much is overwritten
      }
    }
  }
  Row row(long number) const {
    if (mask_.together > 1) return {expanded_ + (number - first_) * c_, -1};
    return {kAlike[mask_.valid[number] != 0], 0};
  }

 private:
  static constexpr long kHeld = 4096, kChunk = 32, kLoaded = 16;
  static_assert(kHeld >= 2 * kGrouped, "two rows are written at once");
  alignas(64) static constexpr uint8_t kAlike[2][64] = {
      {0},
      {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
       1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}};
  const Mask mask_;
  const long c_, narrow_;
  long first_ = 0;
  alignas(64) uint8_t expanded_[kHeld + 8];
#if defined(__AVX2__)
  // For each chunk of a row, of at least 2 channels: the first of its bytes, and where from there each element's is.
  long base_[kGrouped / kChunk];
  uint8_t places_[kGrouped];
#endif
};

// Calls f(mask) with the mask of an array, or with none for null.
template <class F> void with_mask(Validity valid, Shape x, const F& f) {
  if (valid.bytes) f(Mask{valid.bytes, valid.bytes + x.n * valid.together * x.s, valid.together});
  else f(NoMask{});
}

}  // namespace
