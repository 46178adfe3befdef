// column_sq_norms: sum of squares of every column of weight [out_features, in_features].
//
// Reads each element once: 2 bytes for bf16 and f16, 4 for f32, 8 for f64.
#pragma once

#include "channel_sums.h"

namespace ssah {
namespace SSAH_ISA {

template <class T>
struct SquareTerm {
  const T* weight;
  long row_stride;
  SSAH_METHOD void add(long row, long c, long n, vec<T> (&sums)[1]) {
    vec<T> w = load_up_to(weight + row * row_stride + c, n);
    sums[0] = mul_add(w, w, sums[0]);
  }
  SSAH_METHOD void add_wide(long row, long c, long n, vdouble (&sums)[1][kDoubles<T>]) {
    vdouble w[kDoubles<T>];
    widen(load_up_to(weight + row * row_stride + c, n), w);
    for (int d = 0; d < kDoubles<T>; ++d) sums[0][d] = mul_add(w[d], w[d], sums[0][d]);
  }
};

template <class T>
void column_sq_norms(const ColumnSqNormsArgs& a, ChannelRange range) {
  SquareTerm<T> term{(const T*)a.weight, a.row_stride};
  double* const totals[1] = {a.norms};
  accumulate_sums<T, 1>(term, a.n_rows, totals, range);
}

}  // namespace SSAH_ISA
}  // namespace ssah
