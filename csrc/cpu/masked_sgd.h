// masked_sgd_: one SGD step, with momentum, of the trained elements; see masked_update.h.
//
//   g += weight_decay p                       (unless weight_decay is 0)
//   b = momentum b + (1 - dampening) g        (b = g at the first step)
//   p -= lr (g + momentum b, with Nesterov, else b; g without momentum)
#pragma once

#include "masked_update.h"

namespace ssah {
namespace SSAH_ISA {

template <class T, bool kMomentum>
struct SgdRule {
  static constexpr int kStates = kMomentum ? 1 : 0;
  static constexpr Compensated kCompensated = kMaybe;
  scalar<T> scale, lr, weight_decay, momentum, one_minus_dampening;
  bool first, nesterov;

  explicit SgdRule(const SgdArgs& a)
      : scale(factor<scalar<T>>(a.scale)),
        lr(factor<scalar<T>>(a.lr)),
        weight_decay(factor<scalar<T>>(a.weight_decay)),
        momentum(factor<scalar<T>>(a.momentum)),
        one_minus_dampening(factor<scalar<T>>(a.one_minus_dampening)),
        first(a.first),
        nesterov(a.nesterov) {}

  SSAH_METHOD void update(vec<T> grad, vec<T>& w, vec<T>& b, vec<T>&) const {
    vec<T> g = grad * scale;
    if (weight_decay != 0) g = mul_add(w, weight_decay, g);  // an infinite weight times 0 is NaN
    if constexpr (kMomentum) {
      b = first ? g : mul_add(b, momentum, one_minus_dampening * g);
      g = nesterov ? mul_add(b, momentum, g) : b;
    }
    w = neg_mul_add(g, lr, w);
  }
};

template <class T, class S>
void masked_sgd(const UpdateTensor& tensor, const SgdArgs& args, UpdateBlock block) {
  if (tensor.state0 != nullptr) {
    masked_update<T, S>(tensor, SgdRule<T, true>(args), block);
  } else {
    masked_update<T, scalar<T>>(tensor, SgdRule<T, false>(args), block);  // no state: any type
  }
}

}  // namespace SSAH_ISA
}  // namespace ssah
