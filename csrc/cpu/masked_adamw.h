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
  // float32 is bound by memory, so that a second division is free: the result is torch's to the
  // bit.
  static constexpr bool kDivides = sizeof(T) >= 4;
  scalar<T> scale, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, bias, eps;

  explicit AdamWRule(const AdamWArgs& a)
      : scale(scalar<T>(a.scale)),
        decay(scalar<T>(a.decay)),
        one_minus_beta1(scalar<T>(a.one_minus_beta1)),
        beta2(scalar<T>(a.beta2)),
        one_minus_beta2(scalar<T>(a.one_minus_beta2)),
        step_size(scalar<T>(a.step_size)),
        bias(scalar<T>(kDivides ? a.bias : 1 / a.bias)),
        eps(scalar<T>(a.eps)) {}

  SSAH_METHOD vec<T> normalised(vec<T> root) const {
    if constexpr (kDivides) return root / bias;
    return root * bias;
  }

  SSAH_METHOD void update(vec<T> grad, vec<T>& w, vec<T>& m, vec<T>& v) const {
    const vec<T> g = grad * scale;
    m = m + one_minus_beta1 * (g - m);
    v = rounded_product(v, beta2) + one_minus_beta2 * g * g;
    w = rounded_product(w, decay);
    w = w - step_size * m / (normalised(square_root(v)) + eps);
  }
};

template <class T, class S>
void masked_adamw(const UpdateTensor& tensor, const AdamWArgs& args, UpdateBlock block) {
  masked_update<T, S>(tensor, AdamWRule<T>(args), block);
}

}  // namespace SSAH_ISA
}  // namespace ssah
