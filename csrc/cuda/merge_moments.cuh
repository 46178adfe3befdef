// Stage 2 of the moments (see moments.cuh): the chunks' partial results, merged into the state.
//
//   n = sum n_c,  mean = sum n_c mean_c / n,  M2 = sum M2_c + n_c (mean_c - mean)^2
//
// in two passes over the chunks, which the L2 cache holds, then Chan's formula with the state. A
// second pass costs little and loses no digit where the means are far from 0.
#pragma once

#include "launch.cuh"
#include "moments.cuh"

namespace ssah {

struct MergeShared {
  double n[kWarps];
  double sum[kWarps][kLanes];
  double m2[kWarps][kLanes];
};

// A block merges 32 slots: warp w reads chunks w, w + 8, ...; warp 0 updates the state.
static __global__ void __launch_bounds__(kThreads)
    merge_moments_kernel(Plan plan, MomentsWorkspace partial, MomentsState state) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  MergeShared& shared = *reinterpret_cast<MergeShared*>(shared_memory);
  const int warp = threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * kLanes + lane;

  double n = 0;
  double sum = 0;
#pragma unroll 4
  for (int64_t chunk = warp; chunk < plan.chunks; chunk += kWarps) {
    const double chunk_n = partial.n[chunk];
    n += chunk_n;
    // A chunk without rows has no mean: what stands there does not count.
    if (chunk_n > 0) sum += chunk_n * partial.mean[chunk * plan.slots + slot];
  }
  if (lane == 0) shared.n[warp] = n;
  shared.sum[warp][lane] = sum;
  __syncthreads();

  double total = 0;
  double mean = 0;
  for (int w = 0; w < kWarps; ++w) {
    total += shared.n[w];
    mean += shared.sum[w][lane];
  }
  if (total == 0) return;  // every row is masked: all threads leave, so none waits below
  mean /= total;
  double m2 = 0;
#pragma unroll 4
  for (int64_t chunk = warp; chunk < plan.chunks; chunk += kWarps) {
    const double chunk_n = partial.n[chunk];
    if (chunk_n > 0) {
      const double delta = partial.mean[chunk * plan.slots + slot] - mean;
      m2 += partial.m2[chunk * plan.slots + slot] + chunk_n * delta * delta;
    }
  }
  shared.m2[warp][lane] = m2;
  __syncthreads();

  const double old_count = *partial.old_count;
  if (blockIdx.x == 0 && threadIdx.x == 0) *state.count = old_count + total;
  const int64_t channel = slot_channel(plan, slot);
  if (warp != 0 || channel >= plan.channels) return;
  m2 = 0;
  for (int w = 0; w < kWarps; ++w) m2 += shared.m2[w][lane];
  const double weight = total / (old_count + total);
  const double delta = mean - state.mean[channel];
  state.mean[channel] += delta * weight;
  state.m2[channel] += m2 + delta * delta * (old_count * weight);
}

inline cudaError_t launch_merge_moments(const Plan& plan, MomentsWorkspace partial,
                                        MomentsState state, cudaStream_t stream) {
  return launch(merge_moments_kernel, plan.slots / kLanes, 1, sizeof(MergeShared), stream, plan,
                partial, state);
}

}  // namespace ssah
