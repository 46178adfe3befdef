// Vectors of one instruction set, on the compiler's vector extension (GCC and Clang).
//
// Included by isa/<isa>.cpp alone, which sets the target and SSAH_ISA (a namespace) and SSAH_LANES
// (float32 values in one register). Nothing here includes a standard or torch header: an inline
// function of one of those, compiled for this target, could be the copy that the linker keeps.
//
// A kernel is written once over a storage type T: `vec<T>` is a register of the type that T is
// computed in (float for float, bf16 and f16; double for double), load and store convert.
#pragma once

#if SSAH_LANES >= 8
#include <immintrin.h>  // intrinsics carry their own target; they are always inlined
#endif

#include "types.h"

#define SSAH_INLINE static inline __attribute__((always_inline))
#define SSAH_METHOD inline __attribute__((always_inline))  // of a class, or a specialisation

namespace ssah {
namespace SSAH_ISA {

constexpr int kFloatLanes = SSAH_LANES;

template <class S, int N>
struct vector_of {
  typedef S type __attribute__((vector_size(N * sizeof(S))));
};

typedef vector_of<float, SSAH_LANES>::type vfloat;
typedef vector_of<unsigned, SSAH_LANES>::type vuint;
typedef vector_of<unsigned short, SSAH_LANES>::type vushort;
typedef vector_of<double, SSAH_LANES / 2>::type vdouble;

template <class T>
struct compute {
  typedef float scalar;
  typedef vfloat vector;
  static constexpr int lanes = SSAH_LANES;
};
template <>
struct compute<double> {
  typedef double scalar;
  typedef vdouble vector;
  static constexpr int lanes = SSAH_LANES / 2;
};
template <class T>
using vec = typename compute<T>::vector;
template <class T>
using scalar = typename compute<T>::scalar;

template <class V, class S>
SSAH_INLINE V splat(S value) {
  return value - V{};
}

template <class V>
SSAH_INLINE V load_raw(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
SSAH_INLINE void store_raw(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

SSAH_INLINE vdouble load(const double* p) { return load_raw<vdouble>(p); }
SSAH_INLINE vfloat load(const float* p) { return load_raw<vfloat>(p); }
// Between 16 and 32 bits: the compiler's own conversion takes four instructions for one of these.
#if SSAH_LANES == 16
SSAH_INLINE vuint widen(vushort v) {
  return (vuint)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v);
}
SSAH_INLINE vushort narrow(vuint v) {
  return (vushort)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v);
}
#elif SSAH_LANES == 8
SSAH_INLINE vuint widen(vushort v) { return (vuint)_mm256_cvtepu16_epi32((__m128i)v); }
SSAH_INLINE vushort narrow(vuint v) {
  __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);  // within each half
  return (vushort)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
#else
SSAH_INLINE vuint widen(vushort v) { return __builtin_convertvector(v, vuint); }
SSAH_INLINE vushort narrow(vuint v) { return __builtin_convertvector(v, vushort); }
#endif
SSAH_INLINE vfloat load(const bf16* p) { return (vfloat)(widen(load_raw<vushort>(p)) << 16); }
SSAH_INLINE void store(double* p, vdouble v) { store_raw(p, v); }
SSAH_INLINE void store(float* p, vfloat v) { store_raw(p, v); }

// float32 -> bfloat16, to nearest even, in the upper half of each lane.
SSAH_INLINE vuint bf16_rounded(vfloat v) {
  vuint bits = (vuint)v;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}
// The same; a NaN stays a (quiet) NaN.
SSAH_INLINE vuint bf16_bits(vfloat v) { return v == v ? bf16_rounded(v) : ((vuint)v | 0x400000u); }
SSAH_INLINE void store(bf16* p, vfloat v) { store_raw(p, narrow(bf16_bits(v) >> 16)); }

#if SSAH_LANES == 16
SSAH_INLINE vfloat load(const f16* p) { return (vfloat)_mm512_cvtph_ps(load_raw<__m256i>(p)); }
SSAH_INLINE vushort to_f16(vfloat v) {
  return (vushort)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif SSAH_LANES == 8
SSAH_INLINE vfloat load(const f16* p) { return (vfloat)_mm256_cvtph_ps(load_raw<__m128i>(p)); }
SSAH_INLINE vushort to_f16(vfloat v) {
  return (vushort)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
// No conversion instruction: move the exponent by multiplication, so that subnormals come right.
SSAH_INLINE vfloat load(const f16* p) {
  vuint h = widen(load_raw<vushort>(p));
  vuint magnitude = (h & 0x7fffu) << 13;
  vuint scaled = (vuint)((vfloat)magnitude * 0x1p112f);
  vuint bits = (h & 0x7c00u) == 0x7c00u ? (magnitude | 0x7f800000u) : scaled;
  return (vfloat)(bits | (h & 0x8000u) << 16);
}
SSAH_INLINE vushort to_f16(vfloat v) {
  vuint bits = (vuint)v, sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  vuint normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // Adding 0.5 puts a subnormal's ten bits at the end of the significand, rounded by the adder.
  vuint subnormal = (vuint)((vfloat)magnitude + 0.5f) - 0x3f000000u;
  vuint half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? (half & 0u) + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? (half & 0u) + 0x7e00u : half;
  return narrow(half | sign);
}
#endif
SSAH_INLINE void store(f16* p, vfloat v) { store_raw(p, to_f16(v)); }

// The first n < lanes values; the rest of the register is zero.
template <class T>
SSAH_INLINE vec<T> load_n(const T* p, int n) {
  T buffer[compute<T>::lanes] = {};
  __builtin_memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <class T>
SSAH_INLINE void store_n(T* p, vec<T> v, int n) {
  T buffer[compute<T>::lanes];
  store(buffer, v);
  __builtin_memcpy(p, buffer, n * sizeof(T));
}
template <class T>
SSAH_INLINE vec<T> load_up_to(const T* p, long n) {
  return n >= compute<T>::lanes ? load(p) : load_n(p, (int)n);
}
template <class T>
SSAH_INLINE void store_up_to(T* p, vec<T> v, long n) {
  if (n >= compute<T>::lanes) {
    store(p, v);
  } else {
    store_n(p, v, (int)n);
  }
}

// Stores v as a T and gives v as it reads back. For bf16, v comes of arithmetic on bf16: the lower
// half of a NaN is zero then, and rounding leaves it a NaN.
SSAH_INLINE vdouble store_rounded(double* p, vdouble v) {
  store_raw(p, v);
  return v;
}
SSAH_INLINE vfloat store_rounded(float* p, vfloat v) {
  store_raw(p, v);
  return v;
}
SSAH_INLINE vfloat store_rounded(bf16* p, vfloat v) {
  vuint bits = bf16_rounded(v);
  store_raw(p, narrow(bits >> 16));
  return (vfloat)(bits & 0xffff0000u);
}
SSAH_INLINE vfloat store_rounded(f16* p, vfloat v) {
  store(p, v);
  return load(p);
}

SSAH_INLINE vdouble exp(vdouble x) {
  for (int i = 0; i < SSAH_LANES / 2; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}
#if SSAH_LANES == 16
SSAH_INLINE vfloat min(float a, vfloat b) {
  return (vfloat)_mm512_min_ps(_mm512_set1_ps(a), (__m512)b);
}
SSAH_INLINE vfloat max(float a, vfloat b) {
  return (vfloat)_mm512_max_ps(_mm512_set1_ps(a), (__m512)b);
}
#elif SSAH_LANES == 8
SSAH_INLINE vfloat min(float a, vfloat b) {
  return (vfloat)_mm256_min_ps(_mm256_set1_ps(a), (__m256)b);
}
SSAH_INLINE vfloat max(float a, vfloat b) {
  return (vfloat)_mm256_max_ps(_mm256_set1_ps(a), (__m256)b);
}
#else
SSAH_INLINE vfloat min(float a, vfloat b) { return b > a ? splat<vfloat>(a) : b; }
SSAH_INLINE vfloat max(float a, vfloat b) { return b < a ? splat<vfloat>(a) : b; }
#endif

// 1 / v for v in [1, 2^127): an estimate and a step of Newton's where the estimate has 14 bits and
// is exact for 1 (so that a sigmoid saturates); a division takes five times as long.
#if SSAH_LANES == 16
SSAH_INLINE vfloat reciprocal(vfloat v) {
  vfloat r = (vfloat)_mm512_rcp14_ps((__m512)v);
  return r + r * (1 - v * r);
}
#else
SSAH_INLINE vfloat reciprocal(vfloat v) { return 1 / v; }
#endif
SSAH_INLINE vdouble reciprocal(vdouble v) { return 1 / v; }

// 2^n e^r with n = round(x / ln 2), |r| <= ln 2 / 2. The polynomial is the minimax of degree 5 for
// the relative error, 1.9e-7 with rounding; ln 2 as a float adds 2e-9 n to it. The argument is
// clamped to [-87, 88]: the result stays normal and finite. Of NaN it is unspecified: every caller
// multiplies by the argument.
SSAH_INLINE vfloat exp(vfloat x) {
  x = max(-87.0f, min(88.0f, x));
  const float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  vfloat shifted = x * 1.44269504f + to_integer;
  vfloat n = shifted - to_integer;
#if SSAH_LANES >= 8
  vfloat r = x - n * 0.693147182f;  // fused
#else
  vfloat r = x - n * 0.693359375f + n * 2.12194440e-4f;  // n times the first part is exact
#endif
  vfloat p = splat<vfloat>(0.00829765479f);
  p = p * r + 0.0419153820f;
  p = p * r + 0.166675747f;
  p = p * r + 0.499988949f;
  p = p * r + 0.999999692f;
  p = p * r + 1.00000007f;
  // The low bits of `shifted` are n: adding them to the exponent multiplies p, in [0.7, 1.42], by
  // 2^n.
  return (vfloat)((vuint)p + ((vuint)shifted << 23));
}

}  // namespace SSAH_ISA
}  // namespace ssah
