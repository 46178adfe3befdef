// The host functions: one an operator, as in ssah_kernels/schema.py. Arguments were checked in
// Python (ssah_kernels/checks.py); the last dimension of every input is contiguous.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace ssah {

using torch::stable::Tensor;

void channel_moments_cpu(const Tensor& x, const Tensor& count, const Tensor& mean, const Tensor& m2,
                         const std::optional<Tensor>& token_mask);
Tensor gated_moments_cpu(const Tensor& gate, const Tensor& up, const Tensor& count,
                         const Tensor& mean, const Tensor& m2,
                         const std::optional<Tensor>& token_mask, const std::string& act);
std::tuple<Tensor, Tensor> gated_moments_backward_cpu(const Tensor& grad, const Tensor& gate,
                                                      const Tensor& up, const std::string& act);
void taylor_moments_cpu(const Tensor& x, const Tensor& grad, const Tensor& signed_sum,
                        const Tensor& squared_sum, const std::optional<Tensor>& token_mask);
Tensor column_sq_norms_cpu(const Tensor& weight);

}  // namespace ssah
