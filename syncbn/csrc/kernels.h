// The loops of the kernels over whole arrays, which are compiled once per instruction set.
#pragma once

#include <cstdint>

enum Dtype : int { kFloat64 = 0, kFloat32 = 1, kBfloat16 = 2, kFloat16 = 3 };

struct Shape {
  long n, c, s;
  long size() const { return n * c * s; }
};

constexpr long kGrouped = 256;  // elements of short rows that are taken together, at most

// Which positions are valid: (n, s) bytes, or null for all. Where short rows are taken together, each row of the shape
// has `together` of them.
struct Validity {
  const uint8_t* bytes;
  long together;
};

// relu is a leaky_relu of slope 0.
enum Activation : int { kNone = 0, kLeakyRelu = 1, kSilu = 2 };
// Activation and in-place work, fused into forward and backward; see syncbn/kernels/epilogue.py.
struct Epilogue {
  int activation;
  double slope;         // of leaky_relu
  double weight_floor;  // in place: weights closer to 0 count as that far from it; 0 where not in place
  bool in_place() const { return weight_floor > 0; }  // backward then gets y in place of x
};

// Constants per channel. Those given as void are of the accumulate dtype: double for kFloat64, else float. A missing bias
// is -0: adding it changes no value, not even the sign of a zero.
struct Channels {
  const double* exact_mean;
  const void *mean, *scale, *bias;
};
struct GradientChannels {
  Channels forward;
  const void *slope, *mean_dy, *scale;  // scale is forward's; in place, forward.scale is its inverse
};

// One instruction set's. Arrays are contiguous.
struct Kernels {
  void (*stats)(int dtype, const void* x, Validity valid, Shape shape, const double* center, double* sums);
  void (*elemt)(int dtype, const void* x, const void* residual, void* y, Validity valid, Shape shape,
                const Channels& channels, Epilogue epilogue);
  void (*backward_reduce)(int dtype, const void* dy, const void* x, const void* gate, void* g, Validity valid,
                          Shape shape, const Channels& channels, Epilogue epilogue, double* sums);
  void (*backward_elemt)(int dtype, const void* dy, const void* x, void* dx, Validity valid, Shape shape,
                         const GradientChannels& channels, Epilogue epilogue);
  const char* name;
};

extern long cache_bytes;  // the size of the last-level cache
extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;
