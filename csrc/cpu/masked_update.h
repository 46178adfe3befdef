// One pass over the trained elements of a parameter: shared by masked_adamw_ and masked_sgd_.
//
// Per element and in this order: read p, g and the states, update in float32 (float64 for f64),
// write p and the states. Bytes moved per element: AdamW in f32 28, in bf16 with bf16 state 14,
// with f32 state 22; SGD with momentum in f32 20. Noise and rounding are specified, to the bit, in
// ssah_kernels/reference/masked_update.py.
#pragma once

#include "simd.h"

namespace ssah {
namespace SSAH_ISA {

constexpr long kPiece = 1024;     // elements between merges of a row unit's sums into float64
constexpr long kRowsPerSum = 64;  // rows between merges of column units' sums into float64

// Whose sums of p * g and its square are kept: nobody's, one unit's (a row), one per element.
enum Units { kNoUnits, kRowUnit, kColumnUnits };

SSAH_INLINE vfloat square_root(vfloat x) {
#if SSAH_LANES == 16
  return (vfloat)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
#elif SSAH_LANES == 8
  return (vfloat)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < SSAH_LANES; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
SSAH_INLINE vdouble square_root(vdouble x) {
  for (int i = 0; i < SSAH_LANES / 2; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}

// a * b, never contracted with what follows: these round as torch does, so that
// one step differs from torch's by less than the parameters' own spacing.
template <class V, class S>
SSAH_INLINE V rounded_product(V a, S b) {
  V product = a * b;
#if defined(__x86_64__)
  __asm__("" : "+v"(product));
#elif defined(__aarch64__)
  __asm__("" : "+w"(product));
#endif
  return product;
}

// The keys of a tensor's noise, and where in the tensor a vector lies.
struct Noise {
  unsigned key0, key1;
  // 32 random bits for each of the elements from `low`, the lower half of the element's number.
  SSAH_METHOD vuint bits(vuint low) const {
    vuint x = low + key0;
    x = (x ^ x >> 16) * 0x21f0aaadu;
    x = (x ^ x >> 15 ^ key1) * 0xd35a2d97u;
    return x ^ x >> 15;
  }
};

SSAH_INLINE vuint lane_numbers() {
  vuint lanes = {};
  for (int i = 0; i < SSAH_LANES; ++i) lanes[i] = (unsigned)i;
  return lanes;
}

// Which 16 of the random bits a tensor uses.
template <int kWhich>
SSAH_INLINE vuint noise_of(vuint bits) {
  return kWhich == 0 ? bits & 0xffffu : kWhich == 1 ? bits >> 16 : (bits * 0x9e3779b1u) >> 16;
}

// bfloat16 to and from float32 in one instruction, where GCC makes five of the vector extension's.
#if SSAH_LANES == 16
SSAH_INLINE vuint widen(vushort v) {
  return (vuint)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v);
}
SSAH_INLINE vushort narrow(vuint v) {
  return (vushort)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v);
}
#else
SSAH_INLINE vuint widen(vushort v) { return __builtin_convertvector(v, vuint); }
SSAH_INLINE vushort narrow(vuint v) { return __builtin_convertvector(v, vushort); }
#endif

template <class T>
SSAH_INLINE vec<T> read(const T* p, long n) {
  return load_up_to(p, n);
}
SSAH_INLINE vfloat read(const bf16* p, long n) {
  return n >= SSAH_LANES ? (vfloat)(widen(load_raw<vushort>(p)) << 16) : load_n(p, (int)n);
}

// The upper halves of `words`, as the first n values at p.
SSAH_INLINE void store_upper(bf16* p, vuint words, long n) {
  const vushort upper = narrow(words >> 16);
  if (n >= SSAH_LANES) {
    store_raw(p, upper);
  } else {
    __builtin_memcpy(p, &upper, n * sizeof(bf16));
  }
}

// Stores x, rounded to nearest or, bfloat16 with noise, stochastically. Cutting off the lower half
// keeps an infinity; noise could carry out of a NaN, which arithmetic has made a quiet one.
template <bool kNoise, int kWhich, class T>
SSAH_INLINE void write(T* p, vec<T> x, vuint, long n) {
  store_up_to(p, x, n);
}
template <bool kNoise, int kWhich>
SSAH_INLINE void write(bf16* p, vfloat x, vuint bits, long n) {
  if constexpr (kNoise) {
    const vuint noise = noise_of<kWhich>(bits);
    store_upper(p, (vuint)x + (x == x ? noise : noise & 0u), n);
  } else {
    store_upper(p, bf16_bits(x), n);
  }
}

// Stores x rounded to nearest, and what that cut off.
template <class T>
SSAH_INLINE void write_compensated(T* p, T* compensation, vec<T> x, long n) {
  T buffer[compute<T>::lanes];
  store(buffer, x);
  store_up_to(compensation, x - load(buffer), n);
  store_up_to(p, load(buffer), n);
}
SSAH_INLINE void write_compensated(bf16* p, bf16* compensation, vfloat x, long n) {
  const vuint bits = bf16_bits(x);
  store_upper(compensation, bf16_bits(x - (vfloat)(bits & 0xffff0000u)), n);
  store_upper(p, bits, n);
}

// One run of elements that are contiguous in every tensor. `sums` are of p * g and of its square:
// a vector each for a row unit, an element each for column units.
template <class T, class S>
struct Run {
  T* p;
  const T* g;
  S *state0, *state1;
  T* compensation;
  long n;
  unsigned low;  // lower half of the first element's number
  Noise noise;
  scalar<T>*signed_sums, *squared_sums;
};

template <bool kNoise, bool kKahan, Units kUnits, class T, class S, class Rule>
SSAH_INLINE void update_vector(const Run<T, S>& r, const Rule& rule, long i, long n, vuint lanes,
                               vec<T>& signed_sum, vec<T>& squared_sum) {
  const vec<T> p = read(r.p + i, n), grad = read(r.g + i, n);
  if constexpr (kUnits != kNoUnits) {
    if constexpr (kUnits == kColumnUnits) {
      signed_sum = load(r.signed_sums + i);
      squared_sum = load(r.squared_sums + i);
    }
    const vec<T> product = p * grad;
    signed_sum += product;
    squared_sum += product * product;
    if constexpr (kUnits == kColumnUnits) {
      store(r.signed_sums + i, signed_sum);
      store(r.squared_sums + i, squared_sum);
    }
  }
  vec<T> w = p, state0 = {}, state1 = {};
  if constexpr (kKahan) w += read(r.compensation + i, n);
  if constexpr (Rule::kStates > 0) state0 = read(r.state0 + i, n);
  if constexpr (Rule::kStates > 1) state1 = read(r.state1 + i, n);
  rule.update(grad, w, state0, state1);
  vuint bits = {};
  if constexpr (kNoise) bits = r.noise.bits(lanes + (r.low + (unsigned)i));
  if constexpr (kKahan) {
    write_compensated(r.p + i, r.compensation + i, w, n);
  } else {
    write<kNoise, 0>(r.p + i, w, bits, n);
  }
  if constexpr (Rule::kStates > 0) write<kNoise, 1>(r.state0 + i, state0, bits, n);
  if constexpr (Rule::kStates > 1) write<kNoise, 2>(r.state1 + i, state1, bits, n);
}

template <bool kNoise, bool kKahan, Units kUnits, class T, class S, class Rule>
void update_run(const Run<T, S>& run, const Rule& rule) {
  const Run<T, S> r = run;  // copies that no store can alias
  const Rule local = rule;
  const vuint lanes = lane_numbers();
  vec<T> signed_sum = {}, squared_sum = {};
  long i = 0;
  for (; i + compute<T>::lanes <= r.n; i += compute<T>::lanes) {
    update_vector<kNoise, kKahan, kUnits>(r, local, i, compute<T>::lanes, lanes, signed_sum,
                                          squared_sum);
  }
  if (i < r.n) {
    update_vector<kNoise, kKahan, kUnits>(r, local, i, r.n - i, lanes, signed_sum, squared_sum);
  }
  if constexpr (kUnits == kRowUnit) {
    store(r.signed_sums, signed_sum);
    store(r.squared_sums, squared_sum);
  }
}

template <class T, class S, class Rule>
using UpdateRun = void (*)(const Run<T, S>&, const Rule&);

template <Units kUnits, class T, class S, class Rule>
SSAH_INLINE UpdateRun<T, S, Rule> choose_run(bool noise, bool kahan) {
  if constexpr (sizeof(T) == 2 || sizeof(S) == 2) {
    if (noise && kahan) return update_run<true, true, kUnits, T, S, Rule>;
    if (noise) return update_run<true, false, kUnits, T, S, Rule>;
    if (kahan) return update_run<false, true, kUnits, T, S, Rule>;
  }
  return update_run<false, false, kUnits, T, S, Rule>;
}

// Elements of a row that lie apart, side by side in `values`, and back. `columns` may be null.
template <class T>
SSAH_INLINE void gather(const T* __restrict row, const long* __restrict columns, long stride,
                        T* __restrict values, long n) {
  if (columns == nullptr || stride != 1) {
    for (long i = 0; i < n; ++i) values[i] = row[(columns == nullptr ? i : columns[i]) * stride];
    return;
  }
#pragma GCC unroll 8
  for (long i = 0; i < n; ++i) values[i] = row[columns[i]];
}
template <class T>
SSAH_INLINE void scatter(T* __restrict row, const long* __restrict columns, long stride,
                         const T* __restrict values, long n) {
  if (columns == nullptr || stride != 1) {
    for (long i = 0; i < n; ++i) row[(columns == nullptr ? i : columns[i]) * stride] = values[i];
    return;
  }
#pragma GCC unroll 8
  for (long i = 0; i < n; ++i) row[columns[i]] = values[i];
}

// Adds float sums to float64 ones and clears them.
template <class T>
SSAH_INLINE void merge_sums(scalar<T>* sums, double* totals, double factor, long n) {
  for (long i = 0; i < n; ++i) {
    totals[i] += factor * double(sums[i]);
    sums[i] = 0;
  }
}
template <class T>
SSAH_INLINE double sum_lanes(const scalar<T>* lanes) {
  double total = 0;
  for (int i = 0; i < compute<T>::lanes; ++i) total += double(lanes[i]);
  return total;
}

template <class T, class S, class Rule>
void masked_update(const UpdateTensor& t, const Rule& rule, UpdateBlock block) {
  const bool kahan = t.compensation != nullptr;
  const bool row_unit = t.signed_sum != nullptr && !t.units_are_columns;
  const bool column_units = t.signed_sum != nullptr && t.units_are_columns;
  const UpdateRun<T, S, Rule> update =
      row_unit       ? choose_run<kRowUnit, T, S, Rule>(t.stochastic, kahan)
      : column_units ? choose_run<kColumnUnits, T, S, Rule>(t.stochastic, kahan)
                     : choose_run<kNoUnits, T, S, Rule>(t.stochastic, kahan);
  const bool gathers = t.columns != nullptr || t.column_stride != 1;
  T gathered[kPiece];
  scalar<T> signed_sums[kColumnStripe + kFloatLanes] = {};
  scalar<T> squared_sums[kColumnStripe + kFloatLanes] = {};
  const double unscale = t.unscale, unscale_squared = t.unscale * t.unscale;

  for (long row = block.row_begin; row < block.row_end; ++row) {
    T* const p_row = (T*)t.param + (t.rows == nullptr ? row : t.rows[row]) * t.row_stride;
    for (long c = block.column_begin, n; c < block.column_end; c += n) {
      const unsigned long element = (unsigned long)row * t.n_columns + c;
      const unsigned long to_wrap = (1ul << 32) - (element & 0xffffffffu);
      n = block.column_end - c;
      if (n > kPiece && (row_unit || gathers)) n = kPiece;
      if ((unsigned long)n > to_wrap) n = (long)to_wrap;
      const long* const columns = t.columns == nullptr ? nullptr : t.columns + c;
      T* const p = p_row + (columns == nullptr ? c * t.column_stride : 0);
      if (gathers) gather(p, columns, t.column_stride, gathered, n);
      const long at = column_units ? c - block.column_begin : 0;
      update(Run<T, S>{gathers ? gathered : p, (const T*)t.grad + element, (S*)t.state0 + element,
                       (S*)t.state1 + element, (T*)t.compensation + element, n, (unsigned)element,
                       Noise{t.key0, t.key1 + (unsigned)(element >> 32)}, signed_sums + at,
                       squared_sums + at},
             rule);
      if (gathers) scatter(p, columns, t.column_stride, gathered, n);
      if (row_unit) {
        t.signed_sum[row] += unscale * sum_lanes<T>(signed_sums);
        t.squared_sum[row] += unscale_squared * sum_lanes<T>(squared_sums);
      }
    }
    if (column_units && (row + 1 == block.row_end || (row + 1) % kRowsPerSum == 0)) {
      const long width = block.column_end - block.column_begin;
      merge_sums<T>(signed_sums, t.signed_sum + block.column_begin, unscale, width);
      merge_sums<T>(squared_sums, t.squared_sum + block.column_begin, unscale_squared, width);
    }
  }
}

}  // namespace SSAH_ISA
}  // namespace ssah
