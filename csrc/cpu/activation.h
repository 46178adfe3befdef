// The activations of a gated FFN and their derivatives, on registers of float or double.
#pragma once

#include "simd.h"

namespace ssah {
namespace SSAH_ISA {

// From -89 on e^-z is taken to infinity, by doubling its half: the sigmoid is 0 then, by which a z
// of -infinity gives NaN, as in torch.
SSAH_INLINE vfloat sigmoid(vfloat z) {
  const vfloat half = exp_within<1>(-max(-89.0f, min(80.0f, z)));
  return reciprocal(mul_add(half, 2.0f, 1.0f));
}
SSAH_INLINE vdouble sigmoid(vdouble z) { return reciprocal(1 + exp(-z)); }

// log of erfc(x) e^(x^2) / t for x >= 0, as a polynomial in t = 1 / (1 + x / 2): a least-squares
// fit on Chebyshev nodes of x in [0, 12]; error under 2.1e-7 in float32.
SSAH_INLINE vfloat log_scaled_erfc(vfloat t) {
  const float coefficients[] = {0.157751014f,  -0.750181577f,  1.31865295f,   -0.909740673f,
                                0.0943214269f, -0.0902556585f, 0.0652326508f, 0.380354122f,
                                0.999348078f,  -1.26548227f};
  vfloat sum = {};
  for (float coefficient : coefficients) sum = mul_add(sum, t, coefficient);
  return sum;
}

// The normal distribution function Phi(z) and its density phi(z). Where exp ends, z Phi(z) is below
// 3e-38 and stays there; z phi(z) would not.
SSAH_INLINE void normal(vfloat z, vfloat& cdf, vfloat& density) {
  vfloat half_square = z * z * 0.5f;
  vfloat t = 1 / mul_add(z < 0 ? -z : z, 0.35355339f, 1.0f);
  vfloat tail = 0.5f * t * exp(log_scaled_erfc(t) - half_square);
  cdf = z < 0 ? tail : 1 - tail;
  density = half_square < 86 ? exp(-half_square) * 0.39894228f : vfloat{};
}
SSAH_INLINE void normal(vdouble z, vdouble& cdf, vdouble& density) {
  for (int i = 0; i < SSAH_LANES / 2; ++i) {
    cdf[i] = 0.5 * __builtin_erfc(-z[i] * 0.70710678118654752440);
    density[i] = __builtin_exp(-0.5 * z[i] * z[i]) * 0.39894228040143267794;
  }
}

template <class V, class S>
SSAH_INLINE void gelu_tanh(V z, V& value, V& slope) {
  const S scale = S(2 * 0.79788456080286535588);  // 2 sqrt(2 / pi): 1 + tanh(u) = 2 sigmoid(2 u)
  V square = z * z;
  V s = sigmoid(z * mul_add(square, S(2 * 0.79788456080286535588 * 0.044715), scale));
  value = z * s;
  // s is 0 or 1 from there on, and infinity times 0 would be NaN.
  const V most = splat<V>(S(1e4)), clamped = square < most ? square : most;
  slope = mul_add(value * (1 - s) * scale, mul_add(clamped, S(3 * 0.044715), S(1)), s);
}

// value = act(z) and slope = act'(z). A caller that drops the slope pays nothing for it.
template <class T, Activation act>
SSAH_INLINE void activate(vec<T> z, vec<T>& value, vec<T>& slope) {
  typedef vec<T> V;
  typedef scalar<T> S;
  const V zero = {};
  if constexpr (act == kSilu) {
    V s = sigmoid(z);
    value = z * s;
    slope = mul_add(value, 1 - s, s);
  } else if constexpr (act == kGelu) {
    V cdf, density;
    normal(z, cdf, density);
    value = z * cdf;
    slope = mul_add(z, density, cdf);
  } else if constexpr (act == kGeluTanh) {
    gelu_tanh<V, S>(z, value, slope);
  } else {
    V positive = z < 0 ? zero : z;  // NaN stays NaN
    value = act == kRelu ? positive : positive * positive;
    slope = act == kRelu ? (z <= 0 ? zero : zero + S(1)) : 2 * positive;
  }
}

}  // namespace SSAH_ISA
}  // namespace ssah
