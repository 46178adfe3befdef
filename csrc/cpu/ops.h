// The host functions, one an operator: as in ssah_kernels/schema.py, with the act as a number.
// What would harm memory is refused (checks.h); the rest was checked in Python.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace ssah {

using torch::stable::Tensor;

void channel_moments_cpu(const Tensor& x, const Tensor& count, const Tensor& mean, const Tensor& m2,
                         const std::optional<Tensor>& token_mask);
Tensor gated_moments_cpu(const Tensor& gate, const Tensor& up, const Tensor& count,
                         const Tensor& mean, const Tensor& m2,
                         const std::optional<Tensor>& token_mask, int64_t act);
std::tuple<Tensor, Tensor> gated_moments_backward_cpu(const Tensor& grad, const Tensor& gate,
                                                      const Tensor& up, int64_t act);
Tensor gated_product_cpu(const Tensor& gate, const Tensor& up, const Tensor& factors,
                         const Tensor& arm, int64_t act);
void taylor_moments_cpu(const Tensor& x, const Tensor& grad, const Tensor& signed_sum,
                        const Tensor& squared_sum, const std::optional<Tensor>& token_mask);
Tensor column_sq_norms_cpu(const Tensor& weight);
void masked_adamw_cpu(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                      const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                      const std::vector<std::optional<Tensor>>& indices,
                      const std::vector<int64_t>& dims, const Tensor& lr, const Tensor& step,
                      const std::optional<Tensor>& grad_scale,
                      const std::optional<Tensor>& clip_coef, const std::optional<Tensor>& seed,
                      const std::optional<std::vector<Tensor>>& compensations,
                      const std::optional<std::vector<Tensor>>& signed_sums,
                      const std::optional<std::vector<Tensor>>& squared_sums,
                      const std::optional<std::vector<Tensor>>& exp_avg_scales,
                      const std::optional<std::vector<Tensor>>& exp_avg_sq_scales,
                      const std::optional<Tensor>& found_inf, double beta1, double beta2,
                      double eps, double weight_decay, bool maximize);
void masked_sgd_cpu(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                    const std::optional<std::vector<Tensor>>& momentum_buffers,
                    const std::vector<std::optional<Tensor>>& indices,
                    const std::vector<int64_t>& dims, const Tensor& lr, const Tensor& step,
                    const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& clip_coef,
                    const std::optional<Tensor>& seed,
                    const std::optional<std::vector<Tensor>>& compensations,
                    const std::optional<std::vector<Tensor>>& signed_sums,
                    const std::optional<std::vector<Tensor>>& squared_sums,
                    const std::optional<std::vector<Tensor>>& momentum_scales,
                    const std::optional<Tensor>& found_inf, double momentum, double dampening,
                    double weight_decay, bool nesterov, bool maximize);
void bit_masked_adamw_cpu(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                          const std::vector<Tensor>& exp_avgs,
                          const std::vector<Tensor>& exp_avg_sqs, const std::vector<Tensor>& masks,
                          const std::vector<Tensor>& offsets, const Tensor& lr, const Tensor& step,
                          const std::optional<Tensor>& grad_scale,
                          const std::optional<Tensor>& clip_coef, const std::optional<Tensor>& seed,
                          double beta1, double beta2, double eps, double weight_decay,
                          bool maximize);
Tensor masked_grad_norm_cpu(const std::vector<Tensor>& grads,
                            const std::vector<std::optional<Tensor>>& indices,
                            const std::vector<int64_t>& dims,
                            const std::optional<Tensor>& grad_scale);

// Not operators of the catalogue: build facts, and a sum of the 64-byte blocks of `data` [n_bytes].
std::string facts_cpu();
int64_t read_bytes_cpu(const Tensor& data);

// How tensors of any device lie in memory, int64 [words]: address, shape, strides, dtype and device
// of each of `fixed`, and of gradients all of it but address and strides, as they are contiguous.
Tensor placement_any(const std::vector<Tensor>& fixed, const std::vector<Tensor>& grads);
// Whether they lie as `placement` says, and gradients apart from all `stretches` [2, n]: where
// memory begins and where it ends, sorted, no two of which overlap.
bool is_placed_any(const std::vector<Tensor>& fixed, const std::vector<Tensor>& grads,
                   const Tensor& placement, const Tensor& stretches);

}  // namespace ssah
