// The activations: forward(z), and backward(g, z), which returns g * forward'(z).
//
// The backward of Relu and LeakyRelu needs only the sign of z: y, which has the same sign, serves as well.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

struct Identity {
  template <class V> V forward(V z) const { return z; }
  template <class V> V backward(V g, V) const { return g; }
};

struct Relu {
  static constexpr bool gate_is_output() { return true; }
  // A bit mask: multiplying infinity or NaN by 0 would give NaN.
  template <class V, class M> static V keep(V v, M mask) {
    typedef typename simd::Bits<V>::Same U;
    if constexpr (simd::Lanes<V>::value == 1) return mask ? v : V(0);
    else return simd::bits_of<V>(simd::bits_of<U>(v) & U(mask));
  }
  template <class V> V forward(V z) const { return keep(z, !(z < 0)); }
  template <class V> V backward(V g, V z) const { return keep(g, !(z <= 0)); }  // g where z is NaN, as in torch
};

struct LeakyRelu {
  static constexpr bool gate_is_output() { return true; }
  float slope_f, inverse_f;
  double slope_d, inverse_d;
  explicit LeakyRelu(double slope)
      : slope_f(float(slope)), inverse_f(float(1 / slope)), slope_d(slope), inverse_d(1 / slope) {}
  template <class V> V below(V v) const {
    typedef typename simd::Bits<V>::Scalar S;
    return v * (sizeof(S) == 8 ? S(slope_d) : S(slope_f));
  }
  template <class V> V forward(V z) const { return z < 0 ? below(z) : z; }
  template <class V> V backward(V g, V z) const { return z <= 0 ? below(g) : g; }
  template <class V> V inverse(V y) const {
    typedef typename simd::Bits<V>::Scalar S;
    return y < 0 ? y * (sizeof(S) == 8 ? S(inverse_d) : S(inverse_f)) : y;
  }
};

struct Silu {
  static constexpr bool gate_is_output() { return false; }
  // Below -88 silu(z) is less than 1e-35 anyway, and exp would leave its range.
  template <class V> static V bounded(V z) {
    typedef typename simd::Bits<V>::Scalar S;
    return z < S(-88) ? V{} - S(88) : z;
  }
  template <class V> static V sigmoid(V z) {
    const V one = V{} + typename simd::Bits<V>::Scalar(1);
    return one / (one + simd::exp(-z));
  }
  template <class V> V forward(V z) const {
    z = bounded(z);
    return z * sigmoid(z);
  }
  template <class V> V backward(V g, V z) const {
    z = bounded(z);
    const V one = V{} + typename simd::Bits<V>::Scalar(1), p = sigmoid(z);
    return g * (p * (one + z * (one - p)));
  }
};

// Any of these, chosen at run time, and the longest of them called, not inlined: for masked arrays, so that compiling takes
// half as long.
struct AnyActivation {
  bool is_silu, is_relu;
  LeakyRelu leaky;
  explicit AnyActivation(Epilogue epilogue)
      : is_silu(epilogue.activation == kSilu), is_relu(epilogue.slope == 0), leaky(epilogue.slope) {}
  bool gate_is_output() const { return !is_silu; }
  template <class V> static __attribute__((noinline)) V silu(V z) { return Silu{}.forward(z); }
  template <class V> static __attribute__((noinline)) V silu_backward(V g, V z) { return Silu{}.backward(g, z); }
  template <class V> V forward(V z) const {
    return is_silu ? silu(z) : is_relu ? Relu{}.forward(z) : leaky.forward(z);
  }
  template <class V> V backward(V g, V z) const {
    return is_silu ? silu_backward(g, z) : is_relu ? Relu{}.backward(g, z) : leaky.backward(g, z);
  }
};

}  // namespace
