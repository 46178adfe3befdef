// One pass over the trained elements of a parameter: shared by masked_adamw_ and masked_sgd_.
//
// Per element and in this order: read p, g and the states, update in float32 (float64 for f64),
// write p and the states. Bytes moved per element: AdamW in f32 28, in bf16 with bf16 state 14,
// with f32 state 22, with state in 8 bits 10 and 16/256 for the scales (of f32 parameters 16 and
// 16/256); SGD with momentum in f32 20; a float32 gradient of a parameter of 16 bits 2 more. Noise
// and rounding are specified, to the bit, in ssah_kernels/reference/masked_update.py.
#pragma once

#include "masked_codes.h"
#include "masked_rounding.h"

namespace ssah {
namespace SSAH_ISA {

constexpr long kPiece = 1024;     // elements between merges of a row unit's sums into float64
constexpr long kRowsPerSum = 64;  // rows between merges of column units' sums into float64

// When a rule is used: with compensations, without, or either way.
enum Compensated { kNever, kMaybe, kAlways };

// Whose sums of p * g and its square are kept: nobody's, one unit's (a row), one per element.
enum Units { kNoUnits, kRowUnit, kColumnUnits };

// One run of elements that are contiguous in every tensor. `sums` are of p * g and of its square:
// a vector each for a row unit, an element each for column units.
template <class T, class S>
struct Run {
  T* p;
  const void* g;  // of T; or float, of a parameter of 16 bits
  S *state0, *state1;
  T* compensation;
  long n;
  unsigned low;  // lower half of the first element's number
  Noise noise;
  scalar<T>*signed_sums, *squared_sums;
};

template <bool kNoise, bool kCompensates, Units kUnits, class G, class T, class S, class Rule>
SSAH_INLINE void update_vector(const Run<T, S>& r, const Rule& rule, long i, long n, vuint lanes,
                               vec<T>& signed_sum, vec<T>& squared_sum) {
  const vec<T> p = load_up_to(r.p + i, n), grad = load_up_to((const G*)r.g + i, n);
  if constexpr (kUnits != kNoUnits) {
    if constexpr (kUnits == kColumnUnits) {
      signed_sum = load(r.signed_sums + i);
      squared_sum = load(r.squared_sums + i);
    }
    const vec<T> product = p * grad;
    signed_sum += product;
    squared_sum = mul_add(product, product, squared_sum);
    if constexpr (kUnits == kColumnUnits) {
      store(r.signed_sums + i, signed_sum);
      store(r.squared_sums + i, squared_sum);
    }
  }
  vec<T> w = p, state0 = {}, state1 = {};
  if constexpr (kCompensates)
    w = compensated((const T*)nullptr, w, load_up_to(r.compensation + i, n));
  if constexpr (Rule::kStates > 0) state0 = load_up_to(r.state0 + i, n);
  if constexpr (Rule::kStates > 1) state1 = load_up_to(r.state1 + i, n);
  rule.update(grad, w, state0, state1);
  vuint bits = {};
  if constexpr (kNoise) bits = r.noise.bits(lanes + (r.low + (unsigned)i));
  if constexpr (kCompensates) {
    write_compensated(r.p + i, r.compensation + i, w, n);
  } else {
    write<kNoise, 0>(r.p + i, w, bits, n);
  }
  if constexpr (Rule::kStates > 0) write<kNoise, 1>(r.state0 + i, state0, bits, n);
  if constexpr (Rule::kStates > 1) write<kNoise, 2>(r.state1 + i, state1, bits, n);
}

// As update_vector, on two vectors of neighbours; `numbers` are the lower halves of the even ones'.
template <bool kNoise, bool kCompensates, Units kUnits, class Rule>
SSAH_INLINE void update_pair(const Run<bf16, bf16>& r, const Rule& rule, long i, vuint numbers,
                             vfloat& signed_sum, vfloat& squared_sum) {
  vfloat w[2], grad[2], rest[2], state0[2] = {}, state1[2] = {};
  vuint bits[2] = {};
  read_pair(r.p + i, w);
  read_pair((const bf16*)r.g + i, grad);
  if constexpr (kCompensates) read_pair(r.compensation + i, rest);
  if constexpr (Rule::kStates > 0) read_pair(r.state0 + i, state0);
  if constexpr (Rule::kStates > 1) read_pair(r.state1 + i, state1);
  for (int half = 0; half < 2; ++half) {
    if constexpr (kUnits == kRowUnit) {
      const vfloat product = w[half] * grad[half];
      signed_sum += product;
      squared_sum = mul_add(product, product, squared_sum);
    }
    if constexpr (kCompensates) w[half] = compensated((const bf16*)nullptr, w[half], rest[half]);
    rule.update(grad[half], w[half], state0[half], state1[half]);
    if constexpr (kNoise) bits[half] = r.noise.bits(numbers + (unsigned)half);
  }
  if constexpr (kCompensates) {
    write_compensated_pair(r.p + i, r.compensation + i, w);
  } else {
    write_pair<kNoise, 0>(r.p + i, w, bits);
  }
  if constexpr (Rule::kStates > 0) write_pair<kNoise, 1>(r.state0 + i, state0, bits);
  if constexpr (Rule::kStates > 1) write_pair<kNoise, 2>(r.state1 + i, state1, bits);
}

template <class G, class T, class S>
constexpr bool kPairs = false;
template <>
constexpr bool kPairs<bf16, bf16, bf16> = true;

// G: the type of the gradient.
template <bool kNoise, bool kCompensates, Units kUnits, class G, class T, class S, class Rule>
void update_run(const Run<T, S>& run, const Rule& rule) {
  const Run<T, S> r = run;  // copies that no store can alias
  const Rule local = rule;
  const vuint lanes = lane_numbers();
  vec<T> signed_sum = {}, squared_sum = {};
  long i = 0;
  if constexpr (kPairs<G, T, S> && kUnits != kColumnUnits) {
    vuint numbers = 2 * lanes + r.low;
    for (; i + 2 * SSAH_LANES <= r.n; i += 2 * SSAH_LANES, numbers += 2 * SSAH_LANES) {
      update_pair<kNoise, kCompensates, kUnits>(r, local, i, numbers, signed_sum, squared_sum);
    }
  }
  for (; i + compute<T>::lanes <= r.n; i += compute<T>::lanes) {
    update_vector<kNoise, kCompensates, kUnits, G>(r, local, i, compute<T>::lanes, lanes,
                                                   signed_sum, squared_sum);
  }
  if (i < r.n) {
    update_vector<kNoise, kCompensates, kUnits, G>(r, local, i, r.n - i, lanes, signed_sum,
                                                   squared_sum);
  }
  if constexpr (kUnits == kRowUnit) {
    store(r.signed_sums, signed_sum);
    store(r.squared_sums, squared_sum);
  }
}

template <class T, class S, class Rule>
using UpdateRun = void (*)(const Run<T, S>&, const Rule&);

template <Units kUnits, class G, class T, class S, class Rule>
SSAH_INLINE UpdateRun<T, S, Rule> choose_run(bool noise, bool compensates) {
  if constexpr (sizeof(T) == 2 && Rule::kCompensated != kNever) {
    if (noise && compensates) return update_run<true, true, kUnits, G, T, S, Rule>;
    if (compensates) return update_run<false, true, kUnits, G, T, S, Rule>;
  }
  if constexpr (Rule::kCompensated != kAlways) {
    if constexpr (sizeof(T) == 2 || sizeof(S) == 2) {
      if (noise) return update_run<true, false, kUnits, G, T, S, Rule>;
    }
    return update_run<false, false, kUnits, G, T, S, Rule>;
  }
  return nullptr;
}
template <class G, class T, class S, class Rule>
SSAH_INLINE UpdateRun<T, S, Rule> choose_run(const UpdateTensor& t) {
  const bool noise = t.stochastic, compensates = t.compensation != nullptr;
  if (t.signed_sum == nullptr) return choose_run<kNoUnits, G, T, S, Rule>(noise, compensates);
  return t.units_are_columns ? choose_run<kColumnUnits, G, T, S, Rule>(noise, compensates)
                             : choose_run<kRowUnit, G, T, S, Rule>(noise, compensates);
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

// Of a row of the gradient, those n elements that are its columns `first` and on.
template <class T>
SSAH_INLINE void gather_grad(const UpdateTensor& t, const void* row, long first, void* values,
                             long n) {
  const long* const columns = t.grad_columns == nullptr ? nullptr : t.grad_columns + first;
  const long skipped = columns == nullptr ? first * t.grad_column_stride : 0;
  if (sizeof(T) == 2 && t.wide_grad) {
    gather((const float*)row + skipped, columns, t.grad_column_stride, (float*)values, n);
  } else {
    gather((const T*)row + skipped, columns, t.grad_column_stride, (T*)values, n);
  }
}

// Adds float sums to float64 ones and clears them.
template <class T>
SSAH_INLINE void merge_sums(scalar<T>* sums, double* totals, double factor, long n) {
  for (long i = 0; i < n; ++i) {
    totals[i] += factor * double(sums[i]);
    sums[i] = 0;
  }
}

// Sum of the lanes in float64, pairwise: a chain of additions would cost as much as the update of
// a hundred elements.
SSAH_INLINE double sum_lanes(vdouble lanes) {
  double sums[SSAH_LANES / 2];
  store_raw(sums, lanes);
  for (int n = SSAH_LANES / 4; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) sums[i] += sums[i + n];
  }
  return sums[0];
}
SSAH_INLINE double sum_lanes(vfloat lanes) {
  typedef vector_of<float, SSAH_LANES / 2>::type vhalf;
  vhalf halves[2];
  __builtin_memcpy(halves, &lanes, sizeof(lanes));
  return sum_lanes(__builtin_convertvector(halves[0], vdouble) +
                   __builtin_convertvector(halves[1], vdouble));
}

template <class T, class S, class Rule>
void masked_update(const UpdateTensor& t, const Rule& rule, UpdateBlock block) {
  const bool row_unit = t.signed_sum != nullptr && !t.units_are_columns;
  const bool column_units = t.signed_sum != nullptr && t.units_are_columns;
  typedef typename StateBlock<T, S>::Values V;
  UpdateRun<T, V, Rule> update = choose_run<T, T, V, Rule>(t);
  long grad_bytes = sizeof(T);
  if constexpr (sizeof(T) == 2) {
    if (t.wide_grad) {
      update = choose_run<float, T, V, Rule>(t);
      grad_bytes = sizeof(float);
    }
  }
  StateBlock<T, S> states(t);
  const bool gathers = t.columns != nullptr || t.column_stride != 1;
  const bool gathers_grad = t.grad_columns != nullptr || t.grad_column_stride != 1;
  T gathered[kPiece];
  scalar<T> gathered_grad[kPiece];  // of the type that the gradient has
  scalar<T> signed_sums[kColumnStripe + kFloatLanes], squared_sums[kColumnStripe + kFloatLanes];
  if (column_units) {
    __builtin_memset(signed_sums, 0, sizeof(signed_sums));
    __builtin_memset(squared_sums, 0, sizeof(squared_sums));
  }
  const double unscale = t.unscale, unscale_squared = t.unscale * t.unscale;

  for (long row = block.row_begin; row < block.row_end; ++row) {
    T* const p_row = (T*)t.param + (t.rows == nullptr ? row : t.rows[row]) * t.row_stride;
    const char* const g_row =
        (const char*)t.grad +
        (t.grad_rows == nullptr ? row : t.grad_rows[row]) * t.grad_row_stride * grad_bytes;
    for (long c = block.column_begin, n; c < block.column_end; c += n) {
      const unsigned long element = (unsigned long)row * t.n_columns + c;
      const unsigned long to_wrap = (1ul << 32) - (element & 0xffffffffu);
      n = block.column_end - c;
      if (n > kPiece && (row_unit || gathers || gathers_grad)) n = kPiece;
      if ((unsigned long)n > to_wrap) n = (long)to_wrap;
      n = states.template begin<Rule::kStates>(row, c, n);
      const long* const columns = t.columns == nullptr ? nullptr : t.columns + c;
      T* const p = p_row + (columns == nullptr ? c * t.column_stride : 0);
      if (gathers) gather(p, columns, t.column_stride, gathered, n);
      const void* g = g_row + c * grad_bytes;
      if (gathers_grad) {
        gather_grad<T>(t, g_row, c, gathered_grad, n);
        g = gathered_grad;
      }
      const long at = column_units ? c - block.column_begin : 0;
      update(Run<T, V>{gathers ? gathered : p, g, states.at(0, element, c),
                       states.at(1, element, c), (T*)t.compensation + element, n, (unsigned)element,
                       Noise{t.key0, t.key1 + (unsigned)(element >> 32)}, signed_sums + at,
                       squared_sums + at},
             rule);
      states.template end<Rule::kStates>(row, c + n);
      if (gathers) scatter(p, columns, t.column_stride, gathered, n);
      if (row_unit) {
        t.signed_sum[row] += unscale * sum_lanes(load(signed_sums));
        t.squared_sum[row] += unscale_squared * sum_lanes(load(squared_sums));
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
