// Element types, 16-byte vectors of them, and the type in which arithmetic is done: float for
// float32, bfloat16 and float16, double for float64.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace ssah {

template <typename T>
struct Arithmetic {
  using Type = float;
};
template <>
struct Arithmetic<double> {
  using Type = double;
};
template <typename T>
using Real = typename Arithmetic<T>::Type;

// Neighbouring elements, or any: what a lane holds of one row.
template <typename T, int kCount>
struct Vector {
  T at[kCount];
};

// Tells the compiler that a pointer read from memory is to global memory.
template <typename T>
__device__ __forceinline__ T* global(T* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

__device__ __forceinline__ double to_real(double value) { return value; }
__device__ __forceinline__ float to_real(float value) { return value; }
__device__ __forceinline__ float to_real(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_real(__half value) { return __half2float(value); }

// Element k, which is a constant. A bfloat16 is the upper half of a float, so that of a word of two
// the first is shifted up and the second masked: one instruction each.
template <typename T, int W>
__device__ __forceinline__ Real<T> real_at(const Vector<T, W>& vector, int k) {
  return to_real(vector.at[k]);
}
template <int W>
__device__ __forceinline__ float real_at(const Vector<__nv_bfloat16, W>& vector, int k) {
  uint32_t word;
  memcpy(&word, &vector.at[k / 2 * 2], sizeof(word));
  return __uint_as_float(k % 2 == 0 ? word << 16 : word & 0xffff0000u);
}

// Within two units in the last place in float, without a branch. A denominator beyond 2^126 gives
// 0.
__device__ __forceinline__ float divide(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ double divide(double a, double b) { return a / b; }

__device__ __forceinline__ float square_root(float x) { return sqrtf(x); }
__device__ __forceinline__ double square_root(double x) { return sqrt(x); }

template <typename T>
__device__ __forceinline__ T from_real(Real<T> value) {
  return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_real<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half from_real<__half>(float value) {
  return __float2half_rn(value);
}

template <typename T>
__device__ __forceinline__ auto pair_of(float first, float second) {
  if constexpr (std::is_same_v<T, __half>) {
    return __floats2half2_rn(first, second);
  } else {
    return __floats2bfloat162_rn(first, second);
  }
}

// Values, rounded to the elements of a vector: those of 16 bits two at a time, in one instruction.
template <typename T, int W>
__device__ __forceinline__ Vector<T, W> vector_of(const Real<T> (&values)[W]) {
  Vector<T, W> vector;
  if constexpr (std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>) {
#pragma unroll
    for (int k = 0; k < W; k += 2) {
      const auto pair = pair_of<T>(values[k], values[k + 1]);
      memcpy(&vector.at[k], &pair, sizeof(pair));
    }
  } else {
#pragma unroll
    for (int k = 0; k < W; ++k) vector.at[k] = from_real<T>(values[k]);
  }
  return vector;
}

}  // namespace ssah
