// AVX2 with FMA and F16C: what the vector extension has no operator for. See baseline.h for what
// each function must do.
#pragma once

#include <immintrin.h>  // intrinsics carry their own target; they are always inlined

#include "../vectors.h"

namespace ssah {
namespace SSAH_ISA {

constexpr bool kFused = true;

SSAH_INLINE vfloat mul_add(vfloat a, vfloat b, vfloat c) {
  return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
SSAH_INLINE vdouble mul_add(vdouble a, vdouble b, vdouble c) {
  return (vdouble)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}

SSAH_INLINE vuint widen_to_upper(vushort v) {
  return (vuint)_mm256_cvtepu16_epi32((__m128i)v) << 16;
}
SSAH_INLINE vushort narrow_upper(vuint v) {
  const __m256i halves = (__m256i)(v >> 16);
  const __m256i packed = _mm256_packus_epi32(halves, halves);  // within each half of the register
  return (vushort)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}

SSAH_INLINE vfloat from_f16(vushort v) { return (vfloat)_mm256_cvtph_ps((__m128i)v); }
SSAH_INLINE vushort to_f16(vfloat v) {
  return (vushort)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

SSAH_INLINE vfloat min(float a, vfloat b) {
  return (vfloat)_mm256_min_ps(_mm256_set1_ps(a), (__m256)b);
}
SSAH_INLINE vfloat max(float a, vfloat b) {
  return (vfloat)_mm256_max_ps(_mm256_set1_ps(a), (__m256)b);
}

SSAH_INLINE vfloat square_root(vfloat x) { return (vfloat)_mm256_sqrt_ps((__m256)x); }
SSAH_INLINE vdouble square_root(vdouble x) { return (vdouble)_mm256_sqrt_pd((__m256d)x); }

SSAH_INLINE vfloat reciprocal(vfloat v) { return 1 / v; }

// For each of the 256 masks of eight lanes: from which lane each takes its value. Of lanes 1, 4 and
// 5 `compress` has {1, 4, 5, ...}, and `expand` {., 0, ., ., 1, 2, ., .}. A byte a lane: 4 KiB.
struct LaneTables {
  unsigned char compress[256][8], expand[256][8];
};
constexpr LaneTables make_lane_tables() {
  LaneTables tables{};
  for (int bits = 0; bits < 256; ++bits) {
    for (int lane = 0, k = 0; lane < 8; ++lane) {
      if ((bits >> lane & 1) == 0) continue;
      tables.compress[bits][k] = (unsigned char)lane;
      tables.expand[bits][lane] = (unsigned char)k++;
    }
  }
  return tables;
}
static constexpr LaneTables kLaneTables = make_lane_tables();

SSAH_INLINE __m256i lanes_of(const unsigned char (&row)[8]) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)row));
}
SSAH_INLINE vuint compressed(vuint v, unsigned bits) {
  return (vuint)_mm256_permutevar8x32_epi32((__m256i)v, lanes_of(kLaneTables.compress[bits]));
}
SSAH_INLINE vuint expanded(vuint compact, unsigned bits, vuint rest) {
  const __m256i moved =
      _mm256_permutevar8x32_epi32((__m256i)compact, lanes_of(kLaneTables.expand[bits]));
  const vuint places = {1, 2, 4, 8, 16, 32, 64, 128};
  return (places & bits) != 0 ? (vuint)moved : rest;
}

}  // namespace SSAH_ISA
}  // namespace ssah
