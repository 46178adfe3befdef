// The activations of a gated FFN and their derivatives, in float or double.
//
//   silu       z / (1 + exp(-z))
//   gelu       z / 2 erfc(-z / sqrt 2): 1 + erf would lose the tail's digits
//   gelu_tanh  z / 2 (1 + tanh(u)) = z / (1 + exp(-2 u)),  u = sqrt(2 / pi) (z + 0.044715 z^3)
//   relu       max(z, 0), NaN kept
//   relu2      max(z, 0)^2
#pragma once

#include "types.cuh"

namespace ssah {

// In the order of ACTIVATIONS in ssah_kernels/checks.
enum class Act { kSilu, kGelu, kGeluTanh, kRelu, kRelu2 };

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float complementary_error(float x) { return erfcf(x); }
__device__ __forceinline__ double complementary_error(double x) { return erfc(x); }

template <typename R>
__device__ __forceinline__ R relu(R z) {
  return z < R(0) ? R(0) : z;
}

constexpr double kSqrtHalf = 0.70710678118654752440;
constexpr double kInverseSqrtTwoPi = 0.39894228040143267794;
constexpr double kTwoSqrtTwoOverPi = 1.59576912160573071176;
constexpr double kCubic = 0.044715;

// gelu_tanh is z * sigmoid of this.
template <typename R>
__device__ __forceinline__ R tanh_argument(R z) {
  return R(kTwoSqrtTwoOverPi) * (z + R(kCubic) * z * z * z);
}

template <Act kAct, typename R>
__device__ __forceinline__ R activation(R z) {
  if constexpr (kAct == Act::kSilu) {
    return divide(z, R(1) + exponential(-z));
  } else if constexpr (kAct == Act::kGelu) {
    return R(0.5) * z * complementary_error(z * R(-kSqrtHalf));
  } else if constexpr (kAct == Act::kGeluTanh) {
    return divide(z, R(1) + exponential(-tanh_argument(z)));
  } else if constexpr (kAct == Act::kRelu) {
    return relu(z);
  } else {
    return relu(z) * relu(z);
  }
}

template <Act kAct, typename R>
__device__ __forceinline__ R activation_slope(R z) {
  if constexpr (kAct == Act::kSilu) {
    const R s = divide(R(1), R(1) + exponential(-z));
    return s * (R(1) + z * (R(1) - s));
  } else if constexpr (kAct == Act::kGelu) {
    const R cdf = R(0.5) * complementary_error(z * R(-kSqrtHalf));
    return cdf + z * R(kInverseSqrtTwoPi) * exponential(R(-0.5) * z * z);
  } else if constexpr (kAct == Act::kGeluTanh) {
    const R s = divide(R(1), R(1) + exponential(-tanh_argument(z)));
    // From there on s is 0 or 1, and a slope of infinity times 0 would be NaN.
    const R square = z * z < R(1e4) ? z * z : R(1e4);
    const R slope = R(kTwoSqrtTwoOverPi) * (R(1) + R(3 * kCubic) * square);
    return s + z * s * (R(1) - s) * slope;
  } else if constexpr (kAct == Act::kRelu) {
    return z <= R(0) ? R(0) : R(1);  // of NaN 1, as in torch
  } else {
    return R(2) * relu(z);
  }
}

}  // namespace ssah
