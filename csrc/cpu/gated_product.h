// gated_product: output = act(gate) * up * factors[arm] [tokens, units], where every token has an
// arm, a row of factors [arms, units].
//
// Of two tokens under the arms 1 and 0, the first is multiplied by factors[1], the second by
// factors[0]. Reads gate and up once and writes the output once: 6 bytes per element for bf16 and
// f16, 12 for f32, 24 for f64; the factors are few and stay in the cache. float32 arithmetic
// (float64 for f64), one rounding.
#pragma once

#include "activation.h"

namespace ssah {
namespace SSAH_ISA {

template <class T, Activation act>
void gated_product(const GatedProductArgs& a, long row_begin, long row_end) {
  for (long row = row_begin; row < row_end; ++row) {
    const T* gate = (const T*)a.gate + a.gate_rows[row];
    const T* up = (const T*)a.up + a.up_rows[row];
    // In the type of the arithmetic: a factor is not rounded to the 16 bits of an activation.
    const scalar<T>* factor = (const scalar<T>*)a.factors + a.factor_rows[row];
    T* output = (T*)a.output + row * a.channels;
    for (long c = 0; c < a.channels; c += compute<T>::lanes) {
      const long n = a.channels - c;
      vec<T> value, slope;
      activate<T, act>(load_up_to(gate + c, n), value, slope);
      const vec<T> product = value * load_up_to(up + c, n);
      store_up_to(output + c, product * load_up_to(factor + c, n), n);
    }
  }
}

}  // namespace SSAH_ISA
}  // namespace ssah
