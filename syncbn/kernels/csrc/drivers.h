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

#include "kernels.h"
#include "simd.h"

namespace {

using simd::Double;
using simd::kDoubles;

constexpr long kSerial = 1 << 15;  // elements below which waking a thread costs more than it saves

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
  D value() const {
    const D sum = high + low;
    return sum == sum ? sum : high;  // of infinity, low is NaN
  }
};

// Such sums of a and of b for each of c channels; a vector of neighbouring channels is added at once.
class Totals {
 public:
  explicit Totals(long c) : c_(c), v_(4 * c) {}
  template <class D> void add(long channel, const D& a, const D& b) {
    add_to(v_.data() + channel, a), add_to(v_.data() + 2 * c_ + channel, b);
  }
  void add(const Totals& other) {
    for (long c = 0; c < c_; ++c) add(c, other.value(c, 0), other.value(c, 1));
  }
  double value(long channel, int which) const {
    const double* high = v_.data() + 2 * which * c_ + channel;
    return Sum<double>{high[0], high[c_]}.value();
  }

 private:
  template <class D> void add_to(double* high, const D& v) {
    Sum<D> sum{simd::load<D>(high), simd::load<D>(high + c_)};
    sum.add(v);
    simd::store(sum.high, high), simd::store(sum.low, high + c_);
  }
  long c_;
  std::vector<double> v_;  // high of a, low of a, high of b, low of b
};

// What an operation yields of an element: the sums are those of `first` and of `first * second`.
template <class D> struct Factors { D first, second; };

template <class D> SYNCBN_INLINE void add(const Factors<D>& v, D* a, D* b) {
  *a += v.first;
  *b = simd::fma(v.first, v.second, *b);
}
SYNCBN_INLINE void add(const Factors<simd::Doubles>& v, Double* a, Double* b) {
  add(Factors<Double>{v.first.low, v.second.low}, a, b);
  add(Factors<Double>{v.first.high, v.second.high}, a + 1, b + 1);
}

// The constants of channels c, c + 1, ...: of one, where D is a scalar.
template <class D, class Op> SYNCBN_INLINE auto channels(const Op& op, long c) {
  if constexpr (simd::Lanes<D>::value == 1) return op.template channel<D>(c);
  else return op.template channels<D>(c);
}

constexpr long kBlock = 64;  // steps, or rows, of plain addition
constexpr long kRows = 8;    // of a channel that are summed together: as many streams as processors prefetch

// Adds the sums of op over elements [begin, end) of a row of one channel, and of the rows - 1 that follow `stride` later.
template <class Op>
inline void reduce_rows(const Op& op, long c, long begin, long end, long rows, long stride, Totals& totals) {
  using Wide = typename Op::Sums;
  constexpr int ways = 4;  // sums side by side, so that none waits for the one before
  constexpr int lanes = simd::Lanes<Wide>::value, step = lanes / kDoubles;
  constexpr long width = ways * kDoubles;
  const auto v = op.template channel<Wide>(c);
  const auto half = op.template channel<Double>(c);
  const auto u = op.template channel<double>(c);
  Sum<Double> a_total, b_total;
  Double a[ways]{}, b[ways]{};
  double a_tail = 0, b_tail = 0;
  long steps = 0;  // of plain addition so far
  for (long r = 0; r < rows; ++r, begin += stride, end += stride) {
    long i = begin;
    while (i + width <= end) {
      const long count = std::min((end - i) / width, kBlock - steps);
      for (const long stop = i + count * width; i < stop; i += width) {
#pragma GCC unroll 4
        for (int w = 0; w < ways; w += step) add(op.at(i + w * kDoubles, v), a + w, b + w);
      }
      if ((steps += count) == kBlock) {
#pragma GCC unroll 4
        for (int w = 0; w < ways; ++w) {
          a_total.add(a[w]), b_total.add(b[w]);
          a[w] = b[w] = Double{};
        }
        steps = 0;
      }
    }
    for (; i + kDoubles <= end; i += kDoubles) add(op.at(i, half), a, b);
    for (; i < end; ++i) add(op.at(i, u), &a_tail, &b_tail);
  }
#pragma GCC unroll 4
  for (int w = 0; w < ways; ++w) a_total.add(a[w]), b_total.add(b[w]);
  totals.add(c, simd::sum(a_total.value()) + a_tail, simd::sum(b_total.value()) + b_tail);
}

constexpr long kStrip = 256;  // channels whose plain sums stay in the first-level cache
// Rows that are summed in registers before they are added to those; which also makes what is added differ enough for its
// roundings to cancel: the squares of integers alone are 0 or 1 modulo 4, and round one way.
constexpr long kUnroll = 4;

// Adds the sums of op over rows beginning at elements first, first + c, ... to a and b, for channels start + j onwards
// as long as they fill a D; returns the first channel that is left.
template <class D, class Op>
SYNCBN_INLINE long add_rows(const Op& op, long c, long first, long rows, long start, long j, long width, double* a,
                            double* b) {
  constexpr int lanes = simd::Lanes<D>::value;
  using Part = std::conditional_t<lanes == 1, double, Double>;
  constexpr int parts = sizeof(D) / sizeof(Part), part = lanes / parts;
  for (; j + lanes <= width; j += lanes) {
    const auto k = channels<D>(op, start + j);
    const long i = first + j;
    Part a0[parts]{}, a1[parts]{}, b0[parts]{}, b1[parts]{};
    if (rows == kUnroll) {
      add(op.at(i, k), a0, b0), add(op.at(i + c, k), a1, b1);
      add(op.at(i + 2 * c, k), a0, b0), add(op.at(i + 3 * c, k), a1, b1);
    } else {
      for (long r = 0; r < rows; ++r) add(op.at(i + r * c, k), a0, b0);
    }
#pragma GCC unroll 2
    for (int p = 0; p < parts; ++p) {
      double *to_a = a + j + p * part, *to_b = b + j + p * part;
      simd::store(simd::load<Part>(to_a) + (a0[p] + a1[p]), to_a);
      simd::store(simd::load<Part>(to_b) + (b0[p] + b1[p]), to_b);
    }
  }
  return j;
}

// Adds the sums of op over `rows` rows of c channels each, the first beginning at element `first`.
template <class Op> inline void reduce_columns(const Op& op, long c, long first, long rows, Totals& totals) {
  for (long start = 0; start < c; start += kStrip) {
    const long width = std::min(kStrip, c - start);
    alignas(64) double a[kStrip], b[kStrip];
    for (long r = 0; r < rows;) {
      std::fill(a, a + width, 0.0), std::fill(b, b + width, 0.0);
      const long stop = std::min(rows, r + kBlock);
      for (; r < stop; r += kUnroll) {
        const long row = first + r * c + start, together = std::min(kUnroll, stop - r);
        long j = add_rows<typename Op::Sums>(op, c, row, together, start, 0, width, a, b);
        j = add_rows<Double>(op, c, row, together, start, j, width, a, b);
        add_rows<double>(op, c, row, together, start, j, width, a, b);
      }
      long j = 0;
      for (; j + kDoubles <= width; j += kDoubles)
        totals.add(start + j, simd::load<Double>(a + j), simd::load<Double>(b + j));
      for (; j < width; ++j) totals.add(start + j, a[j], b[j]);
    }
  }
}

// out = [sums of a (c) | sums of b (c)] of op over the array.
template <class Op> void reduce(const Op& given, Shape x, double* out) {
  if (!x.size()) return (void)std::fill(out, out + 2 * x.c, 0.0);
  const int threads = threads_for(x.size());
  // Threads have channels of their own, or else sums of their own of all channels.
  const bool by_channel = x.s > 1 && (threads == 1 || x.c >= 4 * threads);
  std::vector<Totals> totals(by_channel ? 1 : threads, Totals(x.c));
  const long sample = x.c * x.s;
  if (by_channel) {
    in_parallel(threads, x.c, [&](int, long c0, long c1) {
      const Op op = given;  // its own, which no store can be taken to change
      for (long i = 0; i < x.n; i += kRows)
        for (long c = c0; c < c1; ++c) {
          const long row = i * sample + c * x.s;
          reduce_rows(op, c, row, row + x.s, std::min(kRows, x.n - i), sample, totals[0]);
        }
    });
  } else if (x.s > 1) {
    in_parallel(threads, x.s, [&](int t, long s0, long s1) {
      const Op op = given;
      for (long i = 0; i < x.n; i += kRows)
        for (long c = 0; c < x.c; ++c) {
          const long row = i * sample + c * x.s;
          reduce_rows(op, c, row + s0, row + s1, std::min(kRows, x.n - i), sample, totals[t]);
        }
    });
  } else {
    in_parallel(threads, x.n, [&](int t, long n0, long n1) {
      const Op op = given;
      reduce_columns(op, x.c, n0 * x.c, n1 - n0, totals[t]);
    });
  }
  for (size_t t = 1; t < totals.size(); ++t) totals[0].add(totals[t]);
  for (long c = 0; c < x.c; ++c) out[c] = totals[0].value(c, 0), out[x.c + c] = totals[0].value(c, 1);
}

// op.put<V>(i, constants) for every element.
template <class V, class S, class Op> void map(const Op& given, Shape x) {
  if (!x.size()) return;
  constexpr int lanes = simd::Lanes<V>::value;
  const int threads = threads_for(x.size());
  if (x.s > 1) {
    in_parallel(threads, x.size(), [&](int, long begin, long end) {
      const Op op = given;
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
    const Op op = given;
    for (long r = begin; r < end; ++r) {
      long j = 0;
      for (; j + lanes <= x.c; j += lanes) op.put(r * x.c + j, op.template channels<V>(j));
      for (; j < x.c; ++j) op.put(r * x.c + j, op.template channel<S>(j));
    }
  });
}

}  // namespace
