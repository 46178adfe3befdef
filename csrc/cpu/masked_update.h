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

constexpr long kPiece = 512;           // elements between merges of a unit's sums into float64
constexpr long kPrefetch = 1024;       // bytes ahead of the four streams
constexpr long kRowsOfFloatSums = 64;  // rows between merges of column sums into float64

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

// x as it reads back after it was stored as a T.
template <class T>
SSAH_INLINE vec<T> as_stored(vec<T> x) {
  T buffer[compute<T>::lanes];
  store(buffer, x);
  return load(buffer);
}

// Which 16 of the random bits a tensor uses.
template <int kWhich>
SSAH_INLINE vuint noise_of(vuint bits) {
  return kWhich == 0 ? bits & 0xffffu : kWhich == 1 ? bits >> 16 : (bits * 0x9e3779b1u) >> 16;
}

// Stores x, rounded to nearest or, bfloat16 with noise, stochastically.
template <bool kNoise, int kWhich, class T>
SSAH_INLINE void store_with_noise(T* p, vec<T> x, vuint, long n) {
  store_up_to(p, x, n);
}
template <bool kNoise, int kWhich>
SSAH_INLINE void store_with_noise(bf16* p, vfloat x, vuint bits, long n) {
  if constexpr (kNoise) {
    vuint word = (vuint)x;
    vuint noisy = word + noise_of<kWhich>(bits);
    // x - x is 0 for a finite x alone; a NaN stays one when its lower half is cut off.
    word = x - x == 0.0f ? noisy : x == x ? word : word | 0x400000u;
    vushort upper = __builtin_convertvector(word >> 16, vushort);
    if (n >= SSAH_LANES) {
      store_raw(p, upper);
    } else {
      __builtin_memcpy(p, &upper, n * sizeof(bf16));
    }
  } else {
    store_up_to(p, x, n);
  }
}

// One run of elements that are contiguous in every tensor. `sums` are two rows of float sums, p * g
// and its square; `advance` is 0 when all elements are of one unit, 1 when each is of its own.
template <class T, class S>
struct Run {
  T* p;
  const T* g;
  S *state0, *state1;
  T* compensation;
  long n;
  unsigned low;  // of the first element's number
  Noise noise;
  scalar<T>*signed_sums, *squared_sums;
  int advance;
};

template <bool kFull, bool kNoise, bool kKahan, bool kUnits, class T, class S, class Rule>
SSAH_INLINE void update_vector(const Run<T, S>& r, const Rule& rule, long i, vuint lanes) {
  const long n = kFull ? compute<T>::lanes : r.n - i;
  const vec<T> p = load_up_to(r.p + i, n), grad = load_up_to(r.g + i, n);
  if constexpr (kUnits) {
    scalar<T>*signed_sum = r.signed_sums + i * r.advance,
    *squared_sum = r.squared_sums + i * r.advance;
    const vec<T> product = p * grad;
    store(signed_sum, load(signed_sum) + product);
    store(squared_sum, load(squared_sum) + product * product);
  }
  vec<T> w = p, state0 = {}, state1 = {};
  if constexpr (kKahan) w += load_up_to(r.compensation + i, n);
  if constexpr (Rule::kStates > 0) state0 = load_up_to(r.state0 + i, n);
  if constexpr (Rule::kStates > 1) state1 = load_up_to(r.state1 + i, n);
  rule.update(grad, w, state0, state1);
  vuint bits = {};
  if constexpr (kNoise) bits = r.noise.bits(lanes + (r.low + (unsigned)i));
  if constexpr (kKahan) {
    const vec<T> stored = as_stored<T>(w);
    store_up_to(r.compensation + i, w - stored, n);
    store_up_to(r.p + i, stored, n);
  } else {
    store_with_noise<kNoise, 0>(r.p + i, w, bits, n);
  }
  if constexpr (Rule::kStates > 0) store_with_noise<kNoise, 1>(r.state0 + i, state0, bits, n);
  if constexpr (Rule::kStates > 1) store_with_noise<kNoise, 2>(r.state1 + i, state1, bits, n);
}

template <bool kNoise, bool kKahan, bool kUnits, class T, class S, class Rule>
void update_run(const Run<T, S>& run, const Rule& rule) {
  const Run<T, S> r = run;  // a copy that no store can alias
  const Rule local = rule;
  const vuint lanes = lane_numbers();
  long i = 0;
  for (; i + compute<T>::lanes <= r.n; i += compute<T>::lanes) {
    if (i % (64 / sizeof(T)) == 0) {
      __builtin_prefetch((const char*)(r.p + i) + kPrefetch);
      __builtin_prefetch((const char*)(r.g + i) + kPrefetch);
    }
    if (i % (64 / sizeof(S)) == 0) {
      if constexpr (Rule::kStates > 0) __builtin_prefetch((const char*)(r.state0 + i) + kPrefetch);
      if constexpr (Rule::kStates > 1) __builtin_prefetch((const char*)(r.state1 + i) + kPrefetch);
    }
    update_vector<true, kNoise, kKahan, kUnits>(r, local, i, lanes);
  }
  if (i < r.n) update_vector<false, kNoise, kKahan, kUnits>(r, local, i, lanes);
}

template <class T, class S, class Rule>
using UpdateRun = void (*)(const Run<T, S>&, const Rule&);

template <bool kUnits, class T, class S, class Rule>
SSAH_INLINE UpdateRun<T, S, Rule> choose_run(bool noise, bool kahan) {
  constexpr bool has_bf16 = sizeof(T) == 2 || sizeof(S) == 2;
  if constexpr (has_bf16) {
    if (noise && kahan) return update_run<true, true, kUnits, T, S, Rule>;
    if (noise) return update_run<true, false, kUnits, T, S, Rule>;
  }
  if (kahan) return update_run<false, true, kUnits, T, S, Rule>;
  return update_run<false, false, kUnits, T, S, Rule>;
}

// Adds float sums to float64 ones and clears them: `one_unit` adds all of them to totals[0].
template <class T>
SSAH_INLINE void merge_sums(scalar<T>* sums, double* totals, double factor, long n, bool one_unit) {
  for (long i = 0; i < n; ++i) {
    totals[one_unit ? 0 : i] += factor * double(sums[i]);
    sums[i] = 0;
  }
}

template <class T, class S, class Rule>
void masked_update(const UpdateTensor& t, const Rule& rule, UpdateBlock block) {
  constexpr int lanes = compute<T>::lanes;
  const bool units = t.signed_sum != nullptr;
  const bool gathers = t.columns != nullptr || t.column_stride != 1;
  const UpdateRun<T, S, Rule> update =
      units ? choose_run<true, T, S, Rule>(t.stochastic, t.compensation != nullptr)
            : choose_run<false, T, S, Rule>(t.stochastic, t.compensation != nullptr);
  scalar<T> signed_sums[kPiece + lanes] = {}, squared_sums[kPiece + lanes] = {};
  T gathered[kPiece];

  // Column units keep their sums over rows: a piece of columns at a time, all rows of it.
  const long width = block.column_end - block.column_begin;
  const long stripe = units && t.units_are_columns ? kPiece : width;
  for (long left = block.column_begin; left < block.column_end; left += stripe) {
    const long right = left + stripe < block.column_end ? left + stripe : block.column_end;
    for (long row = block.row_begin; row < block.row_end; ++row) {
      T* const p_row = (T*)t.param + (t.rows == nullptr ? row : t.rows[row]) * t.row_stride;
      const auto at = [&](long c) __attribute__((always_inline)) {
        return (t.columns == nullptr ? c : t.columns[c]) * t.column_stride;
      };
      for (long c = left, n; c < right; c += n) {
        const unsigned long element = (unsigned long)row * t.n_columns + c;
        const unsigned long to_wrap = (1ul << 32) - (element & 0xffffffffu);
        n = right - c;
        if (n > kPiece && (units || gathers)) n = kPiece;
        if ((unsigned long)n > to_wrap) n = (long)to_wrap;
        if (gathers) {
          for (long i = 0; i < n; ++i) gathered[i] = p_row[at(c + i)];
        }
        const bool sum_per_column = units && t.units_are_columns;
        update(
            Run<T, S>{gathers ? gathered : p_row + c, (const T*)t.grad + element,
                      (S*)t.state0 + element, (S*)t.state1 + element, (T*)t.compensation + element,
                      n, (unsigned)element, Noise{t.key0, t.key1 + (unsigned)(element >> 32)},
                      signed_sums + (sum_per_column ? c - left : 0),
                      squared_sums + (sum_per_column ? c - left : 0), sum_per_column},
            rule);
        if (gathers) {
          for (long i = 0; i < n; ++i) p_row[at(c + i)] = gathered[i];
        }
        if (units && !t.units_are_columns) {
          merge_sums<T>(signed_sums, t.signed_sum + row, t.unscale, lanes, true);
          merge_sums<T>(squared_sums, t.squared_sum + row, t.unscale * t.unscale, lanes, true);
        }
      }
      const bool last = row + 1 == block.row_end;
      if (units && t.units_are_columns && (last || (row + 1) % kRowsOfFloatSums == 0)) {
        merge_sums<T>(signed_sums, t.signed_sum + left, t.unscale, right - left, false);
        merge_sums<T>(squared_sums, t.squared_sum + left, t.unscale * t.unscale, right - left,
                      false);
      }
    }
  }
}

}  // namespace SSAH_ISA
}  // namespace ssah
