// Importance of units within an update: sums of p g and of (p g)^2, in two deterministic stages. A
// warp leaves those of its 16 rows, or of its columns, as parts in the workspace; then
// add_importance_kernel adds every unit's parts, in order and in float64, to the results.
#pragma once

#include "masked_rounding.cuh"
#include "masked_tiles.cuh"

namespace ssah {

// Sums of one lane: of its columns over the rows, or of the row at hand.
template <typename R, int W>
struct UnitSums {
  R signed_sums[W];
  R squared_sums[W];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int k = 0; k < W; ++k) signed_sums[k] = squared_sums[k] = 0;
  }
  __device__ __forceinline__ void add(int k, R product) {
    signed_sums[k] += product;
    squared_sums[k] += product * product;
  }
  __device__ __forceinline__ void write_row(const Target& target, int64_t warp_column,
                                            int64_t row) const {
    R one = 0;
    R two = 0;
#pragma unroll
    for (int k = 0; k < W; ++k) {
      one += signed_sums[k];
      two += squared_sums[k];
    }
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      one += __shfl_xor_sync(0xffffffffu, one, distance);
      two += __shfl_xor_sync(0xffffffffu, two, distance);
    }
    if (threadIdx.x % kLanes != 0) return;
    R* parts = static_cast<R*>(target.parts);
    parts[warp_column * target.rows + row] = one;
    parts[(target.n_parts + warp_column) * target.rows + row] = two;
  }
  template <bool kIsWide>
  __device__ __forceinline__ void write_columns(const Target& target,
                                                const Place<W, kIsWide>& place) const {
    R* parts = static_cast<R*>(target.parts);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      if (k >= place.valid) continue;
      const int64_t unit = place.column + k * place.kStep;
      parts[place.warp_row * target.columns + unit] = signed_sums[k];
      parts[(target.n_parts + place.warp_row) * target.columns + unit] = squared_sums[k];
    }
  }
};

// One thread a unit, over the units of all targets.
template <typename R>
static __global__ void __launch_bounds__(kThreads)
    add_importance_kernel(Targets targets, int64_t n_units, const double* found_inf) {
  if (is_set(found_inf)) return;  // and nobody has left any parts
  const int64_t position = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (position >= n_units) return;
  const Target& target = targets.table[find_target<&Target::first_unit>(targets, position)];
  const int64_t unit = position - target.first_unit;
  const int64_t units = target.dim == 0 ? target.rows : target.columns;
  const R* parts = static_cast<const R*>(target.parts) + unit;
  double signed_sum = 0;
  double squared_sum = 0;
#pragma unroll 4
  for (int64_t part = 0; part < target.n_parts; ++part) {
    signed_sum += static_cast<double>(parts[part * units]);
    squared_sum += static_cast<double>(parts[(target.n_parts + part) * units]);
  }
  target.signed_sums[unit] += signed_sum;
  target.squared_sums[unit] += squared_sum;
}

}  // namespace ssah
