#include <cmath>

#include "masked_update_host.h"
#include "ops.h"

namespace ssah {

AdamWArgs adamw_args(const Tensor& lr, const Tensor& step, const std::optional<Tensor>& grad_scale,
                     const std::optional<Tensor>& clip_coef, double beta1, double beta2, double eps,
                     double weight_decay, bool maximize) {
  const double rate = scalar_of(lr, 0), t = scalar_of(step, 0);
  const double scale = scalar_of(clip_coef, 1) / scalar_of(grad_scale, 1);
  return {maximize ? -scale : scale,       1 - rate * weight_decay,           beta1, beta2,
          rate / (1 - std::pow(beta1, t)), std::sqrt(1 - std::pow(beta2, t)), eps};
}

void masked_adamw_cpu(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                      const TensorList& exp_avg_sqs, const IndexList& indices,
                      const std::vector<int64_t>& dims, const Tensor& lr, const Tensor& step,
                      const std::optional<Tensor>& grad_scale,
                      const std::optional<Tensor>& clip_coef, const std::optional<Tensor>& seed,
                      const OptionalTensorList& compensations,
                      const OptionalTensorList& signed_sums, const OptionalTensorList& squared_sums,
                      const OptionalTensorList& exp_avg_scales,
                      const OptionalTensorList& exp_avg_sq_scales,
                      const std::optional<Tensor>& found_inf, double beta1, double beta2,
                      double eps, double weight_decay, bool maximize) {
  const AdamWArgs args =
      adamw_args(lr, step, grad_scale, clip_coef, beta1, beta2, eps, weight_decay, maximize);
  const std::vector<UpdateTensor> tensors = update_tensors(
      {params, grads, &exp_avgs, &exp_avg_sqs, indices, dims, step, grad_scale, seed, compensations,
       signed_sums, squared_sums, &exp_avg_scales, &exp_avg_sq_scales});
  if (scalar_of(found_inf, 0) != 0) return;  // gradients that overflowed: nothing is written
  const auto run =
      kernel_of(kernels().masked_adamw, dtype_of(params[0]), state_type_of(exp_avgs[0]));
  over_blocks(blocks_of(tensors),
              [&](const BlockOfTensor& b, size_t) { run(tensors[b.tensor], args, b.block); });
}

}  // namespace ssah
