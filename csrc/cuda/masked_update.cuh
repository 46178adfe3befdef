// One pass over the trained elements: shared by masked_adamw_ and masked_sgd_. An element is read
// once and written once: parameter, gradient (read), states, compensation.
#pragma once

#include "launch.cuh"
#include "masked_access.cuh"
#include "masked_codes.cuh"
#include "masked_host.h"
#include "masked_importance.cuh"
#include "masked_rounding.cuh"

namespace ssah {

// A lane's part of a row of a gradient that is not compact. Where it lies is looked up for every
// row anew: held from row to row it would cost registers that compact gradients need.
template <int W, bool kIsWide, typename G>
__device__ __forceinline__ void read_indexed(Vector<G, W>& g, const G* grads, const Target& target,
                                             const Place<W, kIsWide>& place, int64_t row) {
  int64_t columns[W];
  columns_of(columns, target, place, target.grad_column_stride);
  read_at<kIsWide>(g, grads + RowIndex(target, target.grad_row_stride)[row], columns, place.valid);
}

// T, S, G: of parameter, states and gradient.
// Rule: update(g, w, state0, state1), in the arithmetic type; kStates of the states exist.
template <typename T, typename S, typename G, int W, bool kIsWide, typename Rule>
__device__ __forceinline__ void update_rows(const Target& target, const Noise& noise,
                                            const GradientFactors<Real<T>>& factors,
                                            const Rule& rule) {
  using R = Real<T>;
  const Place<W, kIsWide> place(target);
  const int valid = place.valid;
  int64_t columns[W];
  columns_of(columns, target, place, target.column_stride);
  UnitSums<R, W> sums;
  sums.clear();
  // Copies, which no store can change.
  T* const param = global(static_cast<T*>(target.param));
  const G* const grads = global(static_cast<const G*>(target.grad));
  S* const states0 = global(static_cast<S*>(target.state0));
  S* const states1 = global(static_cast<S*>(target.state1));
  T* const compensations = global(static_cast<T*>(target.compensation));
  const RowIndex param_rows(target, target.row_stride);
  const bool grad_indexed = target.grad_indexed;
  const int64_t row_columns = target.columns;
  const int64_t first_element = target.first_element;
  const bool row_units = target.dim == 0;
  const bool importance = target.signed_sums != nullptr;
  const bool compensates = sizeof(T) == 2 && compensations != nullptr;
  const int64_t row_blocks = ceil_div(row_columns, kStateBlock);
  CodedStates<R, kInCodes<S> ? W : 1> coded;
  for (int64_t row = place.row; row < place.end; row += place.row_step) {
    // Where rows are units, their sums end with the row; else with the tile.
    if (row_units) sums.clear();
    const int64_t block = row * row_blocks + place.warp_column;  // of states in codes
    if (valid > 0) {
      const int64_t element = row * row_columns + place.column;
      T* const param_row = param + param_rows[row];
      Vector<T, W> p, c;
      Vector<G, W> g;
      Vector<S, W> s0, s1;
      read_at<kIsWide>(p, param_row, columns, valid);
      if (grad_indexed) {
        read_indexed<W, kIsWide>(g, grads, target, place, row);
      } else {
        read<kIsWide>(g, grads + element, valid);
      }
      if constexpr (kInCodes<S>) {
        coded.template read<kIsWide>(0, states0 + element, target.scales[0][block], valid);
        if constexpr (Rule::kStates > 1) {
          coded.template read<kIsWide>(1, states1 + element, target.scales[1][block], valid);
        }
      } else {
        if constexpr (Rule::kStates > 0) read<kIsWide>(s0, states0 + element, valid);
        if constexpr (Rule::kStates > 1) read<kIsWide>(s1, states1 + element, valid);
      }
      if (compensates) read<kIsWide>(c, compensations + element, valid);
#pragma unroll
      for (int k = 0; k < W; ++k) {
        R w = to_real(p.at[k]);
        const R grad = to_real(g.at[k]);
        sums.add(k, w * grad * factors.unscale);  // before the update and before clipping
        if (compensates) w = compensated(p.at[k], c.at[k]);
        R state[2] = {0, 0};
        if constexpr (kInCodes<S>) {
          state[0] = coded.values[0][k];
          if constexpr (Rule::kStates > 1) state[1] = coded.values[1][k];
        } else {
          if constexpr (Rule::kStates > 0) state[0] = to_real(s0.at[k]);
          if constexpr (Rule::kStates > 1) state[1] = to_real(s1.at[k]);
        }
        rule.update(grad * factors.gradient, w, state[0], state[1]);
        const int64_t position = first_element + element + k * place.kStep;
        const uint32_t bits = noise.on ? noise.bits(position) : 0u;
        if (compensates) {
          split(w, p.at[k], c.at[k]);
        } else {
          p.at[k] = rounded<T>(w, noise.on, bits & 0xffffu);
        }
        if constexpr (kInCodes<S>) {
          coded.values[0][k] = state[0];
          if constexpr (Rule::kStates > 1) coded.values[1][k] = state[1];
        } else {
          if constexpr (Rule::kStates > 0) s0.at[k] = rounded<S>(state[0], noise.on, bits >> 16);
          if constexpr (Rule::kStates > 1) {
            s1.at[k] = rounded<S>(state[1], noise.on, (bits * 0x9e3779b1u) >> 16);
          }
        }
      }
      write_at<kIsWide>(param_row, p, columns, valid);
      if constexpr (!kInCodes<S>) {
        if constexpr (Rule::kStates > 0) write<kIsWide>(states0 + element, s0, valid);
        if constexpr (Rule::kStates > 1) write<kIsWide>(states1 + element, s1, valid);
      }
      if (compensates) write<kIsWide>(compensations + element, c, valid);
    }
    if constexpr (kInCodes<S>) {
      const int64_t element = row * row_columns + place.column;
      coded.template write<kIsWide>(0, states0 + element, target.scales[0] + block, valid);
      if constexpr (Rule::kStates > 1) {
        coded.template write<kIsWide>(1, states1 + element, target.scales[1] + block, valid);
      }
    }
    if (importance && row_units) sums.write_row(target, place.warp_column, row);
  }
  if (importance && !row_units) sums.write_columns(target, place);
}

template <typename R, typename Rule>
struct UpdateShared {
  GradientFactors<R> factors;
  Rule rule;
};

// The block's part of an update; `settings` is what the rule needs beside the call's scalars.
template <typename T, typename S, typename G, typename Rule>
__device__ __forceinline__ void masked_update(const Targets& targets, const UpdateScalars& scalars,
                                              const typename Rule::Settings& settings) {
  if (is_set(scalars.found_inf)) return;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  auto& shared = *reinterpret_cast<UpdateShared<Real<T>, Rule>*>(shared_memory);
  // One thread reads the scalars and takes the powers, which are slow in float64 on a GPU.
  if (threadIdx.x == 0) {
    shared.factors = GradientFactors<Real<T>>(scalars);
    shared.rule = Rule(settings, scalars);
  }
  __syncthreads();
  const Target& target = targets.table[find_target<&Target::first_block>(targets, blockIdx.x)];
  const GradientFactors<Real<T>> factors = shared.factors;
  const Rule rule = shared.rule;
  const Noise noise(scalars, target.number);
  if (target.wide) {
    update_rows<T, S, G, kWideColumns<T, S>, true>(target, noise, factors, rule);
  } else {
    update_rows<T, S, G, kNarrowColumns<T, S>, false>(target, noise, factors, rule);
  }
}

template <typename R>
cudaError_t launch_add_importance(const Table& table, const UpdateScalars& scalars,
                                  cudaStream_t stream) {
  if (table.units == 0) return cudaSuccess;
  return launch(add_importance_kernel<R>, ceil_div(table.units, kThreads), 1, 0, stream,
                table.targets, table.units, scalars.found_inf);
}

}  // namespace ssah
