// The host functions of the CUDA library, one an operator; arguments as in ssah_kernels/schema.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace ssah {

using torch::stable::Tensor;

void channel_moments_cuda(const Tensor& x, const Tensor& count, const Tensor& mean,
                          const Tensor& m2, const std::optional<Tensor>& token_mask);

Tensor gated_moments_cuda(const Tensor& gate, const Tensor& up, const Tensor& count,
                          const Tensor& mean, const Tensor& m2,
                          const std::optional<Tensor>& token_mask, const std::string& act);

std::tuple<Tensor, Tensor> gated_moments_backward_cuda(const Tensor& grad, const Tensor& gate,
                                                       const Tensor& up, const std::string& act);

void taylor_moments_cuda(const Tensor& x, const Tensor& grad, const Tensor& signed_sum,
                         const Tensor& squared, const std::optional<Tensor>& token_mask);

Tensor column_sq_norms_cuda(const Tensor& weight);

}  // namespace ssah
