// No instruction of any one processor: four lanes of the vector extension, which the compiler turns
// into what the architecture has (SSE2 on x86-64).
//
// The specification of isa/<isa>.h: each defines these functions, with these results.
#pragma once

#include "one_by_one.h"

namespace ssah {
namespace SSAH_ISA {

// a * b + c, rounded once where kFused, else twice.
constexpr bool kFused = false;
SSAH_INLINE vfloat mul_add(vfloat a, vfloat b, vfloat c) { return a * b + c; }
SSAH_INLINE vdouble mul_add(vdouble a, vdouble b, vdouble c) { return a * b + c; }

// 16 bits as the upper half of 32, above zeros; and the upper half of 32 bits.
SSAH_INLINE vuint widen_to_upper(vushort v) { return __builtin_convertvector(v, vuint) << 16; }
SSAH_INLINE vushort narrow_upper(vuint v) { return __builtin_convertvector(v >> 16, vushort); }

// float16 -> float32 is exact: the exponent is moved by a multiplication, so that subnormals come
// right.
SSAH_INLINE vfloat from_f16(vushort v) {
  const vuint half = __builtin_convertvector(v, vuint), magnitude = (half & 0x7fffu) << 13;
  const vuint scaled = (vuint)((vfloat)magnitude * 0x1p112f);
  const vuint bits = (half & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : scaled;
  return (vfloat)(bits | (half & 0x8000u) << 16);
}
// float32 -> float16, to nearest even. A NaN becomes quiet and keeps the upper bits of its payload.
SSAH_INLINE vushort to_f16(vfloat v) {
  const vuint bits = (vuint)v, sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  const vuint normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // Adding 0.5 puts a subnormal's ten bits at the end of the significand, rounded by the adder.
  const vuint subnormal = (vuint)((vfloat)magnitude + 0.5f) - 0x3f000000u;
  vuint half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? (half & 0u) + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u | (magnitude >> 13 & 0x3ffu) : half;
  return __builtin_convertvector(half | sign, vushort);
}

// Of a NaN in b: NaN.
SSAH_INLINE vfloat min(float a, vfloat b) { return b > a ? splat<vfloat>(a) : b; }
SSAH_INLINE vfloat max(float a, vfloat b) { return b < a ? splat<vfloat>(a) : b; }

SSAH_INLINE vfloat square_root(vfloat x) {
  for (int i = 0; i < SSAH_LANES; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}
SSAH_INLINE vdouble square_root(vdouble x) {
  for (int i = 0; i < SSAH_LANES / 2; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}

// 1 / v for v from 1 on, to a unit in the last place; 0 for infinity, and perhaps from 2^126 on.
SSAH_INLINE vfloat reciprocal(vfloat v) { return 1 / v; }

}  // namespace SSAH_ISA
}  // namespace ssah
