// gated_moments: output = act(gate) * up [tokens, channels], and the moments of the output as
// rounded to its type, in one pass.
//
// Reads gate and up once and writes the output once: 6 bytes per element for bf16 and f16, 12 for
// f32, 24 for f64. float32 arithmetic (float64 for f64), one rounding; moments as in moments.h.
#pragma once

#include "activation.h"
#include "moments.h"

namespace ssah {
namespace SSAH_ISA {

template <class T, Activation act>
struct GatedSource {
  const T *gate, *up;
  T* output;
  const long *gate_rows, *up_rows, *output_rows;
  SSAH_METHOD vec<T> product(long row, long c, long n) {
    vec<T> value, slope;
    activate<T, act>(load_up_to(gate + gate_rows[row] + c, n), value, slope);
    return value * load_up_to(up + up_rows[row] + c, n);
  }
  SSAH_METHOD vec<T> peek(long row, long c, long n) {
    T buffer[compute<T>::lanes];
    return store_rounded(buffer, product(row, c, n));
  }
  SSAH_METHOD vec<T> load(long row, long c, long n) {
    T* to = output + output_rows[row] + c;
    if (n >= compute<T>::lanes) return store_rounded(to, product(row, c, n));
    T buffer[compute<T>::lanes];
    vec<T> h = store_rounded(buffer, product(row, c, n));
    __builtin_memcpy(to, buffer, n * sizeof(T));
    return h;
  }
  SSAH_METHOD vec<T> again(long row, long c, long n) {
    return load_up_to(output + output_rows[row] + c, n);
  }
  SSAH_METHOD void prefetch(long row, long c) {
    __builtin_prefetch(gate + gate_rows[row] + c, 0, 2);
    __builtin_prefetch(up + up_rows[row] + c, 0, 2);
  }
};

template <class T, Activation act>
void gated_moments(const GatedMomentsArgs& a, ChannelRange range) {
  GatedSource<T, act> source{(const T*)a.gate, (const T*)a.up, (T*)a.output,
                             a.gate_rows,      a.up_rows,      a.output_rows};
  accumulate_moments<T>(source, a.n_counted, a.count, a.mean, a.m2, range);
  for (long row = a.n_counted; row < a.n_rows; ++row) {
    for (long c = range.begin; c < range.end; c += compute<T>::lanes) {
      source.load(row, c, range.end - c);
    }
  }
}

// grad_gate = grad * up * act'(gate), grad_up = grad * act(gate). Reads three, writes two: 10 bytes
// per element for bf16 and f16.
template <class T, Activation act>
void gated_backward(const GatedBackwardArgs& a, long row_begin, long row_end) {
  for (long row = row_begin; row < row_end; ++row) {
    const T* grad = (const T*)a.grad + a.grad_rows[row];
    const T* gate = (const T*)a.gate + a.gate_rows[row];
    const T* up = (const T*)a.up + a.up_rows[row];
    T* grad_gate = (T*)a.grad_gate + row * a.channels;
    T* grad_up = (T*)a.grad_up + row * a.channels;
    for (long c = 0; c < a.channels; c += compute<T>::lanes) {
      const long n = a.channels - c;
      vec<T> g = load_up_to(grad + c, n), value, slope;
      activate<T, act>(load_up_to(gate + c, n), value, slope);
      store_up_to(grad_gate + c, g * load_up_to(up + c, n) * slope, n);
      store_up_to(grad_up + c, g * value, n);
    }
  }
}

}  // namespace SSAH_ISA
}  // namespace ssah
