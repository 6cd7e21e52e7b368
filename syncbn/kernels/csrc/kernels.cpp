// The operations of the kernels; how they go through memory is in drivers.h.
//
// Compiled with -ffp-contract=off: each element-wise operation rounds on its own, as in the other implementations, so that
// results are the same bits whichever instruction set, vector body or tail computed them.
#include "kernels.h"

#include "drivers.h"

namespace {

using simd::load;

template <class T> struct Accumulate { using type = float; using vector = simd::Float; };
template <> struct Accumulate<double> { using type = double; using vector = simd::Double; };

template <class V, class A> inline V splat(A value) {
  if constexpr (simd::Lanes<V>::value == 1) return V(value);
  else return V{} + value;
}

// Sums of x - center and of its square.
template <class T> struct Moments {
  const T* x;
  const double* center;
  template <class D> D channel(long c) const { return splat<D>(center ? center[c] : 0.0); }
  template <class D> D channels(long c) const { return center ? load<D>(center + c) : D{}; }
  template <class D> void add(long i, const D& center_c, D& sum, D& squares) const {
    const D v = load<D>(x + i) - center_c;
    sum += v;
    squares += v * v;
  }
};

// Sums of dy and of dy * (x - mean).
template <class T> struct BackwardSums {
  const T *dy, *x;
  const double* mean;
  template <class D> D channel(long c) const { return splat<D>(mean[c]); }
  template <class D> D channels(long c) const { return load<D>(mean + c); }
  template <class D> void add(long i, const D& mean_c, D& sum_dy, D& sum_dy_xmu) const {
    const D g = load<D>(dy + i);
    sum_dy += g;
    sum_dy_xmu += g * (load<D>(x + i) - mean_c);
  }
};

template <class V> struct Affine { V mean, scale, bias; };

// y = (x - mean) * scale + bias
template <class T> struct Normalise {
  using A = typename Accumulate<T>::type;
  const T* x;
  T* y;
  const A *mean, *scale, *bias;
  template <class V> Affine<V> channel(long c) const {
    return {splat<V>(mean[c]), splat<V>(scale[c]), splat<V>(bias ? bias[c] : A(0))};
  }
  template <class V> Affine<V> channels(long c) const {
    return {load<V>(mean + c), load<V>(scale + c), bias ? load<V>(bias + c) : V{}};
  }
  template <class V> void put(long i, const Affine<V>& k) const {
    simd::store((load<V>(x + i) - k.mean) * k.scale + k.bias, y + i);
  }
};

template <class V> struct Gradient { V mean, slope, mean_dy, scale; };

// dx = (dy - (x - mean) * slope - mean_dy) * scale
template <class T> struct InputGradient {
  using A = typename Accumulate<T>::type;
  const T *dy, *x;
  T* dx;
  const A *mean, *slope, *mean_dy, *scale;
  template <class V> Gradient<V> channel(long c) const {
    return {splat<V>(mean[c]), splat<V>(slope[c]), splat<V>(mean_dy[c]), splat<V>(scale[c])};
  }
  template <class V> Gradient<V> channels(long c) const {
    return {load<V>(mean + c), load<V>(slope + c), load<V>(mean_dy + c), load<V>(scale + c)};
  }
  template <class V> void put(long i, const Gradient<V>& k) const {
    const V t = (load<V>(x + i) - k.mean) * k.slope;
    simd::store((load<V>(dy + i) - t - k.mean_dy) * k.scale, dx + i);
  }
};

template <class Op, class T> void map_as(const Op& op, Shape shape) {
  map<typename Accumulate<T>::vector, typename Accumulate<T>::type>(op, shape);
}

// One channel of many rows is one row.
Shape shape_of(long n, long c, long s) { return c == 1 ? Shape{1, 1, n * s} : Shape{n, c, s}; }

// Calls f(T{}) for the type that dtype stands for.
template <class F> void with_type(int dtype, const F& f) {
  switch (dtype) {
    case kFloat64: return f(double{});
    case kFloat32: return f(float{});
    case kBfloat16: return f(simd::bfloat16{});
    case kFloat16: return f(simd::float16{});
  }
}

void stats(int dtype, const void* x, long n, long c, long s, const double* center, double* moments) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    reduce(Moments<T>{(const T*)x, center}, shape_of(n, c, s), moments);
  });
  moments[2 * c] = double(n) * double(s);
}

void elemt(int dtype, const void* x, void* y, long n, long c, long s, const void* mean, const void* scale,
           const void* bias) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    using A = typename Accumulate<T>::type;
    using Op = Normalise<T>;
    map_as<Op, T>(Op{(const T*)x, (T*)y, (const A*)mean, (const A*)scale, (const A*)bias}, shape_of(n, c, s));
  });
}

void backward_reduce(int dtype, const void* dy, const void* x, long n, long c, long s, const double* mean, double* sums) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    reduce(BackwardSums<T>{(const T*)dy, (const T*)x, mean}, shape_of(n, c, s), sums);
  });
}

void backward_elemt(int dtype, const void* dy, const void* x, void* dx, long n, long c, long s, const void* mean,
                    const void* slope, const void* mean_dy, const void* scale) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    using A = typename Accumulate<T>::type;
    using Op = InputGradient<T>;
    const Op op{(const T*)dy, (const T*)x, (T*)dx, (const A*)mean, (const A*)slope, (const A*)mean_dy, (const A*)scale};
    map_as<Op, T>(op, shape_of(n, c, s));
  });
}

}  // namespace

#define SYNCBN_JOIN(a, b) a##b
#define SYNCBN_NAME(isa) SYNCBN_JOIN(kernels_, isa)
#define SYNCBN_STRING(isa) SYNCBN_QUOTE(isa)
#define SYNCBN_QUOTE(isa) #isa
extern const Kernels SYNCBN_NAME(SYNCBN_ISA);
const Kernels SYNCBN_NAME(SYNCBN_ISA) = {stats, elemt, backward_reduce, backward_elemt, SYNCBN_STRING(SYNCBN_ISA)};
