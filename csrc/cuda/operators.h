// The host functions of the CUDA library, one an operator; arguments as in ssah_kernels/schema.py,
// with the activation as a number.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace ssah {

using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;
using IndexList = std::vector<std::optional<Tensor>>;

void channel_moments_cuda(const Tensor& x, const Tensor& count, const Tensor& mean,
                          const Tensor& m2, const std::optional<Tensor>& token_mask);

Tensor gated_moments_cuda(const Tensor& gate, const Tensor& up, const Tensor& count,
                          const Tensor& mean, const Tensor& m2,
                          const std::optional<Tensor>& token_mask, int64_t act);

std::tuple<Tensor, Tensor> gated_moments_backward_cuda(const Tensor& grad, const Tensor& gate,
                                                       const Tensor& up, int64_t act);

Tensor gated_product_cuda(const Tensor& gate, const Tensor& up, const Tensor& factors,
                          const Tensor& arm, int64_t act);

void taylor_moments_cuda(const Tensor& x, const Tensor& grad, const Tensor& signed_sum,
                         const Tensor& squared, const std::optional<Tensor>& token_mask);

Tensor column_sq_norms_cuda(const Tensor& weight);

void masked_adamw_cuda(
    const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
    const TensorList& exp_avg_sqs, const IndexList& indices, const std::vector<int64_t>& dims,
    const Tensor& lr, const Tensor& step, const std::optional<Tensor>& grad_scale,
    const std::optional<Tensor>& clip_coef, const std::optional<Tensor>& seed,
    const std::optional<TensorList>& compensations, const std::optional<TensorList>& signed_sums,
    const std::optional<TensorList>& squared_sums, const std::optional<TensorList>& exp_avg_scales,
    const std::optional<TensorList>& exp_avg_sq_scales, const std::optional<Tensor>& found_inf,
    double beta1, double beta2, double eps, double weight_decay, bool maximize);

void bit_masked_adamw_cuda(const TensorList& params, const TensorList& grads,
                           const TensorList& exp_avgs, const TensorList& exp_avg_sqs,
                           const TensorList& masks, const TensorList& offsets, const Tensor& lr,
                           const Tensor& step, const std::optional<Tensor>& grad_scale,
                           const std::optional<Tensor>& clip_coef,
                           const std::optional<Tensor>& seed, double beta1, double beta2,
                           double eps, double weight_decay, bool maximize);

void masked_sgd_cuda(const TensorList& params, const TensorList& grads,
                     const std::optional<TensorList>& momentum_buffers, const IndexList& indices,
                     const std::vector<int64_t>& dims, const Tensor& lr, const Tensor& step,
                     const std::optional<Tensor>& grad_scale,
                     const std::optional<Tensor>& clip_coef, const std::optional<Tensor>& seed,
                     const std::optional<TensorList>& compensations,
                     const std::optional<TensorList>& signed_sums,
                     const std::optional<TensorList>& squared_sums,
                     const std::optional<TensorList>& momentum_scales,
                     const std::optional<Tensor>& found_inf, double momentum, double dampening,
                     double weight_decay, bool nesterov, bool maximize);

Tensor masked_grad_norm_cuda(const TensorList& grads, const IndexList& indices,
                             const std::vector<int64_t>& dims,
                             const std::optional<Tensor>& grad_scale);

}  // namespace ssah
