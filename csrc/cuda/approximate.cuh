// Approximations of the special function unit, where nothing is refined afterwards. Relative errors
// as PTX states them. Subnormal numbers count as 0; of the root everything below 2^-126 counts as
// that, so that no root is 0 and AdamW without eps divides by none.
//
//   exp2_approximate(x)        2^x, within 2^-22
//   reciprocal_approximate(x)  1 / x, within one unit in the last place (2^-23); 0 beyond 2^126
//   root_approximate(x)        sqrt(x), within 2^-23, at least 2^-63
//
// Example: silu(1) = 1 / (1 + 2^(-1.442695)) comes out within 3e-7 of 0.7310586, which bfloat16
// rounds by up to 1e-3 and float16 by up to 2e-4.
#pragma once

#include "types.cuh"

#ifdef __CUDACC__  // else the emulation (tests/emulation) has them, with the errors that are stated
namespace ssah {

__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float root_approximate(float x) {
  float y;
  asm("{ .reg .f32 t; max.NaN.f32 t, %1, 0f00800000; sqrt.approx.ftz.f32 %0, t; }"
      : "=f"(y)
      : "f"(x));
  return y;
}

}  // namespace ssah
#endif

namespace ssah {

constexpr float kLog2E = 1.44269504f;

// Arithmetic for elements T. Those of 16 bits are rounded by 2^-9 or 2^-12, beside which the errors
// of approximations vanish: of the exponential |x| 2^-24 + 2^-22, of the quotient 2^-22, of the
// root 2^-23. float32 and float64 get what types.cuh has.
template <typename T>
__device__ __forceinline__ Real<T> exponential(Real<T> x) {
  if constexpr (sizeof(T) == 2) {
    return exp2_approximate(x * kLog2E);
  } else if constexpr (sizeof(T) == 4) {
    return expf(x);
  } else {
    return exp(x);
  }
}
template <typename T>
__device__ __forceinline__ Real<T> quotient(Real<T> a, Real<T> b) {
  if constexpr (sizeof(T) == 2) {
    return a * reciprocal_approximate(b);
  } else {
    return divide(a, b);
  }
}
template <typename T>
__device__ __forceinline__ Real<T> root(Real<T> x) {
  if constexpr (sizeof(T) == 2) {
    return root_approximate(x);
  } else {
    return square_root(x);
  }
}

}  // namespace ssah
