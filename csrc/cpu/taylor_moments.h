// taylor_moments_: sum of x * grad and of (x * grad)^2 of every channel, over tokens.
//
// Reads x and grad once: 4 bytes per element for bf16 and f16, 8 for f32, 16 for f64.
#pragma once

#include "channel_sums.h"

namespace ssah {
namespace SSAH_ISA {

template <class T>
struct TaylorTerm {
  const T *x, *grad;
  const long *x_rows, *grad_rows;
  SSAH_METHOD void add(long row, long c, long n, vec<T> (&sums)[2]) {
    vec<T> product = load_up_to(x + x_rows[row] + c, n) * load_up_to(grad + grad_rows[row] + c, n);
    sums[0] += product;
    sums[1] = mul_add(product, product, sums[1]);
  }
  SSAH_METHOD void add_wide(long row, long c, long n, vdouble (&sums)[2][kDoubles<T>]) {
    vdouble a[kDoubles<T>], g[kDoubles<T>];
    widen(load_up_to(x + x_rows[row] + c, n), a);
    widen(load_up_to(grad + grad_rows[row] + c, n), g);
    for (int d = 0; d < kDoubles<T>; ++d) {
      const vdouble product = a[d] * g[d];
      sums[0][d] += product;
      sums[1][d] = mul_add(product, product, sums[1][d]);
    }
  }
};

template <class T>
void taylor_moments(const TaylorMomentsArgs& a, ChannelRange range) {
  TaylorTerm<T> term{(const T*)a.x, (const T*)a.grad, a.x_rows, a.grad_rows};
  double* const totals[2] = {a.signed_sum, a.squared_sum};
  accumulate_sums<T, 2>(term, a.n_rows, totals, range);
}

}  // namespace SSAH_ISA
}  // namespace ssah
