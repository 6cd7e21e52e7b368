// The order in which kernels go through an (n, c, s) array, and how threads share it.
//
// map.h goes through an array in the opposite direction to reduce.h, which ran before it on the same array: so it begins
// where the sums ended, with what is still in the cache.
#pragma once

#include <algorithm>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "kernels.h"

namespace {

constexpr long kSerial = 1 << 15;  // elements below which waking a thread costs more than it saves
constexpr long kRows = 8;          // samples visited together: as many streams as processors prefetch
// Prefetch distances, in elements. Processors' own prefetching stops at each page, and sees no pattern in rows of some
// hundred bytes: without ours the sums of 6 MB took 1.3 times as long, and 1.6 times for s == 1.
constexpr long kAhead = 512, kFarAhead = 1024;

// The prefetch distance for an array of `size` elements: 0 for a small one, out of which it would lead.
inline long ahead_in(long size, long distance) { return size < 16 * distance ? 0 : distance; }

inline int threads_for(long size) {
#if defined(_OPENMP)
  return size < kSerial || omp_in_parallel() ? 1 : int(std::min<long>(omp_get_max_threads(), size / (kSerial / 2)));
#else
  (void)size;
  return 1;
#endif
}

// Calls f(thread, begin, end) on equal parts of [0, total), one per thread.
template <class F> inline void in_parallel(int threads, long total, const F& f) {
  if (threads == 1) return f(0, 0L, total);
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static, 1)
#endif
  for (int t = 0; t < threads; ++t) f(t, total * t / threads, total * (t + 1) / threads);
}

// Whether threads share the channels, where s > 1, or else the elements of every row.
inline bool by_channel(Shape x, int threads) { return threads == 1 || x.c >= 4 * threads; }

// Elements [s0, s1) of channels [c0, c1) of `samples` samples from `sample` on, where s > 1.
struct Part {
  long c0, c1, s0, s1, sample, samples;
};

// Calls f(part) for each block of a thread's share of an array: of up to `together` channels and kRows samples.
template <bool kBackwards, class F>
inline void for_parts(Shape x, bool by_channel, long first, long last, long together, const F& f) {
  const long c0 = by_channel ? first : 0, c1 = by_channel ? last : x.c;
  const long s0 = by_channel ? 0 : first, s1 = by_channel ? x.s : last;
  const long blocks = (x.n + kRows - 1) / kRows, steps = (c1 - c0 + together - 1) / together;
  for (long b = 0; b < blocks; ++b) {
    const long sample = (kBackwards ? blocks - 1 - b : b) * kRows;
    for (long k = 0; k < steps; ++k) {
      const long c = c0 + (kBackwards ? steps - 1 - k : k) * together;
      f(Part{c, std::min(c + together, c1), s0, s1, sample, std::min(kRows, x.n - sample)});
    }
  }
}

// The constants of channels c, c + 1, ..., as many as V has lanes.
template <class V, class Op> SYNCBN_INLINE auto channels(const Op& op, long c) {
  if constexpr (simd::Lanes<V>::value == 1) return op.template channel<V>(c);
  else return op.template channels<V>(c);
}

}  // namespace
