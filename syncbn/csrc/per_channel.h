// What the loops over elements need per channel, prepared from the statistics; and how short rows are grouped.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

#include "kernels.h"

namespace {

// Groups short rows, where s == 1: `together` rows of c channels are taken as one row of together * c channels, whose
// constants repeat, so that it is a whole number of vectors. Rows left over are a part of their own.
struct Rows {
  Shape all;
  long together = 1;
  explicit Rows(Shape x) : all(x) {
    if (x.s != 1 || x.c == 1) return;
    long k = 32 / std::gcd(x.c, 32L);
    while (k * x.c < 64) k *= 2;
    if (k * x.c <= kGrouped && x.n >= 4 * k) together = k;
  }
  // Calls f(shape, index of the first element, mask) for each part; `valid` is the mask of the whole, or null.
  template <class F> void for_parts(const uint8_t* valid, const F& f) const {
    const long wide = all.n / together, left = all.n % together;
    if (wide || !left) f(Shape{wide, all.c * together, all.s}, 0L, Validity{valid, together});
    if (left) f(Shape{left, all.c, all.s}, wide * together * all.c, Validity{valid ? valid + wide * together : valid, 1});
  }
  // The same for f(shape, first element, mask, sums of the part), of which it makes those of the whole, [a (c) | b (c)].
  template <class F> void sum_parts(const uint8_t* valid, double* sums, const F& f) const {
    if (together == 1) return f(all, 0L, Validity{valid, 1}, sums);
    std::fill(sums, sums + 2 * all.c, 0.0);
    for_parts(valid, [&](Shape part, long first, Validity of_rows) {
      std::vector<double> of_part(2 * part.c);
      f(part, first, of_rows, of_part.data());
      for (long i = 0; i < 2 * part.c; ++i) sums[i < part.c ? i % all.c : all.c + (i - part.c) % all.c] += of_part[i];
    });
  }
  // Repeats constants per channel for the rows taken together.
  template <class T> std::vector<T> repeated(std::vector<T> v) const {
    v.resize(all.c * together);
    for (size_t i = all.c; i < v.size(); ++i) v[i] = v[i - all.c];
    return v;
  }
};

template <class P> P* element(int dtype, P* array, long i) {
  const long bytes = i * (dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2);
  return array ? (P*)((const char*)array + bytes) : array;
}

// mean, scale = invstd * weight and bias, rounded to the accumulate dtype A, from statistics = [mean | invstd | count]
// and weight and bias, of A or null. Weights closer to 0 than weight_floor count as that far from it, so that in place x
// can be recovered from y.
template <class A> struct PerChannel {
  std::vector<A> mean, scale, bias;
  PerChannel(const double* statistics, long c, const void* weight, const void* bias_or_null, double weight_floor)
      : mean(statistics, statistics + c), scale(statistics + c, statistics + 2 * c), bias(c, A(-0.0)) {
    const A *w = static_cast<const A*>(weight), *b = static_cast<const A*>(bias_or_null);
    if (b) std::copy(b, b + c, bias.begin());
    if (!w) return;
    for (long k = 0; k < c; ++k) {
      const double v = w[k], kept = std::abs(v) < weight_floor ? (v < 0 ? -weight_floor : weight_floor) : v;
      scale[k] = A(statistics[c + k] * kept);
    }
  }
  void repeat(const Rows& rows) {
    for (auto* v : {&mean, &scale, &bias}) *v = rows.repeated(std::move(*v));
  }
  Channels channels(const double* exact_mean) const { return {exact_mean, mean.data(), scale.data(), bias.data()}; }
};

template <class A> std::vector<A> inverse(const std::vector<A>& v) {
  std::vector<A> out(v.size());
  for (size_t k = 0; k < v.size(); ++k) out[k] = A(1 / double(v[k]));
  return out;
}

}  // namespace
