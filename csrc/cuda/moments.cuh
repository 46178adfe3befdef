// Count, mean and M2 (sum of squared deviations) of every channel, in two deterministic stages.
//
// Stage 1, in the operators' kernels. A lane takes four rows at a time from registers: their sum
// and their sum of squares about the mean, by halves. Two sets of n values with sums a and b have,
// about their common mean, what each has about its own and (a - b)^2 / (2 n) more. Example: 1, 2,
// 4, 9 are 1/2 (1, 2), 25/2 (4, 9) and (3 - 13)^2 / 4 = 25, together 38 about 4. This is merged
// into the lane's running (n, mean, M2) in the arithmetic type by Chan's formula. A large mean
// costs no digits: float32 and float64 are taken relative to the first row, and sums of four values
// of 16 bits are exact in float32, unless they differ 4,000 times (bfloat16: 32,000 times) in size.
// After at most 32 rows this goes, in float64, to the warp's slot in shared memory; at the end the
// 8 warps of the block are merged into a partial result of the chunk in the workspace:
//     N = sum n_w,  mean = sum n_w mean_w / N,  M2 = sum M2_w + sum n_w (mean_w - mean)^2
// Stage 2, merge_moments_kernel (merge_moments.cuh): the same formula over the chunks, then Chan's
// merge with the state.
#pragma once

#include "tiles.cuh"

namespace ssah {

struct MomentsState {
  double* count;  // []
  double* mean;   // [channels]
  double* m2;     // [channels]
};

// Partial results of the chunks. old_count is a snapshot: stage 2 overwrites the state's count.
struct MomentsWorkspace {
  double* old_count;  // [1]
  double* n;          // [chunks]
  double* mean;       // [chunks, slots]
  double* m2;         // [chunks, slots]

  static int64_t size(const Plan& plan) { return 1 + plan.chunks * (1 + 2 * plan.slots); }
  static MomentsWorkspace over(double* memory, const Plan& plan) {
    double* mean = memory + 1 + plan.chunks;
    return {memory, memory + 1, mean, mean + plan.chunks * plan.slots};
  }
};

template <int W>
struct MomentsShared {
  double mean[kWarps][kLanes * W];
  double m2[kWarps][kLanes * W];
  double n[kWarps];
};

// The sum of kRows values; their squared deviations from its mean are added to m2.
template <int kRows, typename R>
__device__ __forceinline__ R sum_by_halves(const R* values, R& m2) {
  if constexpr (kRows == 1) {
    return values[0];
  } else {
    const R a = sum_by_halves<kRows / 2>(values, m2);
    const R b = sum_by_halves<kRows / 2>(values + kRows / 2, m2);
    m2 += (a - b) * (a - b) * (R(1) / kRows);
    return a + b;
  }
}

template <typename T, int W>
struct LaneMoments {
  static constexpr bool kShifted = sizeof(T) > 2;
  Real<T> shift[kShifted ? W : 1];
  Real<T> mean[W] = {};  // relative to shift
  Real<T> m2[W] = {};
  int n = 0;        // rows since the last flush
  int flushed = 0;  // rows before

  template <int kRows>
  __device__ __forceinline__ void add(const Vector<T, W>* rows) {
    if (kShifted && n == 0) {
#pragma unroll
      for (int k = 0; k < W; ++k) shift[k] = real_at(rows[0], k);
    }
    const Real<T> before = n;
    n += kRows;
    const Real<T> weight = divide(Real<T>(kRows), Real<T>(n));
#pragma unroll
    for (int k = 0; k < W; ++k) {
      Real<T> values[kRows];
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        values[j] = real_at(rows[j], k);
        if constexpr (kShifted) values[j] -= shift[k];
      }
      const Real<T> sum = sum_by_halves<kRows>(values, m2[k]);
      const Real<T> delta = sum * (Real<T>(1) / kRows) - mean[k];
      mean[k] += delta * weight;
      m2[k] += delta * (delta * (before * weight));  // of an only batch 0, however large delta is
    }
  }

  __device__ __forceinline__ void flush(MomentsShared<W>& shared) {
    if (n == 0) return;
    const int warp = threadIdx.x / kLanes;
    const int lane = threadIdx.x % kLanes;
    const double before = flushed;
    const double weight = n / (before + n);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      double& slot_mean = shared.mean[warp][k * kLanes + lane];
      double& slot_m2 = shared.m2[warp][k * kLanes + lane];
      double here = static_cast<double>(mean[k]);
      if constexpr (kShifted) here += static_cast<double>(shift[k]);
      const double there = flushed == 0 ? here : slot_mean;
      const double delta = here - there;
      const double m2_there = flushed == 0 ? 0.0 : slot_m2;
      slot_mean = there + delta * weight;
      slot_m2 = m2_there + static_cast<double>(m2[k]) + delta * delta * (before * weight);
      mean[k] = 0;
      m2[k] = 0;
    }
    flushed += n;
    n = 0;
  }

  // Merges the block's warps and writes the chunk's partial result.
  __device__ __forceinline__ void finish(MomentsShared<W>& shared, const Plan& plan,
                                         const double* count, const MomentsWorkspace& out) const {
    if (threadIdx.x % kLanes == 0) shared.n[threadIdx.x / kLanes] = flushed;
    __syncthreads();
    double total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += shared.n[warp];
    const int64_t chunk = blockIdx.y;
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      out.n[chunk] = total;
      if (chunk == 0) *out.old_count = *count;
    }
    if (threadIdx.x >= kLanes * W || total == 0) return;
    double sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) {
      if (shared.n[warp] > 0) sum += shared.n[warp] * shared.mean[warp][threadIdx.x];
    }
    const double merged_mean = sum / total;
    double merged_m2 = 0;
    for (int warp = 0; warp < kWarps; ++warp) {
      if (shared.n[warp] > 0) {
        const double delta = shared.mean[warp][threadIdx.x] - merged_mean;
        merged_m2 += shared.m2[warp][threadIdx.x] + shared.n[warp] * delta * delta;
      }
    }
    const int64_t slot = chunk * plan.slots + blockIdx.x * kLanes * W + threadIdx.x;
    out.mean[slot] = merged_mean;
    out.m2[slot] = merged_m2;
  }
};

}  // namespace ssah
