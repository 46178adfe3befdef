// masked_adamw_: one AdamW step of the trained elements; see masked_update.h.
//
//   w = p (1 - lr weight_decay);  m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2
//   p = w - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
#pragma once

#include "masked_update.h"

namespace ssah {
namespace SSAH_ISA {

// kMaster: of bf16 with compensations, which are float32 weights.
template <class T, bool kMaster>
struct AdamWRule {
  static constexpr int kStates = 2;
  static constexpr bool kIsBf16 = __is_same(T, bf16);
  static constexpr Compensated kCompensated = kMaster ? kAlways : kIsBf16 ? kNever : kMaybe;
  // float32 is bound by memory: a second division and separate roundings are free, and the result
  // is that of torch's fused AdamW to the bit. Two-byte types are bound by arithmetic: the scale of
  // the gradient is folded into its coefficients, of which that of v is squared after it has met
  // the gradient: the square of a factor that clips an exploded gradient would be 0.
  static constexpr bool kAsTorch = kMaster || sizeof(T) >= 4;
  typedef scalar<T> F;
  F scale, decay, beta1, grad_to_m, beta2, grad_to_v, step_size, bias, eps;

  explicit AdamWRule(const AdamWArgs& a)
      : scale(factor<F>(a.scale)),
        decay(factor<F>(a.decay)),
        beta1(factor<F>(a.beta1)),
        grad_to_m(factor<F>((1 - a.beta1) * (kAsTorch ? 1 : a.scale))),
        beta2(factor<F>(a.beta2)),
        grad_to_v(factor<F>(kAsTorch ? 1 - a.beta2 : __builtin_sqrt(1 - a.beta2) * a.scale)),
        step_size(factor<F>(a.step_size)),
        bias(factor<F>(kAsTorch ? a.bias : 1 / a.bias)),
        eps(factor<F>(a.eps)) {}

  SSAH_METHOD void update(vec<T> grad, vec<T>& w, vec<T>& m, vec<T>& v) const {
    if constexpr (kAsTorch) {
      const vec<T> g = grad * scale;
      // From the nearer end, as torch's lerp: all of g is exactly g.
      m = grad_to_m < scalar<T>(0.5) ? mul_add(g - m, grad_to_m, m) : neg_mul_add(g - m, beta1, g);
      v = mul_add(grad_to_v * g, g, v * beta2);
      w = w * decay - step_size * m / (square_root(v) / bias + eps);
    } else {
      const vec<T> root = grad_to_v * grad;
      m = mul_add(m, beta1, grad_to_m * grad);
      v = mul_add(root, root, v * beta2);
      w = mul_add(w, decay, -step_size * m / mul_add(square_root(v), bias, eps));
    }
  }
};

template <class T, class S>
void masked_adamw(const UpdateTensor& tensor, const AdamWArgs& args, UpdateBlock block) {
  if constexpr (__is_same(T, bf16)) {
    if (tensor.compensation != nullptr) {
      masked_update<T, S>(tensor, AdamWRule<T, true>(args), block);
      return;
    }
  }
  masked_update<T, S>(tensor, AdamWRule<T, false>(args), block);
}

}  // namespace SSAH_ISA
}  // namespace ssah
