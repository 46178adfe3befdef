// masked_adamw_: one AdamW step of the trained elements; see masked_update.h.
//
//   w = p (1 - lr weight_decay);  m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2
//   p = w - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
#pragma once

#include "masked_update.h"

namespace ssah {
namespace SSAH_ISA {

template <class T>
struct AdamWRule {
  static constexpr int kStates = 2;
  // float32 is bound by memory: a second division and separate roundings are free, and the result
  // is that of torch's fused AdamW to the bit. Two-byte types are bound by arithmetic: the scale of
  // the gradient is folded into its coefficients.
  static constexpr bool kAsTorch = sizeof(T) >= 4;
  scalar<T> scale, decay, beta1, grad_to_m, beta2, grad_to_v, step_size, bias, eps;

  explicit AdamWRule(const AdamWArgs& a)
      : scale(scalar<T>(a.scale)),
        decay(scalar<T>(a.decay)),
        beta1(scalar<T>(a.beta1)),
        grad_to_m(scalar<T>((1 - a.beta1) * (kAsTorch ? 1 : a.scale))),
        beta2(scalar<T>(a.beta2)),
        grad_to_v(scalar<T>((1 - a.beta2) * (kAsTorch ? 1 : a.scale * a.scale))),
        step_size(scalar<T>(a.step_size)),
        bias(scalar<T>(kAsTorch ? a.bias : 1 / a.bias)),
        eps(scalar<T>(a.eps)) {}

  SSAH_METHOD void update(vec<T> grad, vec<T>& w, vec<T>& m, vec<T>& v) const {
    if constexpr (kAsTorch) {
      const vec<T> g = grad * scale;
      m = mul_add(g - m, grad_to_m, m);
      v = mul_add(grad_to_v * g, g, v * beta2);
      w = w * decay - step_size * m / (square_root(v) / bias + eps);
    } else {
      m = mul_add(m, beta1, grad_to_m * grad);
      v = mul_add(v, beta2, grad_to_v * grad * grad);
      w = mul_add(w, decay, -step_size * m / mul_add(square_root(v), bias, eps));
    }
  }
};

template <class T, class S>
void masked_adamw(const UpdateTensor& tensor, const AdamWArgs& args, UpdateBlock block) {
  masked_update<T, S>(tensor, AdamWRule<T>(args), block);
}

}  // namespace SSAH_ISA
}  // namespace ssah
