// `reduce`: sums pairs per channel of an (n, c, s) array in float64.
//
// It takes an operation that is a template over the vector type, with
//     Sums              the type of its sums: doubles, as many as the element-wise arithmetic has lanes
//     channel<D>(c)     the constants of channel c, in every lane            (s > 1: a row has one channel)
//     channels<D>(c)    the constants of channels c, c + 1, ..., a lane each (s == 1: a row has them all)
//     prefetch<k>(i)    prefetches what at reads of elements i, ..., i + k - 1
//     at<D>(i, k, valid)  the Factors of elements i, i + 1, ..., 0 for what is not valid
#pragma once

#include <vector>

#include "mask.h"
#include "simd.h"
#include "walk.h"

namespace {

using simd::Double;
using simd::kDoubles;

// A compensated sum: `low` collects the rounding errors of `high` (two-sum, Knuth). Where blocks of a few hundred terms
// are added plainly, and only their sums to this one, it costs no time, and the result is nearly exact. D is a vector or
// a double.
template <class D> struct Sum {
  D high{}, low{};
  void add(const D& v) {
    const D total = high + v, part = total - high;
    low += (high - (total - part)) + (v - part);
    high = total;
  }
  D value() const {
    const D sum = high + low;
    return sum == sum ? sum : high;  // where high is infinite, low is NaN
  }
};

// Compensated sums of a and b for each of c channels; a vector D adds to as many neighbouring channels.
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

// What an operation returns for an element: `first` is added to the sum a, `first * second` to the sum b.
template <class D> struct Factors { D first, second; };

template <class D> SYNCBN_INLINE void add(const Factors<D>& v, D* a, D* b) {
  *a += v.first;
  *b = simd::fma(v.first, v.second, *b);
}
SYNCBN_INLINE void add(const Factors<simd::Doubles>& v, Double* a, Double* b) {
  add(Factors<Double>{v.first.low, v.second.low}, a, b);
  add(Factors<Double>{v.first.high, v.second.high}, a + 1, b + 1);
}

constexpr long kBlock = 64;  // steps, or rows, that are added plainly
constexpr int kWays = 4;     // independent sums, so that no addition waits for the one before

// Adds the sums of op over a part of one channel.
template <class Op, class M>
inline void reduce_rows(const Op& given, const M& mask, Shape x, const Part& part, Totals& totals) {
  const Op op = given;  // local copy: stores cannot alias it, so it stays in registers
  using Wide = typename Op::Sums;
  constexpr int lanes = simd::Lanes<Wide>::value, step = lanes / kDoubles;
  constexpr long width = kWays * kDoubles;
  const long c = part.c0, stride = x.c * x.s, ahead = ahead_in(x.size(), kAhead);
  long begin = (part.sample * x.c + c) * x.s + part.s0;
  const auto v = op.template channel<Wide>(c);
  const auto half = op.template channel<Double>(c);
  const auto u = op.template channel<double>(c);
  Sum<Double> a_total, b_total;
  Double a[kWays]{}, b[kWays]{};
  double a_tail = 0, b_tail = 0;
  long steps = 0;  // of plain addition so far
  for (long r = 0; r < part.samples; ++r, begin += stride) {
    long i = begin;
    const long end = begin + (part.s1 - part.s0);
    const M valid = mask.row(begin, (part.sample + r) * x.s + part.s0);
    while (i + width <= end) {
      const long count = std::min((end - i) / width, kBlock - steps);
      for (const long stop = i + count * width; i < stop; i += width) {
        op.template prefetch<width>(i + ahead);
#pragma GCC unroll 4
        for (int w = 0; w < kWays; w += step) add(op.at(i + w * kDoubles, v, valid.lanes(i + w * kDoubles)), a + w, b + w);
      }
      if ((steps += count) == kBlock) {
#pragma GCC unroll 4
        for (int w = 0; w < kWays; ++w) {
          a_total.add(a[w]), b_total.add(b[w]);
          a[w] = b[w] = Double{};
        }
        steps = 0;
      }
    }
    for (; i + kDoubles <= end; i += kDoubles) add(op.at(i, half, valid.lanes(i)), a, b);
    for (; i < end; ++i) add(op.at(i, u, valid.lanes(i)), &a_tail, &b_tail);
  }
  a_total.add((a[0] + a[1]) + (a[2] + a[3])), b_total.add((b[0] + b[1]) + (b[2] + b[3]));
  totals.add(c, simd::sum(a_total.value()) + a_tail, simd::sum(b_total.value()) + b_tail);
}

constexpr long kStrip = 256;         // channels whose plain sums stay in the first-level cache
// Rows of together about so many elements are summed in registers before they are added to those plain sums. That also
// lets rounding errors cancel: the squares of integers, added one by one, would all be rounded the same way, for they are
// 0 or 1 modulo 4.
constexpr long kGroup = 1024;
static_assert(kGrouped <= kStrip, "a row of several short ones is one strip");

// Adds the sums of op over `rows` rows of c channels, from row `row` and element `first` on, to a and b. Takes channels start + j
// onwards, as many as kCount D hold at a time, up to start + width; returns the first that is left over.
template <class D, int kCount, class Op, class Columns>
SYNCBN_INLINE long add_rows(const Op& op, const Columns& columns, Shape x, long row, long first, long rows, long start, long j,
                            long width, double* a, double* b) {
  constexpr int lanes = simd::Lanes<D>::value;
  const long c = x.c, far = ahead_in(x.size(), kFarAhead);
  using Lane = std::conditional_t<lanes == 1, double, Double>;
  constexpr int parts = sizeof(D) / sizeof(Lane), part = lanes / parts;
  for (; j + kCount * lanes <= width; j += kCount * lanes) {
    decltype(channels<D>(op, 0)) k[kCount];
    for (int w = 0; w < kCount; ++w) k[w] = channels<D>(op, start + j + w * lanes);
    Lane sum_a[kCount * parts]{}, sum_b[kCount * parts]{};
    for (long r = 0, i = first + j; r < rows; ++r, i += c) {
      // Prefetches the same channels of the next rows; where the strip is a whole row, in the order of memory.
      op.template prefetch<kCount * lanes>(c <= kStrip ? first + far + rows * j + r * kCount * lanes
                                                       : i + (far ? rows * c : 0));
      const auto valid = columns.row(row + r);
#pragma GCC unroll 4
      for (int w = 0; w < kCount; ++w)
        add(op.at(i + w * lanes, k[w], valid.lanes(j + w * lanes)), sum_a + w * parts, sum_b + w * parts);
    }
#pragma GCC unroll 4
    for (int p = 0; p < kCount * parts; ++p) {
      double *to_a = a + j + p * part, *to_b = b + j + p * part;
      simd::store(simd::load<Lane>(to_a) + sum_a[p], to_a);
      simd::store(simd::load<Lane>(to_b) + sum_b[p], to_b);
    }
  }
  return j;
}

// Adds the sums of op over rows [begin, end) of c channels each.
template <class Op, class M>
inline void reduce_columns(const Op& given, const M& mask, Shape x, long begin, long end, Totals& totals) {
  const Op op = given;
  using Wide = typename Op::Sums;
  constexpr int count = kWays * kDoubles / simd::Lanes<Wide>::value;
  const long c = x.c, together = std::clamp(kGroup / c, 4L, kBlock);
  typename M::Columns columns(mask, c);
  for (; begin < end; begin += kBlock) {
    const long stop = std::min(end, begin + kBlock);
    for (long start = 0; start < c; start += kStrip) {
      const long width = std::min(kStrip, c - start);
      alignas(64) double a[kStrip], b[kStrip];
      std::fill(a, a + width, 0.0), std::fill(b, b + width, 0.0);
      for (long r = begin; r < stop; r += together) {
        const long first = r * c + start, rows = std::min(together, stop - r);
        columns.expand(r, rows);
        long j = add_rows<Wide, count>(op, columns, x, r, first, rows, start, 0, width, a, b);
        j = add_rows<Double, 1>(op, columns, x, r, first, rows, start, j, width, a, b);
        add_rows<double, 1>(op, columns, x, r, first, rows, start, j, width, a, b);
      }
      long j = 0;
      for (; j + kDoubles <= width; j += kDoubles)
        totals.add(start + j, simd::load<Double>(a + j), simd::load<Double>(b + j));
      for (; j < width; ++j) totals.add(start + j, a[j], b[j]);
    }
  }
}

// out = [sums of a (c) | sums of b (c)] of op over what is valid of the array.
template <class Op, class M> void reduce(const Op& op, const M& mask, Shape x, double* out) {
  if (!x.size()) return (void)std::fill(out, out + 2 * x.c, 0.0);
  const int threads = threads_for(x.size());
  // Threads share the channels, or else each has its own sums of all channels.
  const bool rows = x.s > 1, split = by_channel(x, threads), shared = rows && split;
  std::vector<Totals> totals(shared ? 1 : threads, Totals(x.c));
  in_parallel(threads, rows ? (split ? x.c : x.s) : x.n, [&](int t, long first, long last) {
    Totals& sums = totals[shared ? 0 : t];
    if (!rows) return reduce_columns(op, mask, x, first, last, sums);
    for_parts<false>(x, split, first, last, 1, [&](const Part& part) {
      reduce_rows(op, mask, x, part, sums);
    });
  });
  for (size_t t = 1; t < totals.size(); ++t) totals[0].add(totals[t]);
  for (long c = 0; c < x.c; ++c) out[c] = totals[0].value(c, 0), out[x.c + c] = totals[0].value(c, 1);
}

}  // namespace
