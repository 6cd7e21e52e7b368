// The C interface: picks the instruction set at load, and does all arithmetic on vectors of c elements. The loops over
// whole arrays are in kernels.cpp.
#include "syncbn_cpu.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <utility>
#include <vector>

#include "kernels.h"
#include "per_channel.h"
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

// From /sys, not from sysconf, which adds up the caches of several sockets on some processors.
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

template <class A>
void elemt(int dtype, const void* x, const void* residual, void* y, const uint8_t* valid, Shape shape,
           const double* statistics, const void* weight, const void* bias, const Epilogue& epilogue) {
  const Rows rows(shape);
  PerChannel<A> k(statistics, shape.c, weight, bias, epilogue.weight_floor);
  k.repeat(rows);
  rows.for_parts(valid, [&](Shape part, long i, Validity of_rows) {
    kernels.elemt(dtype, element(dtype, x, i), element(dtype, residual, i), element(dtype, y, i), of_rows,
                  part, k.channels(nullptr), epilogue);
  });
}

template <class A>
void backward_reduce(int dtype, const void* dy, const void* x, const void* gate, void* g, const uint8_t* valid,
                     Shape shape, const double* statistics, const void* weight, const void* bias, void* grad_weight,
                     void* grad_bias, const Epilogue& epilogue, double* sums) {
  const long c = shape.c;
  const Rows rows(shape);
  PerChannel<A> k(statistics, c, weight, bias, epilogue.weight_floor);
  std::vector<double> mean(statistics, statistics + c);
  if (epilogue.in_place()) {
    k.scale = inverse(k.scale);
    // What is recovered from y is x minus the rounded mean; the difference is corrected for.
    for (long i = 0; i < c; ++i) mean[i] = double(k.mean[i]) - statistics[i];
  }
  k.repeat(rows), mean = rows.repeated(std::move(mean));
  rows.sum_parts(valid, sums, [&](Shape part, long i, Validity of_rows, double* of_part) {
    kernels.backward_reduce(dtype, element(dtype, dy, i), element(dtype, x, i), element(dtype, gate, i),
                            element(dtype, g, i), of_rows, part, k.channels(mean.data()), epilogue, of_part);
  });
  A *of_weight = static_cast<A*>(grad_weight), *of_bias = static_cast<A*>(grad_bias);
  for (long i = 0; of_weight && i < c; ++i) of_weight[i] = A(sums[c + i] * statistics[c + i]);
  for (long i = 0; of_bias && i < c; ++i) of_bias[i] = A(sums[i]);
}

template <class A>
void backward_elemt(int dtype, const void* dy, const void* x, void* dx, const uint8_t* valid, Shape shape,
                    const double* statistics, const void* weight, const void* bias, const double* sums,
                    const Epilogue& epilogue) {
  const Rows rows(shape);
  PerChannel<A> k(statistics, shape.c, weight, bias, epilogue.weight_floor);
  const long c = shape.c;
  const double elements = std::max(statistics[2 * c], 1.0);
  std::vector<A> slope(c), mean_dy(c);
  for (long i = 0; i < c; ++i) {
    const double invstd = statistics[c + i], exact = sums[c + i] / elements * (invstd * invstd);
    slope[i] = A(exact);
    // The rounding error of the mean, times slope, is corrected for in the constant term.
    mean_dy[i] = A(sums[i] / elements - (statistics[i] - double(k.mean[i])) * exact);
  }
  slope = rows.repeated(std::move(slope)), mean_dy = rows.repeated(std::move(mean_dy));
  k.repeat(rows);
  const std::vector<A> scale = k.scale;
  if (epilogue.in_place()) k.scale = inverse(k.scale);
  const GradientChannels channels{k.channels(nullptr), slope.data(), mean_dy.data(), scale.data()};
  rows.for_parts(valid, [&](Shape part, long i, Validity of_rows) {
    kernels.backward_elemt(dtype, element(dtype, dy, i), element(dtype, x, i), element(dtype, dx, i), of_rows, part,
                           channels, epilogue);
  });
}

// The number of bytes that are not 0, eight at a time.
long count_valid(const uint8_t* bytes, long length) {
  constexpr uint64_t low = 0x7f7f7f7f7f7f7f7fu, ones = 0x0101010101010101u;
  long count = 0, i = 0;
  for (; i + 8 <= length; i += 8) {
    const uint64_t v = simd::raw<uint64_t>(bytes + i);
    // In each byte its highest bit says whether it is not 0; the product adds those up.
    count += long((((((v & low) + low) | v) & ~low) >> 7) * ones >> 56);
  }
  for (; i < length; ++i) count += bytes[i] != 0;
  return count;
}

// [mean | invstd | count] from the moments of all ranks, in place; updates the running statistics unless count is 0.
void combine(double* moments, long c, const double* center, int running_dtype, void* running_mean, void* running_var,
             int64_t* num_batches_tracked, double momentum, double eps) {
  const double count = moments[2 * c], elements = std::max(count, 1.0);
  std::vector<double> vars(c);
  for (long k = 0; k < c; ++k) {
    const double offset = moments[k] / elements, difference = moments[c + k] / elements - offset * offset;
    moments[k] = center ? center[k] + offset : offset;
    vars[k] = difference < 0 ? 0 : difference;  // rounding can make it negative; a NaN stays
    moments[c + k] = 1 / std::sqrt(vars[k] + eps);
  }
  if (count == 0) return;
  if (num_batches_tracked) ++*num_batches_tracked;
  if (!running_mean) return;
  for (double& var : vars) var *= count / (count - 1);
  update(running_dtype, running_mean, moments, c, momentum);
  update(running_dtype, running_var, vars.data(), c, momentum);
}

// See is_refused in syncbn/kernels/contract.py.
bool is_refused(double count) {
  const bool is_whole = std::isfinite(count) && count == std::floor(count);
  return !(count == 0 || (count > 1 && is_whole));
}

}  // namespace

long cache_bytes = last_level_cache();

const char* syncbn_isa() { return kernels.name; }

long syncbn_set_cache_bytes(long bytes) { return std::exchange(cache_bytes, bytes); }

void syncbn_prefer_huge_pages(void* address, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t page = sysconf(_SC_PAGESIZE), begin = reinterpret_cast<uintptr_t>(address) / page * page;
  // Errors are ignored: where the system has no huge pages for this memory, it uses small ones.
  (void)madvise(reinterpret_cast<void*>(begin), reinterpret_cast<uintptr_t>(address) + bytes - begin, MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

void syncbn_stats(int dtype, long n, long c, long s, const void* x, const uint8_t* valid, const double* center,
                  double* moments) {
  const Rows rows({n, c, s});
  std::vector<double> centers;
  if (center) centers = rows.repeated(std::vector<double>(center, center + c));
  rows.sum_parts(valid, moments, [&](Shape part, long i, Validity of_rows, double* of_part) {
    kernels.stats(dtype, element(dtype, x, i), of_rows, part, center ? centers.data() : nullptr, of_part);
  });
  moments[2 * c] = valid ? double(count_valid(valid, n * s)) : double(n) * double(s);
}

double syncbn_normalise(int dtype, long n, long c, long s, const void* x, const void* residual, void* y,
                        const uint8_t* valid, double* moments, const double* center, const void* weight,
                        const void* bias, void* running_mean, void* running_var, int64_t* num_batches_tracked,
                        int running_dtype, double momentum, double eps, int activation, double slope,
                        double weight_floor) {
  const double count = moments[2 * c];
  if (is_refused(count)) return count;
  combine(moments, c, center, running_dtype, running_mean, running_var, num_batches_tracked, momentum, eps);
  const Epilogue epilogue{activation, slope, weight_floor};
  (dtype == kFloat64 ? elemt<double> : elemt<float>)(dtype, x, residual, y, valid, {n, c, s}, moments, weight, bias,
                                                     epilogue);
  return count;
}

void syncbn_backward_reduce(int dtype, long n, long c, long s, const void* dy, const void* x, const void* gate, void* g,
                            const uint8_t* valid, const double* statistics, const void* weight, const void* bias,
                            void* grad_weight, void* grad_bias, double* sums, int activation, double slope,
                            double weight_floor) {
  const Epilogue epilogue{activation, slope, weight_floor};
  (dtype == kFloat64 ? backward_reduce<double> : backward_reduce<float>)(dtype, dy, x, gate, g, valid, {n, c, s},
                                                                         statistics, weight, bias, grad_weight,
                                                                         grad_bias, epilogue, sums);
}

void syncbn_backward_elemt(int dtype, long n, long c, long s, const void* dy, const void* x, void* dx,
                           const uint8_t* valid, const double* statistics, const void* weight, const void* bias,
                           const double* sums, int activation, double slope, double weight_floor) {
  const Epilogue epilogue{activation, slope, weight_floor};
  (dtype == kFloat64 ? backward_elemt<double> : backward_elemt<float>)(dtype, dy, x, dx, valid, {n, c, s}, statistics,
                                                                       weight, bias, sums, epilogue);
}
