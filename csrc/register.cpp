// Registers the CPU kernels as torch.ops.ssah_cpu.*; ssah_kernels/backends/cpu.py defines their
// schemas. The library holds no Python symbol: one build serves every version of Python.
#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"

STABLE_TORCH_LIBRARY_IMPL(ssah_cpu, CPU, m) {
  m.impl("channel_moments_", TORCH_BOX(&ssah::channel_moments_cpu));
  m.impl("gated_moments", TORCH_BOX(&ssah::gated_moments_cpu));
  m.impl("gated_moments_backward", TORCH_BOX(&ssah::gated_moments_backward_cpu));
  m.impl("gated_product", TORCH_BOX(&ssah::gated_product_cpu));
  m.impl("taylor_moments_", TORCH_BOX(&ssah::taylor_moments_cpu));
  m.impl("column_sq_norms", TORCH_BOX(&ssah::column_sq_norms_cpu));
  m.impl("masked_adamw_", TORCH_BOX(&ssah::masked_adamw_cpu));
  m.impl("bit_masked_adamw_", TORCH_BOX(&ssah::bit_masked_adamw_cpu));
  m.impl("masked_sgd_", TORCH_BOX(&ssah::masked_sgd_cpu));
  m.impl("masked_grad_norm", TORCH_BOX(&ssah::masked_grad_norm_cpu));
  m.impl("read_bytes", TORCH_BOX(&ssah::read_bytes_cpu));
}

// These take no tensor, or tensors of any device whose elements they do not read.
STABLE_TORCH_LIBRARY_IMPL(ssah_cpu, CompositeExplicitAutograd, m) {
  m.impl("facts", TORCH_BOX(&ssah::facts_cpu));
  m.impl("placement", TORCH_BOX(&ssah::placement_any));
  m.impl("is_placed", TORCH_BOX(&ssah::is_placed_any));
}
