// The C interface of the CPU kernels: the contract of syncbn/kernels/__init__.py on raw addresses.
//
// Arrays are (n, c, s), contiguous, of the dtype (see kernels.h); vectors have c elements. weight, bias, grad_weight and
// grad_bias are of the accumulate dtype: double for kFloat64, else float. moments and statistics have 2c + 1 doubles, sums
// 2c; `valid`, the mask, n * s bytes. Except for x, y, dy, dx, moments, statistics and sums, addresses may be null. `activation`, `slope` and
// `weight_floor` are the epilogue; a weight_floor above 0 says that it works in place.
#pragma once

#include <cstddef>
#include <cstdint>

#define SYNCBN_API extern "C" __attribute__((visibility("default")))

// Writes this rank's moments.
SYNCBN_API void syncbn_stats(int dtype, long n, long c, long s, const void* x, const uint8_t* valid,
                             const double* center, double* moments);

// Turns the moments of all ranks into statistics, in place, updates the running statistics, of `running_dtype`, and writes
// y; returns the count. Writes nothing where it refuses the count: one that is neither 0 nor a whole number above 1.
SYNCBN_API double syncbn_normalise(int dtype, long n, long c, long s, const void* x, const void* residual, void* y,
                                   const uint8_t* valid, double* moments, const double* center, const void* weight,
                                   const void* bias, void* running_mean, void* running_var,
                                   int64_t* num_batches_tracked, int running_dtype, double momentum, double eps,
                                   int activation, double slope, double weight_floor);

// Writes this rank's sums, and the gradients of weight and bias; with a gate, g as well.
SYNCBN_API void syncbn_backward_reduce(int dtype, long n, long c, long s, const void* dy, const void* x,
                                       const void* gate, void* g, const uint8_t* valid, const double* statistics,
                                       const void* weight, const void* bias, void* grad_weight, void* grad_bias,
                                       double* sums, int activation, double slope, double weight_floor);

// Writes dx from the sums of all ranks.
SYNCBN_API void syncbn_backward_elemt(int dtype, long n, long c, long s, const void* dy, const void* x, void* dx,
                                      const uint8_t* valid, const double* statistics, const void* weight,
                                      const void* bias, const double* sums, int activation, double slope,
                                      double weight_floor);

// Returns the name of the instruction set in use.
SYNCBN_API const char* syncbn_isa();

// Sets the size from which results are written past the caches, and returns the one before. For tests.
SYNCBN_API long syncbn_set_cache_bytes(long bytes);

// Asks the system for huge pages for memory that has not been touched yet: one page fault then clears 2 MB, not 4 KB.
SYNCBN_API void syncbn_prefer_huge_pages(void* address, size_t bytes);
