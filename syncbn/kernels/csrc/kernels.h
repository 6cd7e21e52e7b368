// The kernels of the contract in syncbn/kernels/__init__.py, on raw addresses. Compiled once per instruction set.
#pragma once

#include <cstdint>

enum Dtype : int { kFloat64 = 0, kFloat32 = 1, kBfloat16 = 2, kFloat16 = 3 };

// Arrays are contiguous, (n, c, s) and (c,). Constants per channel given as void are of the accumulate dtype: double for
// kFloat64, else float. center and bias may be null.
struct Kernels {
  void (*stats)(int dtype, const void* x, long n, long c, long s, const double* center, double* moments);
  void (*elemt)(int dtype, const void* x, void* y, long n, long c, long s, const void* mean, const void* scale,
                const void* bias);
  void (*backward_reduce)(int dtype, const void* dy, const void* x, long n, long c, long s, const double* mean,
                          double* sums);
  void (*backward_elemt)(int dtype, const void* dy, const void* x, void* dx, long n, long c, long s, const void* mean,
                         const void* slope, const void* mean_dy, const void* scale);
  const char* name;
};

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;
