// The two ways through an (n, c, s) array: `reduce` sums pairs per channel in float64, `map` writes element by element.
//
// Both take an operation that is a template over the vector type, with
//     channel<V>(c)     the constants of channel c, in every lane            (s > 1: a row has one channel)
//     channels<V>(c)    the constants of channels c, c + 1, ..., a lane each (s == 1: a row has them all)
// and go through memory in order, threads over disjoint parts.
#pragma once

#include <algorithm>
#include <vector>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "simd.h"

namespace {

using simd::Double;
using simd::kDoubles;

constexpr long kSerial = 1 << 15;  // elements below which waking a thread costs more than it saves
constexpr long kTileElements = 4096;  // of a tile of rows that stays in the first-level cache

struct Shape {
  long n, c, s;
  long size() const { return n * c * s; }
};

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

// Sums that grow long are kept as two numbers, of which `low` collects what rounding takes from `high` (two-sum, Knuth):
// adding a few hundred terms plainly and blocks of them so costs nothing and loses nothing. D is a vector or a double.
template <class D> struct Sum {
  D high{}, low{};
  void add(const D& v) {
    const D total = high + v, part = total - high;
    low += (high - (total - part)) + (v - part);
    high = total;
  }
  D value() const { return high + low; }
};

struct Pair {
  Sum<double> a, b;
};

constexpr long kBlock = 64;  // steps of plain addition
constexpr long kRows = 8;    // of a channel that are summed together: as many streams as processors prefetch

// Adds the sums of op over elements [begin, end) of a row of one channel, and of the rows - 1 that follow `stride` later.
template <class Op>
inline void reduce_rows(const Op& op, long c, long begin, long end, long rows, long stride, Pair& total) {
  const auto v = op.template channel<Double>(c);
  const auto u = op.template channel<double>(c);
  Sum<Double> a, b;
  Double a0{}, a1{}, a2{}, a3{}, b0{}, b1{}, b2{}, b3{};
  double a_tail = 0, b_tail = 0;
  long steps = 0;  // of plain addition so far
  for (long r = 0; r < rows; ++r, begin += stride, end += stride) {
    long i = begin;
    while (i + 4 * kDoubles <= end) {
      const long count = std::min((end - i) / (4 * kDoubles), kBlock - steps);
      for (const long stop = i + count * 4 * kDoubles; i < stop; i += 4 * kDoubles) {
        op.add(i, v, a0, b0);
        op.add(i + kDoubles, v, a1, b1);
        op.add(i + 2 * kDoubles, v, a2, b2);
        op.add(i + 3 * kDoubles, v, a3, b3);
      }
      if ((steps += count) == kBlock) {
        a.add((a0 + a1) + (a2 + a3)), b.add((b0 + b1) + (b2 + b3));
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = Double{};
        steps = 0;
      }
    }
    for (; i + kDoubles <= end; i += kDoubles) op.add(i, v, a0, b0);
    for (; i < end; ++i) op.add(i, u, a_tail, b_tail);
  }
  a.add((a0 + a1) + (a2 + a3)), b.add((b0 + b1) + (b2 + b3));
  total.a.add(simd::sum(a.value()) + a_tail);
  total.b.add(simd::sum(b.value()) + b_tail);
}

// Adds the sums of op over `rows` rows of c channels each, the first beginning at element `first`. Channels stay in
// registers across a tile.
template <class Op> inline void reduce_columns(const Op& op, long c, long first, long rows, Pair* totals) {
  const long tile = std::clamp(kTileElements / c, 8L, kBlock);
  for (long r = 0; r < rows; r += tile) {
    const long end = std::min(rows, r + tile);
    long j = 0;
    for (; j + 2 * kDoubles <= c; j += 2 * kDoubles) {
      const auto v0 = op.template channels<Double>(j), v1 = op.template channels<Double>(j + kDoubles);
      Double a0{}, a1{}, b0{}, b1{};
      for (long k = r; k < end; ++k) {
        op.add(first + k * c + j, v0, a0, b0);
        op.add(first + k * c + j + kDoubles, v1, a1, b1);
      }
      for (int l = 0; l < kDoubles; ++l) {
        totals[j + l].a.add(a0[l]), totals[j + l].b.add(b0[l]);
        totals[j + kDoubles + l].a.add(a1[l]), totals[j + kDoubles + l].b.add(b1[l]);
      }
    }
    for (; j < c; ++j) {
      const auto u = op.template channel<double>(j);
      double a = 0, b = 0;
      for (long k = r; k < end; ++k) op.add(first + k * c + j, u, a, b);
      totals[j].a.add(a), totals[j].b.add(b);
    }
  }
}

// out = [sums of a (c) | sums of b (c)] of op over the array.
template <class Op> void reduce(const Op& op, Shape x, double* out) {
  if (!x.size()) return (void)std::fill(out, out + 2 * x.c, 0.0);
  const int threads = threads_for(x.size());
  // Threads have channels of their own, or else sums of their own of all channels.
  const bool by_channel = x.s > 1 && (threads == 1 || x.c >= 4 * threads);
  std::vector<Pair> totals(size_t(by_channel ? 1 : threads) * x.c);
  const long sample = x.c * x.s;
  if (by_channel) {
    in_parallel(threads, x.c, [&](int, long c0, long c1) {
      for (long i = 0; i < x.n; i += kRows)
        for (long c = c0; c < c1; ++c) {
          const long row = i * sample + c * x.s;
          reduce_rows(op, c, row, row + x.s, std::min(kRows, x.n - i), sample, totals[c]);
        }
    });
  } else if (x.s > 1) {
    in_parallel(threads, x.s, [&](int t, long s0, long s1) {
      for (long i = 0; i < x.n; i += kRows)
        for (long c = 0; c < x.c; ++c) {
          const long row = i * sample + c * x.s;
          reduce_rows(op, c, row + s0, row + s1, std::min(kRows, x.n - i), sample, totals[t * x.c + c]);
        }
    });
  } else {
    in_parallel(threads, x.n, [&](int t, long n0, long n1) {
      reduce_columns(op, x.c, n0 * x.c, n1 - n0, totals.data() + t * x.c);
    });
  }
  for (long c = 0; c < x.c; ++c) {
    Pair total = totals[c];
    for (int t = 1; t < (by_channel ? 1 : threads); ++t) {
      total.a.add(totals[t * x.c + c].a.value());
      total.b.add(totals[t * x.c + c].b.value());
    }
    out[c] = total.a.value(), out[x.c + c] = total.b.value();
  }
}

// op.put<V>(i, constants) for every element.
template <class V, class S, class Op> void map(const Op& op, Shape x) {
  if (!x.size()) return;
  constexpr int lanes = simd::Lanes<V>::value;
  const int threads = threads_for(x.size());
  if (x.s > 1) {
    in_parallel(threads, x.size(), [&](int, long begin, long end) {
      while (begin < end) {
        const long row = begin / x.s, stop = std::min(end, (row + 1) * x.s);
        const auto v = op.template channel<V>(row % x.c);
        long i = begin;
        for (; i + lanes <= stop; i += lanes) op.put(i, v);
        const auto u = op.template channel<S>(row % x.c);
        for (; i < stop; ++i) op.put(i, u);
        begin = stop;
      }
    });
    return;
  }
  in_parallel(threads, x.n, [&](int, long begin, long end) {
    for (long r = begin; r < end; ++r) {
      long j = 0;
      for (; j + lanes <= x.c; j += lanes) op.put(r * x.c + j, op.template channels<V>(j));
      for (; j < x.c; ++j) op.put(r * x.c + j, op.template channel<S>(j));
    }
  });
}

}  // namespace
