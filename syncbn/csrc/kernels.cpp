// What each kernel computes of an element. The loops over whole arrays are in reduce.h and map.h.
//
// Compiled with -ffp-contract=off: each element-wise operation rounds on its own, as in the other implementations, so that
// results are the same bits whichever instruction set computed them, in vectors or in scalars.
#include "kernels.h"

#include "activations.h"
#include "map.h"
#include "mask.h"
#include "reduce.h"

namespace {

using simd::keep;
using simd::load;
using simd::load_half;
using simd::load_pair;
using simd::load_valid;
using simd::Pair;

// The type of sums of elements of type T: float64, with as many lanes as the element-wise arithmetic.
template <class T> using SumsOf = std::conditional_t<std::is_same_v<T, double>, simd::Double, simd::Doubles>;
template <class T> struct Accumulate { using type = float; using vector = simd::Float; };
template <> struct Accumulate<double> { using type = double; using vector = simd::Double; };
template <class T> using A = typename Accumulate<T>::type;

// The type of the element-wise arithmetic of which sums of type D are taken.
template <class T, class D> struct Elementwise { using type = typename simd::Narrow<D>::type; };
template <class D> struct Elementwise<double, D> { using type = D; };

template <class V, class S> inline V splat(S value) {
  if constexpr (simd::Lanes<V>::value == 1) return V(value);
  else if constexpr (std::is_same_v<V, simd::Doubles>) return {splat<simd::Double>(value), splat<simd::Double>(value)};
  else return value - V{};  // not value + V{}, which would turn -0 into 0
}

// ---- stats --------------------------------------------------------------------------------------------------------

// Sums of x - center and of its square.
template <class T> struct Moments {
  using Sums = SumsOf<T>;
  const T* x;
  const double* center;
  template <class D> D channel(long c) const { return splat<D>(center ? center[c] : 0.0); }
  template <class D> D channels(long c) const { return center ? load<D>(center + c) : D{}; }
  template <int kCount> SYNCBN_INLINE void prefetch(long i) const { simd::prefetch<kCount>(x + i); }
  template <class D, class Valid> SYNCBN_INLINE Factors<D> at(long i, const D& center_c, Valid valid) const {
    const D v = keep(load<D>(x + i) - center_c, valid);
    return {v, v};
  }
};

// The same without a center, for dtypes whose squares are exact in float64.
template <class T> struct RawMoments {
  using Sums = SumsOf<T>;
  const T* x;
  template <class D> struct Nothing {};
  template <class D> Nothing<D> channel(long) const { return {}; }
  template <class D> Nothing<D> channels(long) const { return {}; }
  template <int kCount> SYNCBN_INLINE void prefetch(long i) const { simd::prefetch<kCount>(x + i); }
  template <class D, class Valid> SYNCBN_INLINE Factors<D> at(long i, Nothing<D>, Valid valid) const {
    const D v = load_valid<D>(x + i, valid);
    return {v, v};
  }
};

// ---- element-wise, forward: z = (x - mean) * scale + bias ----------------------------------------------------------

template <class V> struct Affine {
  V mean, scale, bias;
  V operator()(V x) const { return (x - mean) * scale + bias; }
};

template <class T> struct AffineOf {
  const A<T>*mean, *scale, *bias;
  explicit AffineOf(const Channels& k)
      : mean((const A<T>*)k.mean), scale((const A<T>*)k.scale), bias((const A<T>*)k.bias) {}
  template <class V> Affine<V> channel(long c) const { return {splat<V>(mean[c]), splat<V>(scale[c]), splat<V>(bias[c])}; }
  template <class V> Affine<V> channels(long c) const { return {load<V>(mean + c), load<V>(scale + c), load<V>(bias + c)}; }
  template <class V, bool kSecond> Affine<V> half(long c) const {
    const auto of = [c](const A<T>* v) { return load_half<T, kSecond, V>(v + c); };
    return {of(mean), of(scale), of(bias)};
  }
};

// y = activation(z + residual)
template <class T, class Activation, bool kResidual> struct Normalise {
  const T *x, *residual;
  T* out;
  AffineOf<T> affine;
  Activation activation;
  bool streaming;
  template <class V> Affine<V> channel(long c) const { return affine.template channel<V>(c); }
  template <class V> Affine<V> channels(long c) const { return affine.template channels<V>(c); }
  template <class V, bool kSecond> Affine<V> half(long c) const { return affine.template half<V, kSecond>(c); }
  template <int kCount> SYNCBN_INLINE void prefetch(long i) const {
    simd::prefetch<kCount>(x + i);
    if constexpr (kResidual) simd::prefetch<kCount>(residual + i);
  }
  template <class V, class Valid> SYNCBN_INLINE void put(long i, const Affine<V>& k, Valid valid) const {
    V z = k(load<V>(x + i));
    if constexpr (kResidual) z = z + load<V>(residual + i);
    simd::put(keep(activation.forward(z), valid), out + i, streaming);
  }
  template <class V, class Valid>
  SYNCBN_INLINE void put_pair(long i, const Affine<V>& k, const Affine<V>& l, Valid valid) const {
    const Pair<V> v = load_pair<V>(x + i);
    Pair<V> z{k(v.first), l(v.second)};
    if constexpr (kResidual) {
      const Pair<V> r = load_pair<V>(residual + i);
      z = {z.first + r.first, z.second + r.second};
    }
    simd::put_pair(Pair<V>{activation.forward(z.first), activation.forward(z.second)}, out + i, streaming, valid);
  }
};

// ---- backward -----------------------------------------------------------------------------------------------------

// What g, the gradient of z, and x - mean are computed from.
//
// kPlain: there is no activation, so g is dy. kFromX: z is computed again from x. kGated: after a residual, z takes a
// second array, `gate`: the residual, or (relu, leaky_relu) y, which has the sign of z; g is written. kFromY: in place, y
// has overwritten x, and z and x - mean are recovered from y.
enum class Source { kPlain, kFromX, kGated, kFromY };

template <class V> struct Terms { V g, xmu; };

template <class T, class Activation, Source kSource> struct Differentiate {
  const T *dy, *x, *gate;
  AffineOf<T> affine;
  Activation activation;
  template <int kCount> SYNCBN_INLINE void prefetch(long i) const {
    simd::prefetch<kCount>(dy + i), simd::prefetch<kCount>(x + i);
    if constexpr (kSource == Source::kGated) simd::prefetch<kCount>(gate + i);
  }
  // From one element of dy (g), x (v) and gate (other).
  template <class V> SYNCBN_INLINE Terms<V> of(V g, V v, [[maybe_unused]] V other, const Affine<V>& k) const {
    if constexpr (kSource == Source::kPlain) {
      return {g, v - k.mean};
    } else if constexpr (kSource == Source::kFromY) {
      // In place, k.scale is the inverse of forward's.
      return {activation.backward(g, v), (activation.inverse(v) - k.bias) * k.scale};
    } else if constexpr (kSource == Source::kGated) {
      return {activation.backward(g, activation.gate_is_output() ? other : k(v) + other), v - k.mean};
    } else {
      return {activation.backward(g, k(v)), v - k.mean};
    }
  }
  template <class V> SYNCBN_INLINE Terms<V> operator()(long i, const Affine<V>& k) const {
    if constexpr (kSource == Source::kGated) return of(load<V>(dy + i), load<V>(x + i), load<V>(gate + i), k);
    else return of(load<V>(dy + i), load<V>(x + i), V{}, k);
  }
  template <class V> SYNCBN_INLINE Pair<Terms<V>> pair(long i, const Affine<V>& k, const Affine<V>& l) const {
    const Pair<V> g = load_pair<V>(dy + i), v = load_pair<V>(x + i);
    Pair<V> other{};
    if constexpr (kSource == Source::kGated) other = load_pair<V>(gate + i);
    return {of(g.first, v.first, other.first, k), of(g.second, v.second, other.second, l)};
  }
};

// Sums of g and of g * (x - mean).
template <class T, class Activation, Source kSource> struct BackwardSums {
  using Sums = SumsOf<T>;
  Differentiate<T, Activation, kSource> terms;
  T* g;
  const double* mean;
  template <class D> struct Constants {
    D mean;
    Affine<typename Elementwise<T, D>::type> affine;
  };
  template <class D> Constants<D> channel(long c) const {
    using V = typename Elementwise<T, D>::type;
    return {splat<D>(mean[c]), terms.affine.template channel<V>(c)};
  }
  template <class D> Constants<D> channels(long c) const {
    using V = typename Elementwise<T, D>::type;
    return {load<D>(mean + c), terms.affine.template channels<V>(c)};
  }
  template <int kCount> SYNCBN_INLINE void prefetch(long i) const { terms.template prefetch<kCount>(i); }
  template <class D, class Valid> SYNCBN_INLINE Factors<D> at(long i, const Constants<D>& k, Valid valid) const {
    if constexpr (kSource == Source::kPlain) {
      return {load_valid<D>(terms.dy + i, valid), keep(load<D>(terms.x + i) - k.mean, valid)};
    } else {
      using V = typename Elementwise<T, D>::type;
      const Terms<V> t = terms(i, k.affine);
      const V kept = keep(t.g, valid);
      if constexpr (kSource == Source::kGated) simd::store(kept, g + i);
      // In place, k.mean is the rounded mean minus the exact one.
      if constexpr (kSource == Source::kFromY) return {simd::widen(kept), keep(simd::widen(t.xmu) + k.mean, valid)};
      else return {simd::widen(kept), keep(load<D>(terms.x + i) - k.mean, valid)};
    }
  }
};

template <class V> struct Gradient {
  Affine<V> affine;
  V slope, mean_dy, scale;
};

// dx = (g - (x - mean) * slope - mean_dy) * scale
template <class T, class Activation, Source kSource> struct InputGradient {
  Differentiate<T, Activation, kSource> terms;
  T* out;
  const A<T>*slope, *mean_dy, *scale;
  bool streaming;
  template <class V> Gradient<V> channel(long c) const {
    return {terms.affine.template channel<V>(c), splat<V>(slope[c]), splat<V>(mean_dy[c]), splat<V>(scale[c])};
  }
  template <class V> Gradient<V> channels(long c) const {
    return {terms.affine.template channels<V>(c), load<V>(slope + c), load<V>(mean_dy + c), load<V>(scale + c)};
  }
  template <class V, bool kSecond> Gradient<V> half(long c) const {
    const auto of = [c](const A<T>* v) { return load_half<T, kSecond, V>(v + c); };
    return {terms.affine.template half<V, kSecond>(c), of(slope), of(mean_dy), of(scale)};
  }
  template <int kCount> SYNCBN_INLINE void prefetch(long i) const { terms.template prefetch<kCount>(i); }
  template <class V, class Valid> SYNCBN_INLINE void put(long i, const Gradient<V>& k, Valid valid) const {
    simd::put(keep(of(terms(i, k.affine), k), valid), out + i, streaming);
  }
  template <class V, class Valid>
  SYNCBN_INLINE void put_pair(long i, const Gradient<V>& k, const Gradient<V>& l, Valid valid) const {
    const Pair<Terms<V>> t = terms.pair(i, k.affine, l.affine);
    simd::put_pair(Pair<V>{of(t.first, k), of(t.second, l)}, out + i, streaming, valid);
  }
  template <class V> static SYNCBN_INLINE V of(const Terms<V>& t, const Gradient<V>& k) {
    return (t.g - t.xmu * k.slope - k.mean_dy) * k.scale;
  }
};

// ---- from run-time arguments to types -----------------------------------------------------------------------------

template <class T, class Op, class M> void map_as(const Op& op, const M& mask, Shape shape, int arrays) {
  map<typename Accumulate<T>::vector, A<T>>(op, mask, shape, arrays * shape.size() * long(sizeof(T)));
}

// The rows of a single channel are one long row.
Shape row_of(Shape x) { return x.c == 1 ? Shape{1, 1, x.n * x.s} : x; }

// Calls f(T{}) for the type that dtype stands for.
template <class F> void with_type(int dtype, const F& f) {
  switch (dtype) {
    case kFloat64: return f(double{});
    case kFloat32: return f(float{});
    case kBfloat16: return f(simd::bfloat16{});
    case kFloat16: return f(simd::float16{});
  }
}

// Calls f(activation) for the activation of an epilogue.
template <class M, class F> void with_activation(Epilogue epilogue, const M&, const F& f) {
  if constexpr (std::is_same_v<M, Mask>)
    return epilogue.activation == kNone ? f(Identity{}) : f(AnyActivation(epilogue));
  else switch (epilogue.activation) {
    case kNone: return f(Identity{});
    case kLeakyRelu: return epilogue.slope != 0 ? f(LeakyRelu(epilogue.slope)) : f(Relu{});
    case kSilu: return f(Silu{});
  }
}

void stats(int dtype, const void* x, Validity valid, Shape shape, const double* center, double* sums) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    with_mask(valid, shape, [&](const auto& mask) {
      if constexpr (!std::is_same_v<T, double>) {
        if (!center) return reduce(RawMoments<T>{(const T*)x}, mask, row_of(shape), sums);
      }
      reduce(Moments<T>{(const T*)x, center}, mask, row_of(shape), sums);
    });
  });
}

void elemt(int dtype, const void* x, const void* residual, void* y, Validity valid, Shape shape, const Channels& k,
           Epilogue epilogue) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    with_mask(valid, shape, [&](const auto& mask) {
      with_activation(epilogue, mask, [&](auto activation) {
        using F = decltype(activation);
        const T *in = (const T*)x, *other = (const T*)residual;
        const AffineOf<T> affine(k);
        const bool separate = x != y;
        const Shape row = row_of(shape);
        if (residual) map_as<T>(Normalise<T, F, true>{in, other, (T*)y, affine, activation, separate}, mask, row, 3);
        else map_as<T>(Normalise<T, F, false>{in, other, (T*)y, affine, activation, separate}, mask, row, 2);
      });
    });
  });
}

// Calls f(differentiate) with the Source that an epilogue and a gate, possible only if kMayGate, ask for.
template <class T, bool kMayGate, class M, class F>
void with_source(const void* dy, const void* x, const void* gate, const M& mask, const Channels& k, Epilogue epilogue,
                 const F& f) {
  const T *d = (const T*)dy, *in = (const T*)x, *other = (const T*)gate;
  const AffineOf<T> affine(k);
  if (epilogue.in_place()) {  // no activation is a leaky_relu of slope 1
    const LeakyRelu activation(epilogue.activation == kNone ? 1.0 : epilogue.slope);
    return f(Differentiate<T, LeakyRelu, Source::kFromY>{d, in, other, affine, activation});
  }
  with_activation(epilogue, mask, [&](auto activation) {
    using Act = decltype(activation);
    if constexpr (std::is_same_v<Act, Identity>) {
      f(Differentiate<T, Act, Source::kPlain>{d, in, other, affine, activation});
    } else {
      if constexpr (kMayGate) {
        if (gate) return f(Differentiate<T, Act, Source::kGated>{d, in, other, affine, activation});
      }
      f(Differentiate<T, Act, Source::kFromX>{d, in, other, affine, activation});
    }
  });
}

template <class T, class Act, Source kSource>
BackwardSums<T, Act, kSource> sums_of(const Differentiate<T, Act, kSource>& terms, void* g, const double* mean) {
  return {terms, (T*)g, mean};
}

template <class T, class Act, Source kSource>
InputGradient<T, Act, kSource> gradient_of(const Differentiate<T, Act, kSource>& terms, void* dx, const void* slope,
                                           const void* mean_dy, const void* scale) {
  const bool separate = dx != terms.x && dx != terms.dy;
  return {terms, (T*)dx, (const A<T>*)slope, (const A<T>*)mean_dy, (const A<T>*)scale, separate};
}

void backward_reduce(int dtype, const void* dy, const void* x, const void* gate, void* g, Validity valid,
                     Shape shape, const Channels& k, Epilogue epilogue, double* sums) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    with_mask(valid, shape, [&](const auto& mask) {
      with_source<T, true>(dy, x, gate, mask, k, epilogue, [&](const auto& terms) {
        reduce(sums_of(terms, g, k.exact_mean), mask, row_of(shape), sums);
      });
    });
  });
}

void backward_elemt(int dtype, const void* dy, const void* x, void* dx, Validity valid, Shape shape,
                    const GradientChannels& k, Epilogue epilogue) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    with_mask(valid, shape, [&](const auto& mask) {
      with_source<T, false>(dy, x, nullptr, mask, k.forward, epilogue, [&](const auto& terms) {
        map_as<T>(gradient_of(terms, dx, k.slope, k.mean_dy, k.scale), mask, row_of(shape), 3);
      });
    });
  });
}

}  // namespace

#define SYNCBN_JOIN(a, b) a##b
#define SYNCBN_NAME(isa) SYNCBN_JOIN(kernels_, isa)
#define SYNCBN_STRING(isa) SYNCBN_QUOTE(isa)
#define SYNCBN_QUOTE(isa) #isa
extern const Kernels SYNCBN_NAME(SYNCBN_ISA);
const Kernels SYNCBN_NAME(SYNCBN_ISA) = {stats, elemt, backward_reduce, backward_elemt, SYNCBN_STRING(SYNCBN_ISA)};
