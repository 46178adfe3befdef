// masked_grad_norm: sum of squares of the selected elements of a gradient.
//
// Reads each element once: 2 bytes for bf16 and f16, 4 for f32, 8 for f64. Squares and sums in
// float64, so that nothing overflows.
#pragma once

#include "simd.h"

namespace ssah {
namespace SSAH_ISA {

SSAH_INLINE void add_squares(vdouble x, vdouble (&sums)[2]) { sums[0] = mul_add(x, x, sums[0]); }
SSAH_INLINE void add_squares(vfloat x, vdouble (&sums)[2]) {
  typedef vector_of<float, SSAH_LANES / 2>::type vhalf;
  vhalf halves[2];
  __builtin_memcpy(halves, &x, sizeof(x));
  for (int i = 0; i < 2; ++i) {
    const vdouble wide = __builtin_convertvector(halves[i], vdouble);
    sums[i] = mul_add(wide, wide, sums[i]);
  }
}

template <class T>
double masked_grad_norm(const UpdateTensor& t, UpdateBlock block) {
  constexpr int lanes = compute<T>::lanes;
  vdouble sums[2] = {};
  for (long row = block.row_begin; row < block.row_end; ++row) {
    const T* g = (const T*)t.grad + (t.rows == nullptr ? row : t.rows[row]) * t.row_stride;
    for (long c = block.column_begin; c < block.column_end; c += lanes) {
      const long n = block.column_end - c < lanes ? block.column_end - c : lanes;
      if (t.columns == nullptr && t.column_stride == 1) {
        add_squares(load_up_to(g + c, n), sums);
        continue;
      }
      T gathered[lanes] = {};
      for (long i = 0; i < n; ++i) {
        gathered[i] = g[(t.columns == nullptr ? c + i : t.columns[c + i]) * t.column_stride];
      }
      add_squares(load(gathered), sums);
    }
  }
  double total = 0;
  for (int i = 0; i < SSAH_LANES / 2; ++i) total += sums[0][i] + sums[1][i];
  return total;
}

}  // namespace SSAH_ISA
}  // namespace ssah
