// Registers the kernels as torch.ops.ssah_cuda.* for CUDA tensors; Python defines the schemas.
#include <torch/csrc/stable/library.h>

#include "host.h"
#include "operators.h"

STABLE_TORCH_LIBRARY_IMPL(ssah_cuda, CUDA, m) {
  m.impl("channel_moments_", TORCH_BOX(&ssah::channel_moments_cuda));
  m.impl("gated_moments", TORCH_BOX(&ssah::gated_moments_cuda));
  m.impl("gated_moments_backward", TORCH_BOX(&ssah::gated_moments_backward_cuda));
  m.impl("gated_product", TORCH_BOX(&ssah::gated_product_cuda));
  m.impl("taylor_moments_", TORCH_BOX(&ssah::taylor_moments_cuda));
  m.impl("column_sq_norms", TORCH_BOX(&ssah::column_sq_norms_cuda));
  m.impl("masked_adamw_", TORCH_BOX(&ssah::masked_adamw_cuda));
  m.impl("bit_masked_adamw_", TORCH_BOX(&ssah::bit_masked_adamw_cuda));
  m.impl("masked_sgd_", TORCH_BOX(&ssah::masked_sgd_cuda));
  m.impl("masked_grad_norm", TORCH_BOX(&ssah::masked_grad_norm_cuda));
}

// What ssah_kernels/backends/cuda.py asks before it chooses these kernels, through ctypes.
#define SSAH_EXPORT extern "C" __attribute__((visibility("default")))

// Whether the library found torch's current stream, without which no kernel can be launched.
SSAH_EXPORT int ssah_cuda_finds_stream() { return aoti_torch_get_current_cuda_stream != nullptr; }

// Versions of CUDA as 1000 major + 10 minor: of the runtime inside this library, and the newest
// that the driver serves (0 without a driver).
SSAH_EXPORT int ssah_cuda_runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}
SSAH_EXPORT int ssah_cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}
