// AVX-512 (F, BW, DQ, VL): what the vector extension has no operator for. See baseline.h for what
// each function must do.
#pragma once

#include <immintrin.h>  // intrinsics carry their own target; they are always inlined

#include "../vectors.h"

namespace ssah {
namespace SSAH_ISA {

constexpr bool kFused = true;

SSAH_INLINE vfloat mul_add(vfloat a, vfloat b, vfloat c) {
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
SSAH_INLINE vdouble mul_add(vdouble a, vdouble b, vdouble c) {
  return (vdouble)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}

SSAH_INLINE vuint widen_to_upper(vushort v) {
  return (vuint)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v) << 16;
}
SSAH_INLINE vushort narrow_upper(vuint v) {
  return (vushort)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)(v >> 16));
}

SSAH_INLINE vfloat from_f16(vushort v) { return (vfloat)_mm512_cvtph_ps((__m256i)v); }
SSAH_INLINE vushort to_f16(vfloat v) {
  return (vushort)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

SSAH_INLINE vfloat min(float a, vfloat b) {
  return (vfloat)_mm512_min_ps(_mm512_set1_ps(a), (__m512)b);
}
SSAH_INLINE vfloat max(float a, vfloat b) {
  return (vfloat)_mm512_max_ps(_mm512_set1_ps(a), (__m512)b);
}

SSAH_INLINE vfloat square_root(vfloat x) { return (vfloat)_mm512_maskz_sqrt_ps(0xffff, (__m512)x); }
SSAH_INLINE vdouble square_root(vdouble x) {
  return (vdouble)_mm512_maskz_sqrt_pd(0xff, (__m512d)x);
}

// An estimate of 14 bits, exact for 1 (so that a sigmoid saturates), and a step of Newton's, which
// would make a NaN of the 0 of infinity: a division takes five times as long.
SSAH_INLINE vfloat reciprocal(vfloat v) {
  const __m512 r = _mm512_rcp14_ps((__m512)v);
  const vfloat rest = mul_add(-v, (vfloat)r, splat<vfloat>(1.0f));
  const __mmask16 finite = _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(0x1p126f), _CMP_LT_OQ);
  return (vfloat)_mm512_maskz_fmadd_ps(finite, r, (__m512)rest, r);
}

SSAH_INLINE vuint compressed(vuint v, unsigned bits) {
  return (vuint)_mm512_maskz_compress_epi32((__mmask16)bits, (__m512i)v);
}
SSAH_INLINE vuint expanded(vuint compact, unsigned bits, vuint rest) {
  return (vuint)_mm512_mask_expand_epi32((__m512i)rest, (__mmask16)bits, (__m512i)compact);
}

}  // namespace SSAH_ISA
}  // namespace ssah
