// The activations of a gated FFN and their derivatives, in float or double.
//
//   silu       z / (1 + exp(-z))
//   gelu       z / 2 erfc(-z / sqrt 2): 1 + erf would lose the tail's digits
//   gelu_tanh  z / 2 (1 + tanh(u)) = z / (1 + exp(-2 u)),  u = sqrt(2 / pi) (z + 0.044715 z^3)
//   relu       max(z, 0), NaN kept
//   relu2      max(z, 0)^2
#pragma once

#include "approximate.cuh"

namespace ssah {

// In the order of ACTIVATIONS in ssah_kernels/checks.
enum class Act { kSilu, kGelu, kGeluTanh, kRelu, kRelu2 };

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

// 1 / (1 + exp(-z)), and what is left of it to 1. Example: of 20 that is 2e-9, of which the
// difference to 1 would keep no digit in float. Beyond exp(88) the value is 0 (see divide), and so
// is its product with the exponential, which must not be infinite.
template <typename R>
struct Sigmoid {
  R value;
  R rest;
};
template <typename T, typename R = Real<T>>
__device__ __forceinline__ Sigmoid<R> sigmoid(R z) {
  if constexpr (sizeof(T) == 8) {
    const R value = R(1) / (R(1) + exponential<T>(-z));
    return {value, R(1) - value};
  } else {
    const R exp_minus_z = exponential<T>(fminf(-z, 88.0f));
    const R value = quotient<T>(R(1), R(1) + exp_minus_z);
    return {value, exp_minus_z * value};
  }
}

template <Act kAct, typename T, typename R = Real<T>>
__device__ __forceinline__ R activation(R z) {
  if constexpr (kAct == Act::kSilu) {
    return quotient<T>(z, R(1) + exponential<T>(-z));
  } else if constexpr (kAct == Act::kGelu) {
    return R(0.5) * z * complementary_error(z * R(-kSqrtHalf));
  } else if constexpr (kAct == Act::kGeluTanh) {
    return quotient<T>(z, R(1) + exponential<T>(-tanh_argument(z)));
  } else if constexpr (kAct == Act::kRelu) {
    return relu(z);
  } else {
    return relu(z) * relu(z);
  }
}

template <typename R>
struct ValueAndSlope {
  R value;
  R slope;
};
template <Act kAct, typename T, typename R = Real<T>>
__device__ __forceinline__ ValueAndSlope<R> activation_and_slope(R z) {
  if constexpr (kAct == Act::kSilu) {
    const Sigmoid<R> s = sigmoid<T>(z);
    return {z * s.value, s.value * (R(1) + z * s.rest)};
  } else if constexpr (kAct == Act::kGelu) {
    const R cdf = R(0.5) * complementary_error(z * R(-kSqrtHalf));
    return {z * cdf, cdf + z * R(kInverseSqrtTwoPi) * exponential<T>(R(-0.5) * z * z)};
  } else if constexpr (kAct == Act::kGeluTanh) {
    const Sigmoid<R> s = sigmoid<T>(tanh_argument(z));
    // From there on the sigmoid is 0 or 1, and a slope of infinity times 0 would be NaN.
    const R square = z * z < R(1e4) ? z * z : R(1e4);
    const R slope = R(kTwoSqrtTwoOverPi) * (R(1) + R(3 * kCubic) * square);
    return {z * s.value, s.value + z * s.value * s.rest * slope};
  } else if constexpr (kAct == Act::kRelu) {
    return {relu(z), z <= R(0) ? R(0) : R(1)};  // the slope of NaN is 1, as in torch
  } else {
    return {relu(z) * relu(z), R(2) * relu(z)};
  }
}

}  // namespace ssah
