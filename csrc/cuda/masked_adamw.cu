// masked_adamw_: one AdamW step of the trained elements alone, for a list of tensors in one launch.
//
//   w = p (1 - lr weight_decay)
//   m <- m + (1 - beta1) (g - m),   v <- beta2 v + (1 - beta2) g^2
//   p <- w - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//
//   params float64 / float32 / bfloat16 / float16 as matrices, everything else compact; gradients
//   compact or as params, of 16 bits in float32 too; states float64 for float64, else float32 or
//   bfloat16; arithmetic in float32 (float64 for float64).
//   Bytes per element: 28 in float32, 14 in bfloat16, 22 with float32 state, 10.1 with state in 8
//   bits; 4 more with compensations, 2 more with float32 gradients.
#include "adamw_rule.cuh"
#include "masked_update.cuh"

namespace ssah {

template <typename T, typename S, typename G>
__global__ void __launch_bounds__(kThreads, kUpdateBlocks<S>)
    masked_adamw_kernel(Targets targets, UpdateScalars scalars, AdamwSettings settings) {
  masked_update<T, S, G, AdamwRule<T>>(targets, scalars, settings);
}

template <typename T, typename S, typename G>
cudaError_t launch_masked_adamw(const Table& table, const UpdateScalars& scalars,
                                const AdamwSettings& settings, cudaStream_t stream) {
  using Shared = UpdateShared<Real<T>, AdamwRule<T>>;
  const cudaError_t status = launch(masked_adamw_kernel<T, S, G>, table.blocks, 1, sizeof(Shared),
                                    stream, table.targets, scalars, settings);
  return status != cudaSuccess ? status : launch_add_importance<Real<T>>(table, scalars, stream);
}

void masked_adamw_cuda(
    const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
    const TensorList& exp_avg_sqs, const IndexList& indices, const std::vector<int64_t>& dims,
    const Tensor& lr, const Tensor& step, const std::optional<Tensor>& grad_scale,
    const std::optional<Tensor>& clip_coef, const std::optional<Tensor>& seed,
    const std::optional<TensorList>& compensations, const std::optional<TensorList>& signed_sums,
    const std::optional<TensorList>& squared_sums, const std::optional<TensorList>& exp_avg_scales,
    const std::optional<TensorList>& exp_avg_sq_scales, const std::optional<Tensor>& found_inf,
    double beta1, double beta2, double eps, double weight_decay, bool maximize) {
  const UpdateLists lists{
      params,        grads,       &exp_avgs,    &exp_avg_sqs,    indices,           dims,
      compensations, signed_sums, squared_sums, &exp_avg_scales, &exp_avg_sq_scales};
  const UpdateScalars scalars = update_scalars(first_of(params, "params"), lr, step, grad_scale,
                                               clip_coef, seed, found_inf, maximize);
  const AdamwSettings settings{beta1, beta2, eps, weight_decay};
  const torch::stable::accelerator::DeviceGuard guard(params[0].get_device_index());
  dispatch_update(params[0].scalar_type(), first_of(exp_avgs, "exp_avgs").scalar_type(),
                  first_of(grads, "grads").scalar_type(), [&](auto p, auto s, auto g) {
                    using T = decltype(p);
                    using S = decltype(s);
                    using G = decltype(g);
                    const cudaStream_t stream = current_stream(params[0]);
                    const Table table = make_update_table<T, S, G>(lists, stream);
                    if (table.blocks == 0) return;
                    check_launch(launch_masked_adamw<T, S, G>(table, scalars, settings, stream),
                                 "masked_adamw_");
                  });
}

}  // namespace ssah
