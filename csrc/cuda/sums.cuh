// kSums sums over rows for every channel, in two deterministic stages: a lane adds in the
// arithmetic type for at most 32 rows, then in float64 to the warp's slot in shared memory; the
// block's 8 warps give the chunk's partial sums in the workspace [chunks, kSums, slots], and
// add_sums_kernel adds those, in order, to the outputs.
#pragma once

#include "launch.cuh"
#include "tiles.cuh"

namespace ssah {

struct SumOutputs {
  double* first;   // [channels]
  double* second;  // [channels], where kSums is 2
};

template <int W, int kSums>
struct SumsShared {
  double at[kSums][kWarps][kLanes * W];
};

template <typename T, int W, int kSums>
struct LaneSums {
  Real<T> at[kSums][W];
  bool flushed = false;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
#pragma unroll
      for (int k = 0; k < W; ++k) at[s][k] = 0;
    }
  }

  __device__ __forceinline__ void flush(SumsShared<W, kSums>& shared) {
    const int warp = threadIdx.x / kLanes;
    const int lane = threadIdx.x % kLanes;
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
#pragma unroll
      for (int k = 0; k < W; ++k) {
        double& slot = shared.at[s][warp][k * kLanes + lane];
        const double before = flushed ? slot : 0.0;
        slot = before + static_cast<double>(at[s][k]);
      }
    }
    flushed = true;
  }

  // Adds the block's warps and writes the chunk's partial sums.
  __device__ __forceinline__ void finish(SumsShared<W, kSums>& shared, const Plan& plan,
                                         double* workspace) {
    if (!flushed) {
      clear();
      flush(shared);
    }
    __syncthreads();
    if (threadIdx.x >= kLanes * W) return;
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      double sum = 0;
      for (int warp = 0; warp < kWarps; ++warp) sum += shared.at[s][warp][threadIdx.x];
      const int64_t row = blockIdx.y * static_cast<int64_t>(kSums) + s;
      workspace[row * plan.slots + blockIdx.x * kLanes * W + threadIdx.x] = sum;
    }
  }
};

// A block adds 32 slots of one of the sums: warp w reads chunks w, w + 8, ...
static __global__ void __launch_bounds__(kThreads)
    add_sums_kernel(Plan plan, const double* partial, SumOutputs outputs) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  double* shared = reinterpret_cast<double*>(shared_memory);  // [warps, lanes]
  const int warp = threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * kLanes + lane;

  double sum = 0;
#pragma unroll 4
  for (int64_t chunk = warp; chunk < plan.chunks; chunk += kWarps) {
    sum += partial[(chunk * gridDim.y + blockIdx.y) * plan.slots + slot];
  }
  shared[threadIdx.x] = sum;
  __syncthreads();

  const int64_t channel = slot_channel(plan, slot);
  if (warp != 0 || channel >= plan.channels) return;
  sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += shared[w * kLanes + lane];
  double* output = blockIdx.y == 0 ? outputs.first : outputs.second;
  output[channel] += sum;
}

inline cudaError_t launch_add_sums(const Plan& plan, int sums, const double* partial,
                                   SumOutputs outputs, cudaStream_t stream) {
  return launch(add_sums_kernel, plan.slots / kLanes, sums, sizeof(double) * kThreads, stream, plan,
                partial, outputs);
}

}  // namespace ssah
