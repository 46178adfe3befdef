// masked_sgd_: one SGD step of the trained elements alone, for a list of tensors in one launch.
//
//   g <- g + weight_decay p                                            (unless it is 0)
//   b <- g at the first step, else momentum b + (1 - dampening) g      (with momentum_buffers)
//   p <- p - lr (g + momentum b with Nesterov, else b; g without momentum_buffers)
//
//   types as in masked_adamw_. Bytes per element: 20 in float32 with momentum, 12 without.
#include "masked_update.cuh"

namespace ssah {

struct SgdSettings {
  double momentum;
  double dampening;
  double weight_decay;
  bool nesterov;
};

template <typename R, int kMomentumBuffers>
struct SgdRule {
  using Settings = SgdSettings;
  static constexpr int kStates = kMomentumBuffers;
  R lr, weight_decay, momentum, one_minus_dampening;
  bool first, nesterov;

  __device__ __forceinline__ SgdRule(const Settings& settings, const UpdateScalars& scalars)
      : lr(static_cast<R>(*scalars.lr)),
        weight_decay(static_cast<R>(settings.weight_decay)),
        momentum(static_cast<R>(settings.momentum)),
        one_minus_dampening(static_cast<R>(1 - settings.dampening)),
        first(*scalars.step == 1),
        nesterov(settings.nesterov) {}

  __device__ __forceinline__ void update(R g, R& w, R& b, R&) const {
    if (weight_decay != R(0)) g += weight_decay * w;  // an infinite weight times 0 is NaN
    if constexpr (kMomentumBuffers > 0) {
      b = first ? g : momentum * b + one_minus_dampening * g;
      g = nesterov ? g + momentum * b : b;
    }
    w -= lr * g;
  }
};

template <typename T, typename S, typename G, int kMomentumBuffers>
__global__ void __launch_bounds__(kThreads, kUpdateBlocks<S>)
    masked_sgd_kernel(Targets targets, UpdateScalars scalars, SgdSettings settings) {
  masked_update<T, S, G, SgdRule<Real<T>, kMomentumBuffers>>(targets, scalars, settings);
}

template <typename T, typename S, typename G, int kMomentumBuffers>
cudaError_t launch_masked_sgd(const Table& table, const UpdateScalars& scalars,
                              const SgdSettings& settings, cudaStream_t stream) {
  using Shared = UpdateShared<Real<T>, SgdRule<Real<T>, kMomentumBuffers>>;
  const cudaError_t status = launch(masked_sgd_kernel<T, S, G, kMomentumBuffers>, table.blocks, 1,
                                    sizeof(Shared), stream, table.targets, scalars, settings);
  return status != cudaSuccess ? status : launch_add_importance<Real<T>>(table, scalars, stream);
}

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
                     double weight_decay, bool nesterov, bool maximize) {
  const TensorList* buffers = momentum_buffers ? &*momentum_buffers : nullptr;
  const UpdateLists lists{params,        grads,
                          buffers,       nullptr,
                          indices,       dims,
                          compensations, signed_sums,
                          squared_sums,  buffers == nullptr ? nullptr : &momentum_scales,
                          nullptr};
  const UpdateScalars scalars = update_scalars(first_of(params, "params"), lr, step, grad_scale,
                                               clip_coef, seed, found_inf, maximize);
  const SgdSettings settings{momentum, dampening, weight_decay, nesterov};
  const torch::stable::accelerator::DeviceGuard guard(params[0].get_device_index());
  const cudaStream_t stream = current_stream(params[0]);
  const ScalarType dtype = params[0].scalar_type();
  const ScalarType grad = first_of(grads, "grads").scalar_type();
  if (buffers == nullptr) {
    dispatch_gradient(dtype, grad, [&](auto p, auto g) {
      using T = decltype(p);
      using G = decltype(g);
      const Table table = make_update_table<T, Real<T>, G>(lists, stream);
      if (table.blocks == 0) return;
      check_launch(launch_masked_sgd<T, Real<T>, G, 0>(table, scalars, settings, stream),
                   "masked_sgd_");
    });
    return;
  }
  dispatch_update(dtype, first_of(*buffers, "momentum_buffers").scalar_type(), grad,
                  [&](auto p, auto s, auto g) {
                    using T = decltype(p);
                    using S = decltype(s);
                    using G = decltype(g);
                    const Table table = make_update_table<T, S, G>(lists, stream);
                    if (table.blocks == 0) return;
                    check_launch(launch_masked_sgd<T, S, G, 1>(table, scalars, settings, stream),
                                 "masked_sgd_");
                  });
}

}  // namespace ssah
