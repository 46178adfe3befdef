// Kernel launch through cudaLaunchKernelEx: a plain function call, so that a launcher is C++ text.
#pragma once

#include <cuda_runtime.h>

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

}  // namespace ssah
