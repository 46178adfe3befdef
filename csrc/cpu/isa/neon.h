// NEON of ARMv8.0, which every AArch64 processor has: what the vector extension has no operator
// for. See baseline.h for what each function must do.
#pragma once

#include <arm_neon.h>

#include "one_by_one.h"  // NEON moves no lanes by a mask: its table look-ups are of bytes

namespace ssah {
namespace SSAH_ISA {

constexpr bool kFused = true;

SSAH_INLINE vfloat mul_add(vfloat a, vfloat b, vfloat c) {
  return (vfloat)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
SSAH_INLINE vdouble mul_add(vdouble a, vdouble b, vdouble c) {
  return (vdouble)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}

SSAH_INLINE vuint widen_to_upper(vushort v) { return (vuint)vshll_n_u16((uint16x4_t)v, 16); }
SSAH_INLINE vushort narrow_upper(vuint v) { return (vushort)vshrn_n_u32((uint32x4_t)v, 16); }

// FCVTL and FCVTN round to nearest even, unless somebody changed the mode of the whole thread.
SSAH_INLINE vfloat from_f16(vushort v) { return (vfloat)vcvt_f32_f16((float16x4_t)v); }
SSAH_INLINE vushort to_f16(vfloat v) { return (vushort)vcvt_f16_f32((float32x4_t)v); }

SSAH_INLINE vfloat min(float a, vfloat b) {
  return (vfloat)vminq_f32(vdupq_n_f32(a), (float32x4_t)b);
}
SSAH_INLINE vfloat max(float a, vfloat b) {
  return (vfloat)vmaxq_f32(vdupq_n_f32(a), (float32x4_t)b);
}

SSAH_INLINE vfloat square_root(vfloat x) { return (vfloat)vsqrtq_f32((float32x4_t)x); }
SSAH_INLINE vdouble square_root(vdouble x) { return (vdouble)vsqrtq_f64((float64x2_t)x); }

SSAH_INLINE vfloat reciprocal(vfloat v) { return 1 / v; }

}  // namespace SSAH_ISA
}  // namespace ssah
