// masked_grad_norm: sum of squares of the selected elements of a gradient.
//
// Reads each element once: 2 bytes for bf16 and f16, 4 for f32, 8 for f64. Squares and sums in
// float64, so that nothing overflows.
#pragma once

#include "simd.h"

namespace ssah {
namespace SSAH_ISA {

// Two sums by name, not an array: GCC keeps an element of one in memory within the loop.
SSAH_INLINE void add_squares(vdouble x, vdouble& low, vdouble&) { low = mul_add(x, x, low); }
SSAH_INLINE void add_squares(vfloat x, vdouble& low, vdouble& high) {
  vdouble wide[2];
  widen(x, wide);
  low = mul_add(wide[0], wide[0], low);
  high = mul_add(wide[1], wide[1], high);
}

template <class T>
double masked_grad_norm(const UpdateTensor& t, UpdateBlock block) {
  constexpr int lanes = compute<T>::lanes;
  const bool contiguous = t.columns == nullptr && t.column_stride == 1;
  vdouble low = {}, high = {};
  for (long row = block.row_begin; row < block.row_end; ++row) {
    const T* g = (const T*)t.grad + (t.rows == nullptr ? row : t.rows[row]) * t.row_stride;
    long c = block.column_begin;
    if (contiguous) {
      for (; c + lanes <= block.column_end; c += lanes) add_squares(load(g + c), low, high);
    }
    for (; c < block.column_end; c += lanes) {
      const long n = block.column_end - c < lanes ? block.column_end - c : lanes;
      T gathered[lanes] = {};
      for (long i = 0; i < n; ++i) {
        gathered[i] = g[(t.columns == nullptr ? c + i : t.columns[c + i]) * t.column_stride];
      }
      add_squares(load(gathered), low, high);
    }
  }
  double total = 0;
  for (int i = 0; i < SSAH_LANES / 2; ++i) total += low[i] + high[i];
  return total;
}

}  // namespace SSAH_ISA
}  // namespace ssah
