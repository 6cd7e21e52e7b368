// The C interface of the CPU kernels: the instruction set is picked at load; what is per channel is done here.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace {

const Kernels& pick() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return kernels_avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return kernels_avx2;
#endif
  return kernels_baseline;
}

const Kernels& kernels = pick();

// running += momentum * (batch - running), in the buffers' own dtype.
template <class T> void update(void* running, const std::vector<double>& batch, double momentum) {
  T* p = static_cast<T*>(running);
  for (size_t i = 0; i < batch.size(); ++i) {
    const double old = simd::widen(p[i]), updated = old + momentum * (batch[i] - old);
    if constexpr (std::is_same_v<T, double>) p[i] = updated;
    else simd::narrow(float(updated), p + i);
  }
}

void update(int dtype, void* running, const std::vector<double>& batch, double momentum) {
  switch (dtype) {
    case kFloat64: return update<double>(running, batch, momentum);
    case kFloat32: return update<float>(running, batch, momentum);
    case kBfloat16: return update<simd::bfloat16>(running, batch, momentum);
    case kFloat16: return update<simd::float16>(running, batch, momentum);
  }
}

// invstd * weight, in the accumulate dtype A.
template <class A> std::vector<A> scale_of(const void* invstd, const void* weight, long c) {
  const A *i = static_cast<const A*>(invstd), *w = static_cast<const A*>(weight);
  std::vector<A> scale(i, i + c);
  if (w) for (long k = 0; k < c; ++k) scale[k] *= w[k];
  return scale;
}

template <class A>
void elemt(int dtype, const void* x, void* y, long n, long c, long s, const double* mean, const void* invstd,
           const void* weight, const void* bias) {
  const std::vector<A> rounded(mean, mean + c), scale = scale_of<A>(invstd, weight, c);
  kernels.elemt(dtype, x, y, n, c, s, rounded.data(), scale.data(), bias);
}

template <class A>
void backward_elemt(int dtype, const void* dy, const void* x, void* dx, long n, long c, long s, const double* mean,
                    const void* invstd, double count, const void* weight, const double* sums) {
  const A* i = static_cast<const A*>(invstd);
  const double elements = std::max(count, 1.0);
  const std::vector<A> rounded(mean, mean + c), scale = scale_of<A>(invstd, weight, c);
  std::vector<A> slope(c), mean_dy(c);
  for (long k = 0; k < c; ++k) {
    const double exact = sums[c + k] / elements * (double(i[k]) * double(i[k]));
    slope[k] = A(exact);
    // What the rounding of the mean adds to x - mean goes, times slope, into the constant term.
    mean_dy[k] = A(sums[k] / elements - (mean[k] - double(rounded[k])) * exact);
  }
  kernels.backward_elemt(dtype, dy, x, dx, n, c, s, rounded.data(), slope.data(), mean_dy.data(), scale.data());
}

}  // namespace

#define SYNCBN_API extern "C" __attribute__((visibility("default")))

SYNCBN_API const char* syncbn_isa() { return kernels.name; }

SYNCBN_API void syncbn_stats(int dtype, const void* x, long n, long c, long s, const double* center, double* moments) {
  kernels.stats(dtype, x, n, c, s, center, moments);
}

SYNCBN_API void syncbn_combine(const double* moments, const double* center, long c, int dtype, double* mean,
                               void* invstd, int running_dtype, void* running_mean, void* running_var, double momentum,
                               double eps) {
  const double count = moments[2 * c], elements = std::max(count, 1.0);
  std::vector<double> means(c), vars(c);
  for (long k = 0; k < c; ++k) {
    const double offset = moments[k] / elements, difference = moments[c + k] / elements - offset * offset;
    mean[k] = means[k] = center ? center[k] + offset : offset;
    vars[k] = difference < 0 ? 0 : difference;  // rounding; a NaN stays
    const double inverse = 1 / std::sqrt(vars[k] + eps);
    if (dtype == kFloat64) static_cast<double*>(invstd)[k] = inverse;
    else static_cast<float*>(invstd)[k] = float(inverse);
  }
  if (!running_mean || !(count > 1)) return;
  for (double& var : vars) var *= count / (count - 1);
  update(running_dtype, running_mean, means, momentum);
  update(running_dtype, running_var, vars, momentum);
}

SYNCBN_API void syncbn_elemt(int dtype, const void* x, void* y, long n, long c, long s, const double* mean,
                             const void* invstd, const void* weight, const void* bias) {
  (dtype == kFloat64 ? elemt<double> : elemt<float>)(dtype, x, y, n, c, s, mean, invstd, weight, bias);
}

SYNCBN_API void syncbn_backward_reduce(int dtype, const void* dy, const void* x, long n, long c, long s,
                                       const double* mean, double* sums) {
  kernels.backward_reduce(dtype, dy, x, n, c, s, mean, sums);
}

SYNCBN_API void syncbn_backward_elemt(int dtype, const void* dy, const void* x, void* dx, long n, long c, long s,
                                      const double* mean, const void* invstd, const double* count, const void* weight,
                                      const double* sums) {
  (dtype == kFloat64 ? backward_elemt<double> : backward_elemt<float>)(dtype, dy, x, dx, n, c, s, mean, invstd, *count,
                                                                       weight, sums);
}
