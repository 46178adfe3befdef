// What an update reads once a call, and how it rounds: noise and rounding are specified, to the
// bit, in ssah_kernels/reference/masked_update.py.
#pragma once

#include "types.cuh"

namespace ssah {

// Scalars of the call, float64 and int64 on the device; null where they are missing.
struct UpdateScalars {
  const double* lr;
  const double* step;
  const double* grad_scale;
  const double* clip_coef;
  const int64_t* seed;
  const double* found_inf;  // where it is not zero, nothing is written
  bool maximize;
};

__device__ __forceinline__ bool is_set(const double* scalar) {
  return scalar != nullptr && *scalar != 0;
}

template <typename R>
struct GradientFactors {
  R gradient;  // clip_coef / grad_scale, negative to maximize
  R unscale;   // 1 / grad_scale

  __device__ __forceinline__ explicit GradientFactors(const UpdateScalars& scalars) {
    const double scale = scalars.grad_scale == nullptr ? 1.0 : *scalars.grad_scale;
    const double clip = scalars.clip_coef == nullptr ? 1.0 : *scalars.clip_coef;
    gradient = static_cast<R>((scalars.maximize ? -clip : clip) / scale);
    unscale = static_cast<R>(1.0 / scale);
  }
};

__device__ __forceinline__ uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x21f0aaadu;
  x = (x ^ x >> 15) * 0xd35a2d97u;
  return x ^ x >> 15;
}

// The random bits of a tensor's elements.
struct Noise {
  bool on;
  uint32_t key0;
  uint32_t key1;

  __device__ __forceinline__ Noise(const UpdateScalars& scalars, unsigned number)
      : on(scalars.seed != nullptr), key0(0x243f6a88u), key1(0x85a308d3u) {
    if (!on) return;
    const uint64_t seed = static_cast<uint64_t>(*scalars.seed);
    const uint32_t words[4] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
                               static_cast<uint32_t>(static_cast<int64_t>(*scalars.step)), number};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      key0 = mix(key0 ^ words[i]);
      key1 = mix(key1 ^ words[i]);
    }
  }
  __device__ __forceinline__ uint32_t bits(int64_t element) const {
    return RowNoise(*this, element).bits(0);
  }

  // Of neighbours, from one on whose number is a multiple of how many they are: the upper half of
  // their numbers is the same then, and a counter of 32 bits tells them apart.
  struct RowNoise {
    uint32_t counter;
    uint32_t key;

    __device__ __forceinline__ RowNoise(const Noise& noise, int64_t element)
        : counter(noise.key0 + static_cast<uint32_t>(element)),
          key(noise.key1 + static_cast<uint32_t>(element >> 32)) {}
    __device__ __forceinline__ uint32_t bits(uint32_t k) const {
      uint32_t x = counter + k;
      x = (x ^ x >> 16) * 0x21f0aaadu;
      x = (x ^ x >> 15 ^ key) * 0xd35a2d97u;
      return x ^ x >> 15;
    }
  };
};

template <typename T>
constexpr bool kIsBfloat16 = std::is_same_v<T, __nv_bfloat16>;

// The word whose upper half is x in bfloat16, rounded up with the probability that is exact. Noise
// of 16 bits leaves an infinite value as it is. The NaN of a GPU's arithmetic, 0x7fffffff, it would
// carry over to -0.
__device__ __forceinline__ uint32_t noisy(float x, uint32_t r) {
  constexpr int32_t kLargestNaN = 0x7fff0000;
  const int32_t word = static_cast<int32_t>(__float_as_uint(x));
  return static_cast<uint32_t>(word < kLargestNaN ? word : kLargestNaN) + r;
}

// To nearest, or with noise, which is for bfloat16 alone.
template <typename T>
__device__ __forceinline__ T rounded(Real<T> x, bool, uint32_t) {
  return from_real<T>(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 rounded<__nv_bfloat16>(float x, bool noise, uint32_t r) {
  if (!noise) return __float2bfloat16_rn(x);
  return __ushort_as_bfloat16(static_cast<unsigned short>(noisy(x, r) >> 16));
}

// The same for N elements of a vector from k on. `noise_of` takes the 16 bits of this vector out of
// an element's random ones.
template <bool kNoise, typename T, int W, int N, typename NoiseOf>
__device__ __forceinline__ void round_together(Vector<T, W>& vector, int k, const Real<T> (&x)[N],
                                               const uint32_t (&bits)[N], NoiseOf noise_of) {
  if constexpr (kNoise && kIsBfloat16<T>) {
    static_assert(N == 2);
    const uint32_t upper_halves =
        __byte_perm(noisy(x[0], noise_of(bits[0])), noisy(x[1], noise_of(bits[1])), 0x7632);
    memcpy(&vector.at[k], &upper_halves, sizeof(upper_halves));
  } else {
    const Vector<T, N> rounded = vector_of<T>(x);
    memcpy(&vector.at[k], &rounded, sizeof(rounded));
  }
}

// The weight of which p is a part: of bfloat16 float32 bits, of which `rest` has the lower half.
template <typename T>
__device__ __forceinline__ Real<T> compensated(T p, T rest) {
  return to_real(p) + to_real(rest);
}
__device__ __forceinline__ float compensated(__nv_bfloat16 p, __nv_bfloat16 rest) {
  const uint32_t upper = static_cast<uint32_t>(__bfloat16_as_ushort(p)) << 16;
  const int32_t low = static_cast<int16_t>(__bfloat16_as_ushort(rest));
  return __uint_as_float(upper + static_cast<uint32_t>(low));
}

// p is w to nearest, and `rest` what that cut off.
template <typename T>
__device__ __forceinline__ void split(Real<T> w, T& p, T& rest) {
  p = from_real<T>(w);
  rest = from_real<T>(w - to_real(p));
}
__device__ __forceinline__ void split(float w, __nv_bfloat16& p, __nv_bfloat16& rest) {
  // NaNs have several patterns, of which some would round to -0.
  const uint32_t word = (w == w ? __float_as_uint(w) : 0x7fc00000u) + 0x8000u;
  p = __ushort_as_bfloat16(static_cast<unsigned short>(word >> 16));
  rest = __ushort_as_bfloat16(static_cast<unsigned short>((word & 0xffffu) ^ 0x8000u));
}

}  // namespace ssah
