// The table of kernels of the instruction set that the including file has set up.
#include "../bit_masked_adamw.h"
#include "../channel_moments.h"
#include "../column_sq_norms.h"
#include "../gated_moments.h"
#include "../gated_product.h"
#include "../masked_adamw.h"
#include "../masked_grad_norm.h"
#include "../masked_sgd.h"
#include "../read_bytes.h"
#include "../taylor_moments.h"

#define SSAH_PER_DTYPE(f) {f<double>, f<float>, f<bf16>, f<f16>}
#define SSAH_PER_ACT(f, T) {f<T, kSilu>, f<T, kGelu>, f<T, kGeluTanh>, f<T, kRelu>, f<T, kRelu2>}
#define SSAH_PER_DTYPE_AND_ACT(f) \
  {SSAH_PER_ACT(f, double), SSAH_PER_ACT(f, float), SSAH_PER_ACT(f, bf16), SSAH_PER_ACT(f, f16)}
// Of a parameter's type (rows) and its state's type; null where the two do not go together.
#define SSAH_PER_STATE(f, T) {nullptr, f<T, float>, f<T, bf16>, nullptr, f<T, code8>}
#define SSAH_PER_DTYPE_AND_STATE(f)                                  \
  {{f<double, double>, nullptr, nullptr, nullptr, f<double, code8>}, \
   SSAH_PER_STATE(f, float),                                         \
   SSAH_PER_STATE(f, bf16),                                          \
   SSAH_PER_STATE(f, f16)}
// As SSAH_PER_DTYPE_AND_STATE, without state in 8 bits.
#define SSAH_PER_FLOAT_STATE(f, T) {nullptr, f<T, float>, f<T, bf16>}
#define SSAH_PER_DTYPE_AND_FLOAT_STATE(f) \
  {{f<double, double>},                   \
   SSAH_PER_FLOAT_STATE(f, float),        \
   SSAH_PER_FLOAT_STATE(f, bf16),         \
   SSAH_PER_FLOAT_STATE(f, f16)}
#define SSAH_STRING(x) #x
#define SSAH_NAME(x) SSAH_STRING(x)

namespace ssah {
namespace SSAH_ISA {

extern const Kernels kernels;
const Kernels kernels = {
    SSAH_NAME(SSAH_ISA),
    SSAH_PER_DTYPE(channel_moments),
    SSAH_PER_DTYPE_AND_ACT(gated_moments),
    SSAH_PER_DTYPE_AND_ACT(gated_backward),
    SSAH_PER_DTYPE_AND_ACT(gated_product),
    SSAH_PER_DTYPE(taylor_moments),
    SSAH_PER_DTYPE(column_sq_norms),
    SSAH_PER_DTYPE_AND_STATE(masked_adamw),
    SSAH_PER_DTYPE_AND_STATE(masked_sgd),
    SSAH_PER_DTYPE_AND_FLOAT_STATE(bit_masked_adamw),
    SSAH_PER_DTYPE(masked_grad_norm),
    read_blocks,
};

}  // namespace SSAH_ISA
}  // namespace ssah
