// Registers the kernels as torch.ops.ssah_cuda.* for CUDA tensors; Python defines the schemas.
#include <torch/csrc/stable/library.h>

#include "operators.h"

STABLE_TORCH_LIBRARY_IMPL(ssah_cuda, CUDA, m) {
  m.impl("channel_moments_", TORCH_BOX(&ssah::channel_moments_cuda));
  m.impl("gated_moments", TORCH_BOX(&ssah::gated_moments_cuda));
  m.impl("gated_moments_backward", TORCH_BOX(&ssah::gated_moments_backward_cuda));
  m.impl("taylor_moments_", TORCH_BOX(&ssah::taylor_moments_cuda));
  m.impl("column_sq_norms", TORCH_BOX(&ssah::column_sq_norms_cuda));
  m.impl("masked_adamw_", TORCH_BOX(&ssah::masked_adamw_cuda));
  m.impl("masked_sgd_", TORCH_BOX(&ssah::masked_sgd_cuda));
  m.impl("masked_grad_norm", TORCH_BOX(&ssah::masked_grad_norm_cuda));
}
