// The C interface of the CPU kernels: the instruction set is picked at load; what is per channel is done here.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <numeric>
#include <utility>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace {

const Kernels& pick() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
#if defined(SYNCBN_HAS_avx512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return kernels_avx512;
#endif
#if defined(SYNCBN_HAS_avx2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return kernels_avx2;
#endif
  return kernels_baseline;
}

const Kernels& kernels = pick();

// As the system knows it: what sysconf says adds up the caches of several sockets on some processors.
long last_level_cache() {
  long kilobytes = 0;
  if (FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
    if (std::fscanf(file, "%ldK", &kilobytes) != 1) kilobytes = 0;
    std::fclose(file);
  }
  return kilobytes > 0 ? kilobytes << 10 : 32L << 20;
}

// running += momentum * (batch - running), in the buffers' own dtype.
template <class T> void update(void* running, const double* batch, long c, double momentum) {
  T* p = static_cast<T*>(running);
  for (long i = 0; i < c; ++i) {
    const double old = simd::widen(p[i]), updated = old + momentum * (batch[i] - old);
    if constexpr (std::is_same_v<T, double>) p[i] = updated;
    else simd::narrow(float(updated), p + i);
  }
}

void update(int dtype, void* running, const double* batch, long c, double momentum) {
  switch (dtype) {
    case kFloat64: return update<double>(running, batch, c, momentum);
    case kFloat32: return update<float>(running, batch, c, momentum);
    case kBfloat16: return update<simd::bfloat16>(running, batch, c, momentum);
    case kFloat16: return update<simd::float16>(running, batch, c, momentum);
  }
}

// Rows of few channels, or of no whole number of vectors, are taken together: `together` of them are one row of as many
// times the channels, whose constants recur. What rows are left over is a part of its own.
struct Rows {
  Shape all;
  long together = 1;
  explicit Rows(Shape x) : all(x) {
    if (x.s != 1 || x.c == 1) return;
    long k = 32 / std::gcd(x.c, 32L);
    while (k * x.c < 64) k *= 2;
    if (k * x.c <= 256 && x.n >= 4 * k) together = k;
  }
  // Calls f(shape, the number of its first element) for each part.
  template <class F> void for_parts(const F& f) const {
    const long wide = all.n / together, left = all.n % together;
    if (wide || !left) f(Shape{wide, all.c * together, all.s}, 0L);
    if (left) f(Shape{left, all.c, all.s}, wide * together * all.c);
  }
  // The same with f(shape, first element, [a | b]), where [a | b] per channel are added to sums, which are of all.c each.
  template <class F> void sum_parts(double* sums, const F& f) const {
    if (together == 1) return f(all, 0L, sums);
    std::fill(sums, sums + 2 * all.c, 0.0);
    for_parts([&](Shape part, long first) {
      std::vector<double> of_part(2 * part.c);
      f(part, first, of_part.data());
      for (long i = 0; i < 2 * part.c; ++i) sums[i < part.c ? i % all.c : all.c + (i - part.c) % all.c] += of_part[i];
    });
  }
  // The constants of a row of any part.
  template <class T> std::vector<T> recurring(std::vector<T> v) const {
    v.resize(all.c * together);
    for (size_t i = all.c; i < v.size(); ++i) v[i] = v[i - all.c];
    return v;
  }
};

template <class P> P* element(int dtype, P* array, long i) {
  const long bytes = i * (dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2);
  return array ? (P*)((const char*)array + bytes) : array;
}

// What the loops need per channel, from statistics = [mean (c) | invstd (c) | count]; weight, bias and the results are of
// the accumulate dtype A. No bias is one of -0, which leaves zeros their sign. With a weight_floor, weights closer to 0
// count as that far from it: y then still tells x.
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
  void recur(const Rows& rows) {
    for (auto* v : {&mean, &scale, &bias}) *v = rows.recurring(std::move(*v));
  }
  Channels channels(const double* exact_mean) const { return {exact_mean, mean.data(), scale.data(), bias.data()}; }
};

template <class A> std::vector<A> inverse(const std::vector<A>& v) {
  std::vector<A> out(v.size());
  for (size_t k = 0; k < v.size(); ++k) out[k] = A(1 / double(v[k]));
  return out;
}

template <class A>
void elemt(int dtype, const void* x, const void* residual, void* y, Shape shape, const double* statistics,
           const void* weight, const void* bias, Tail tail, double weight_floor) {
  const Rows rows(shape);
  PerChannel<A> k(statistics, shape.c, weight, bias, weight_floor);
  k.recur(rows);
  rows.for_parts([&](Shape part, long i) {
    kernels.elemt(dtype, element(dtype, x, i), element(dtype, residual, i), element(dtype, y, i), part,
                  k.channels(nullptr), tail);
  });
}

template <class A>
void backward_reduce(int dtype, const void* dy, const void* x, const void* gate, void* g, Shape shape,
                     const double* statistics, const void* weight, const void* bias, void* grad_weight, void* grad_bias,
                     Tail tail, double weight_floor, double* sums) {
  const long c = shape.c;
  const Rows rows(shape);
  PerChannel<A> k(statistics, c, weight, bias, weight_floor);
  std::vector<double> mean(statistics, statistics + c);
  if (tail.in_place) {
    k.scale = inverse(k.scale);
    // What is recovered from y is x minus the rounded mean.
    for (long i = 0; i < c; ++i) mean[i] = double(k.mean[i]) - statistics[i];
  }
  k.recur(rows), mean = rows.recurring(std::move(mean));
  rows.sum_parts(sums, [&](Shape part, long i, double* of_part) {
    kernels.backward_reduce(dtype, element(dtype, dy, i), element(dtype, x, i), element(dtype, gate, i),
                            element(dtype, g, i), part, k.channels(mean.data()), tail, of_part);
  });
  A *of_weight = static_cast<A*>(grad_weight), *of_bias = static_cast<A*>(grad_bias);
  for (long i = 0; of_weight && i < c; ++i) of_weight[i] = A(sums[c + i] * statistics[c + i]);
  for (long i = 0; of_bias && i < c; ++i) of_bias[i] = A(sums[i]);
}

template <class A>
void backward_elemt(int dtype, const void* dy, const void* x, void* dx, Shape shape, const double* statistics,
                    const void* weight, const void* bias, const double* sums, Tail tail, double weight_floor) {
  const Rows rows(shape);
  PerChannel<A> k(statistics, shape.c, weight, bias, weight_floor);
  const long c = shape.c;
  const double elements = std::max(statistics[2 * c], 1.0);
  std::vector<A> slope(c), mean_dy(c);
  for (long i = 0; i < c; ++i) {
    const double invstd = statistics[c + i], exact = sums[c + i] / elements * (invstd * invstd);
    slope[i] = A(exact);
    // What the rounding of the mean adds to x - mean goes, times slope, into the constant term.
    mean_dy[i] = A(sums[i] / elements - (statistics[i] - double(k.mean[i])) * exact);
  }
  slope = rows.recurring(std::move(slope)), mean_dy = rows.recurring(std::move(mean_dy));
  k.recur(rows);
  const std::vector<A> scale = k.scale;
  if (tail.in_place) k.scale = inverse(k.scale);
  const GradientChannels channels{k.channels(nullptr), slope.data(), mean_dy.data(), scale.data()};
  rows.for_parts([&](Shape part, long i) {
    kernels.backward_elemt(dtype, element(dtype, dy, i), element(dtype, x, i), element(dtype, dx, i), part, channels,
                           tail);
  });
}

}  // namespace

long cache_bytes = last_level_cache();

#define SYNCBN_API extern "C" __attribute__((visibility("default")))

SYNCBN_API const char* syncbn_isa() { return kernels.name; }

// Sets the size from which on results go past the caches, and returns the one before: for tests.
SYNCBN_API long syncbn_set_cache_bytes(long bytes) { return std::exchange(cache_bytes, bytes); }

// Asks for huge pages where memory is still to come from the system: its pages then come, cleared, some hundred at a time.
SYNCBN_API void syncbn_prefer_huge_pages(void* address, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t page = sysconf(_SC_PAGESIZE), begin = reinterpret_cast<uintptr_t>(address) / page * page;
  // A wish: where the system has no huge pages, or not here, nothing is lost.
  (void)madvise(reinterpret_cast<void*>(begin), reinterpret_cast<uintptr_t>(address) + bytes - begin, MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

SYNCBN_API void syncbn_stats(int dtype, long n, long c, long s, const void* x, const double* center, double* moments) {
  const Rows rows({n, c, s});
  std::vector<double> centers;
  if (center) centers = rows.recurring(std::vector<double>(center, center + c));
  rows.sum_parts(moments, [&](Shape part, long i, double* of_part) {
    kernels.stats(dtype, element(dtype, x, i), part, center ? centers.data() : nullptr, of_part);
  });
  moments[2 * c] = double(n) * double(s);
}

// Turns the moments of all ranks into statistics, in place; returns the count.
SYNCBN_API double syncbn_combine(long c, int running_dtype, double* moments, const double* center, void* running_mean,
                                 void* running_var, int64_t* batches, double momentum, double eps) {
  const double count = moments[2 * c], elements = std::max(count, 1.0);
  std::vector<double> vars(c);
  for (long k = 0; k < c; ++k) {
    const double offset = moments[k] / elements, difference = moments[c + k] / elements - offset * offset;
    moments[k] = center ? center[k] + offset : offset;
    vars[k] = difference < 0 ? 0 : difference;  // rounding; a NaN stays
    moments[c + k] = 1 / std::sqrt(vars[k] + eps);
  }
  if (!(count > 1) || count != std::floor(count)) return count;
  if (batches) ++*batches;
  if (!running_mean) return count;
  for (double& var : vars) var *= count / (count - 1);
  update(running_dtype, running_mean, moments, c, momentum);
  update(running_dtype, running_var, vars.data(), c, momentum);
  return count;
}

SYNCBN_API void syncbn_elemt(int dtype, long n, long c, long s, const void* x, const void* residual, void* y,
                             const double* statistics, const void* weight, const void* bias, int activation,
                             double slope, double weight_floor) {
  const Tail tail{activation, slope, weight_floor > 0};
  (dtype == kFloat64 ? elemt<double> : elemt<float>)(dtype, x, residual, y, {n, c, s}, statistics, weight, bias, tail,
                                                     weight_floor);
}

SYNCBN_API void syncbn_backward_reduce(int dtype, long n, long c, long s, const void* dy, const void* x,
                                       const void* gate, void* g, const double* statistics, const void* weight, const void* bias,
                                       void* grad_weight, void* grad_bias, double* sums, int activation, double slope,
                                       double weight_floor) {
  const Tail tail{activation, slope, weight_floor > 0};
  (dtype == kFloat64 ? backward_reduce<double> : backward_reduce<float>)(
      dtype, dy, x, gate, g, {n, c, s}, statistics, weight, bias, grad_weight, grad_bias, tail, weight_floor, sums);
}

SYNCBN_API void syncbn_backward_elemt(int dtype, long n, long c, long s, const void* dy, const void* x, void* dx,
                                      const double* statistics, const void* weight, const void* bias,
                                      const double* sums, int activation, double slope, double weight_floor) {
  const Tail tail{activation, slope, weight_floor > 0};
  (dtype == kFloat64 ? backward_elemt<double> : backward_elemt<float>)(dtype, dy, x, dx, {n, c, s}, statistics, weight,
                                                                       bias, sums, tail, weight_floor);
}
