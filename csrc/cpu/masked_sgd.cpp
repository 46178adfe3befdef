#include "masked_update_host.h"
#include "ops.h"

namespace ssah {

void masked_sgd_cpu(const TensorList& params, const TensorList& grads,
                    const OptionalTensorList& momentum_buffers, const IndexList& indices,
                    const std::vector<int64_t>& dims, const Tensor& lr, const Tensor& step,
                    const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& clip_coef,
                    const std::optional<Tensor>& seed, const OptionalTensorList& compensations,
                    const OptionalTensorList& signed_sums, const OptionalTensorList& squared_sums,
                    const OptionalTensorList& momentum_scales,
                    const std::optional<Tensor>& found_inf, double momentum, double dampening,
                    double weight_decay, bool nesterov, bool maximize) {
  const double scale = scalar_of(clip_coef, 1) / scalar_of(grad_scale, 1);
  const SgdArgs args{
      maximize ? -scale : scale, scalar_of(lr, 0), weight_decay, momentum, 1 - dampening,
      scalar_of(step, 0) == 1,   nesterov};
  const TensorList* buffers = momentum_buffers.has_value() ? &*momentum_buffers : nullptr;
  const std::vector<UpdateTensor> tensors =
      update_tensors({params, grads, buffers, nullptr, indices, dims, step, grad_scale, seed,
                      compensations, signed_sums, squared_sums, &momentum_scales, nullptr});
  const Dtype dtype = dtype_of(params[0]);
  const int state = buffers != nullptr  ? state_type_of((*buffers)[0])
                    : dtype == kFloat64 ? kFloat64
                                        : kFloat32;
  if (scalar_of(found_inf, 0) != 0) return;  // gradients that overflowed: nothing is written
  const auto run = kernel_of(kernels().masked_sgd, dtype, state);
  over_blocks(blocks_of(tensors),
              [&](const BlockOfTensor& b, size_t) { run(tensors[b.tensor], args, b.block); });
}

}  // namespace ssah
