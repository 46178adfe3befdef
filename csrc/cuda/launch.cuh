// Kernel launch through cudaLaunchKernelEx: a plain function call, so that a launcher is C++ text.
#pragma once

#include <cuda_runtime.h>

#include "moments.cuh"
#include "sums.cuh"
#include "tiles.cuh"

namespace ssah {

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks_x, int64_t blocks_y,
                   size_t shared_bytes, cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks_x), static_cast<unsigned>(blocks_y));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Arguments&&>(arguments)...);
}

// One block a tile of a chunk.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_tiles(void (*kernel)(Parameters...), const Plan& plan, size_t shared_bytes,
                         cudaStream_t stream, Arguments&&... arguments) {
  return launch(kernel, plan.tiles, plan.chunks, shared_bytes, stream,
                static_cast<Arguments&&>(arguments)...);
}

inline cudaError_t launch_merge_moments(const Plan& plan, MomentsWorkspace partial,
                                        MomentsState state, cudaStream_t stream) {
  return launch(merge_moments_kernel, plan.slots / kLanes, 1, sizeof(MergeShared), stream, plan,
                partial, state);
}

inline cudaError_t launch_add_sums(const Plan& plan, int sums, const double* partial,
                                   SumOutputs outputs, cudaStream_t stream) {
  return launch(add_sums_kernel, plan.slots / kLanes, sums, sizeof(double) * kThreads, stream, plan,
                partial, outputs);
}

}  // namespace ssah
