// The kernels of the contract in syncbn/kernels/__init__.py, on raw addresses. Compiled once per instruction set.
#pragma once

enum Dtype : int { kFloat64 = 0, kFloat32 = 1, kBfloat16 = 2, kFloat16 = 3 };

struct Shape {
  long n, c, s;
  long size() const { return n * c * s; }
};

// What follows the affine step. relu is a leaky_relu of slope 0.
enum Activation : int { kNone = 0, kLeakyRelu = 1, kSilu = 2 };
struct Tail {
  int activation;
  double slope;   // of leaky_relu
  bool in_place;  // backward gets y where it otherwise gets x
};

// Constants per channel. Those given as void are of the accumulate dtype: double for kFloat64, else float. Without a
// bias it is -0, which changes nothing.
struct Channels {
  const double* exact_mean;
  const void *mean, *scale, *bias;
};
struct GradientChannels {
  Channels forward;
  const void *slope, *mean_dy, *scale;  // scale again, for in place forward.scale is its inverse
};

// Arrays are contiguous, of that shape.
struct Kernels {
  void (*stats)(int dtype, const void* x, Shape shape, const double* center, double* sums);
  void (*elemt)(int dtype, const void* x, const void* residual, void* y, Shape shape, const Channels& channels, Tail tail);
  void (*backward_reduce)(int dtype, const void* dy, const void* x, const void* gate, void* g, Shape shape,
                          const Channels& channels, Tail tail, double* sums);
  void (*backward_elemt)(int dtype, const void* dy, const void* x, void* dx, Shape shape, const GradientChannels& channels,
                         Tail tail);
  const char* name;
};

extern long cache_bytes;  // of the last level
extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;
