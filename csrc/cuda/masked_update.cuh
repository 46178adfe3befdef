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

// What a lane holds of a row. Types: of parameter, states and gradient.
template <typename T, typename S, typename G, int W>
struct RowValues {
  int64_t row;
  int64_t element;  // of the compact tensors
  T* param;         // where the row starts
  Vector<T, W> p, c;
  Vector<G, W> g;
  Vector<S, W> s0, s1;
};

// A lane's part of a target. Most tensors are plain: compact and contiguous in 16-byte vectors,
// with neither importance nor compensation. They have a loop of their own, with two rows in flight
// and without a question about what they do not have (kPlain). Rule: update(g, w, state0, state1),
// in the arithmetic type; kStates of the states exist.
template <typename T, typename S, typename G, int W, bool kIsWide, bool kPlain, typename Rule>
struct LaneUpdate {
  using R = Real<T>;
  using Row = RowValues<T, S, G, W>;
  static constexpr bool kCoded = kInCodes<S>;
  static constexpr int kTogether = W == 1 ? 1 : 2;  // elements, as they are rounded

  const Target& target;
  const Noise& noise;
  const GradientFactors<R>& factors;
  const Rule& rule;
  const Place<W, kIsWide> place;
  // Copies, which no store can change.
  T* const param;
  const G* const grads;
  S* const states0;
  S* const states1;
  T* const compensations;
  const RowIndex param_rows;
  const int64_t row_columns;
  const int64_t first_element;
  const bool compensates;
  const bool importance;
  int64_t columns[W];
  UnitSums<R, W> sums;
  CodedStates<R, kCoded ? W : 1> coded;

  __device__ __forceinline__ LaneUpdate(const Target& target_, const Noise& noise_,
                                        const GradientFactors<R>& factors_, const Rule& rule_)
      : target(target_),
        noise(noise_),
        factors(factors_),
        rule(rule_),
        place(target_),
        param(global(static_cast<T*>(target.param))),
        grads(global(static_cast<const G*>(target.grad))),
        states0(global(static_cast<S*>(target.state0))),
        states1(global(static_cast<S*>(target.state1))),
        compensations(global(static_cast<T*>(target.compensation))),
        param_rows(target, target.row_stride),
        row_columns(target.columns),
        first_element(target.first_element),
        compensates(!kPlain && sizeof(T) == 2 && target.compensation != nullptr),
        importance(!kPlain && target.signed_sums != nullptr) {
    columns_of(columns, target, place, target.column_stride);
    sums.clear();
  }

  // Where the gradient is not compact, where it lies is looked up for every row anew: held from row
  // to row it would cost registers that compact gradients need.
  __device__ __forceinline__ void load_gradient(Row& at) const {
    if (kPlain || !target.grad_indexed) {
      read<kIsWide>(at.g, grads + at.element, place.valid);
      return;
    }
    int64_t grad_columns[W];
    columns_of(grad_columns, target, place, target.grad_column_stride);
    const RowIndex rows(target, target.grad_row_stride);
    read_at<kIsWide>(at.g, grads + rows[at.row], grad_columns, place.valid);
  }

  __device__ __forceinline__ void load(Row& at, int64_t row) {
    at.row = row;
    at.element = row * row_columns + place.column;
    if constexpr (kPlain) {
      at.param = param + at.element;
      read<kIsWide>(at.p, at.param, place.valid);
    } else {
      at.param = param + param_rows[row];
      read_at<kIsWide>(at.p, at.param, columns, place.valid);
    }
    load_gradient(at);
    if constexpr (kCoded) {
      const int64_t block = block_of(row);
      coded.template read<kIsWide>(0, states0 + at.element, target.scales[0][block], place.valid);
      if constexpr (Rule::kStates > 1) {
        coded.template read<kIsWide>(1, states1 + at.element, target.scales[1][block], place.valid);
      }
    } else {
      if constexpr (Rule::kStates > 0) read<kIsWide>(at.s0, states0 + at.element, place.valid);
      if constexpr (Rule::kStates > 1) read<kIsWide>(at.s1, states1 + at.element, place.valid);
    }
    if (compensates) read<kIsWide>(at.c, compensations + at.element, place.valid);
  }

  // The row's block of states in codes.
  __device__ __forceinline__ int64_t block_of(int64_t row) const {
    return row * ceil_div(row_columns, kStateBlock) + place.warp_column;
  }

  template <bool kNoise>
  __device__ __forceinline__ void update(Row& at) {
    const int64_t position = first_element + at.element;
    const Noise::RowNoise row_noise(noise, position);
#pragma unroll
    for (int k = 0; k < W; k += kTogether) {
      R w[kTogether];
      R state[2][kTogether] = {};
      uint32_t bits[kTogether] = {};
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        w[i] = real_at(at.p, k + i);
        const R grad = real_at(at.g, k + i);
        if constexpr (!kPlain) {
          sums.add(k + i, w[i] * grad * factors.unscale);  // before the update and clipping
          if (compensates) w[i] = compensated(at.p.at[k + i], at.c.at[k + i]);
        }
        if constexpr (kCoded) {
          state[0][i] = coded.values[0][k + i];
          if constexpr (Rule::kStates > 1) state[1][i] = coded.values[1][k + i];
        } else {
          if constexpr (Rule::kStates > 0) state[0][i] = real_at(at.s0, k + i);
          if constexpr (Rule::kStates > 1) state[1][i] = real_at(at.s1, k + i);
        }
        rule.update(grad * factors.gradient, w[i], state[0][i], state[1][i]);
        if constexpr (kNoise && kIsWide) bits[i] = row_noise.bits(k + i);
        if constexpr (kNoise && !kIsWide) bits[i] = noise.bits(position + (k + i) * kLanes);
      }
      if (compensates) {
#pragma unroll
        for (int i = 0; i < kTogether; ++i) split(w[i], at.p.at[k + i], at.c.at[k + i]);
      } else {
        round_together<kNoise>(at.p, k, w, bits, [](uint32_t b) { return b & 0xffffu; });
      }
      if constexpr (kCoded) {
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          coded.values[0][k + i] = state[0][i];
          if constexpr (Rule::kStates > 1) coded.values[1][k + i] = state[1][i];
        }
      } else {
        if constexpr (Rule::kStates > 0) {
          round_together<kNoise>(at.s0, k, state[0], bits, [](uint32_t b) { return b >> 16; });
        }
        if constexpr (Rule::kStates > 1) {
          round_together<kNoise>(at.s1, k, state[1], bits,
                                 [](uint32_t b) { return b * 0x9e3779b1u >> 16; });
        }
      }
    }
  }

  __device__ __forceinline__ void store(const Row& at) {
    if constexpr (kPlain) {
      write<kIsWide>(at.param, at.p, place.valid);
    } else {
      write_at<kIsWide>(at.param, at.p, columns, place.valid);
    }
    if constexpr (!kCoded) {
      if constexpr (Rule::kStates > 0) write<kIsWide>(states0 + at.element, at.s0, place.valid);
      if constexpr (Rule::kStates > 1) write<kIsWide>(states1 + at.element, at.s1, place.valid);
    }
    if (compensates) write<kIsWide>(compensations + at.element, at.c, place.valid);
  }

  // By all lanes of a warp, also those without elements.
  __device__ __forceinline__ void store_codes(int64_t row) {
    if constexpr (kCoded) {
      const int64_t element = row * row_columns + place.column;
      const int64_t block = block_of(row);
      coded.template write<kIsWide>(0, states0 + element, target.scales[0] + block, place.valid);
      if constexpr (Rule::kStates > 1) {
        coded.template write<kIsWide>(1, states1 + element, target.scales[1] + block, place.valid);
      }
    }
  }

  template <bool kNoise>
  __device__ __forceinline__ void run() {
    if constexpr (kPlain) {
      if (place.valid == 0) return;
      for (int64_t row = place.row; row < place.end; row += 2 * place.row_step) {
        const bool two = row + place.row_step < place.end;
        Row rows[2];
        load(rows[0], row);
        if (two) load(rows[1], row + place.row_step);
        update<kNoise>(rows[0]);
        store(rows[0]);
        if (!two) break;
        update<kNoise>(rows[1]);
        store(rows[1]);
      }
    } else {
      const bool row_units = target.dim == 0;
      for (int64_t row = place.row; row < place.end; row += place.row_step) {
        // Where rows are units, their sums end with the row; else with the tile.
        if (row_units) sums.clear();
        if (place.valid > 0) {
          Row at;
          load(at, row);
          update<kNoise>(at);
          store(at);
        }
        store_codes(row);
        if (importance && row_units) sums.write_row(target, place.warp_column, row);
      }
      if (importance && !row_units) sums.write_columns(target, place);
    }
  }
};

template <typename T, typename S, typename G, int W, bool kIsWide, bool kPlain, typename Rule>
__device__ __forceinline__ void update_rows(const Target& target, const Noise& noise,
                                            const GradientFactors<Real<T>>& factors,
                                            const Rule& rule) {
  constexpr bool kTakesNoise = kIsBfloat16<T> || kIsBfloat16<S>;
  LaneUpdate<T, S, G, W, kIsWide, kPlain, Rule> lane(target, noise, factors, rule);
  if (kTakesNoise && noise.on) {
    lane.template run<kTakesNoise>();
  } else {
    lane.template run<false>();
  }
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
  constexpr int kColumns = kWideColumns<T, S>;
  if (!target.wide) {
    update_rows<T, S, G, kNarrowColumns<T, S>, false, false>(target, noise, factors, rule);
  } else if (kInCodes<S> || !target.plain) {
    update_rows<T, S, G, kColumns, true, false>(target, noise, factors, rule);
  } else {
    update_rows<T, S, G, kColumns, true, !kInCodes<S>>(target, noise, factors, rule);
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
