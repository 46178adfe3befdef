// What AdamW does to an element, as ssah_kernels/reference/masked_adamw.py specifies it.
//
// Powers of beta are taken once a block, by one thread: they are slow in float64 on a GPU.
#pragma once

#include "approximate.cuh"
#include "masked_rounding.cuh"

namespace ssah {

struct AdamwSettings {
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
};

template <typename T>
struct AdamwRule {
  using R = Real<T>;
  using Settings = AdamwSettings;
  static constexpr int kStates = 2;
  R decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, inverse_bias, eps;

  __device__ __forceinline__ AdamwRule(const Settings& settings, const UpdateScalars& scalars)
      : decay(static_cast<R>(1 - *scalars.lr * settings.weight_decay)),
        beta1(static_cast<R>(settings.beta1)),
        one_minus_beta1(static_cast<R>(1 - settings.beta1)),
        beta2(static_cast<R>(settings.beta2)),
        one_minus_beta2(static_cast<R>(1 - settings.beta2)),
        step_size(static_cast<R>(*scalars.lr / (1 - pow(settings.beta1, *scalars.step)))),
        inverse_bias(static_cast<R>(1 / sqrt(1 - pow(settings.beta2, *scalars.step)))),
        eps(static_cast<R>(settings.eps)) {}

  __device__ __forceinline__ void update(R g, R& w, R& m, R& v) const {
    m = beta1 * m + one_minus_beta1 * g;  // where beta1 is 0, exactly g
    v = beta2 * v + one_minus_beta2 * g * g;
    w = w * decay - step_size * quotient<T>(m, root<T>(v) * inverse_bias + eps);
  }
};

}  // namespace ssah
