// AdamW of n elements whose numbers in the tensor start at `first`, far beyond its memory: the
// pointers are moved back by as much. A real tensor of that size would need 34 GB.
#define SSAH_ISA baseline
#define SSAH_LANES 4
#define SSAH_INSTRUCTIONS "isa/baseline.h"
#include "masked_adamw.h"

template <class T>
static T* moved_back(T* p, long elements) {
  return (T*)((unsigned long)p - (unsigned long)elements * sizeof(T));
}

extern "C" __attribute__((visibility("default"))) void far_update(
    ssah::bf16* p, const ssah::bf16* grad, ssah::bf16* m, ssah::bf16* v, long first, long n,
    unsigned key0, unsigned key1, double lr, double beta1, double beta2, double eps) {
  ssah::UpdateTensor tensor{};
  tensor.param = moved_back(p, first);
  tensor.grad = moved_back(grad, first);
  tensor.state0 = moved_back(m, first);
  tensor.state1 = moved_back(v, first);
  tensor.column_stride = tensor.grad_column_stride = 1;
  tensor.n_rows = 1;
  tensor.row_stride = tensor.n_columns = first + n;
  tensor.stochastic = true;
  tensor.key0 = key0;
  tensor.key1 = key1;
  // The first step: lr / (1 - beta1), sqrt(1 - beta2).
  const ssah::AdamWArgs args{1,  1, beta1, beta2, lr / (1 - beta1), __builtin_sqrt(1 - beta2), eps};
  ssah::baseline::masked_adamw<ssah::bf16, ssah::bf16>(tensor, args, {0, 1, first, first + n});
}
