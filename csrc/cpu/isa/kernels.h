// The table of kernels of the instruction set that the including file has set up.
#include "../channel_moments.h"
#include "../column_sq_norms.h"
#include "../gated_moments.h"
#include "../taylor_moments.h"

#define SSAH_PER_DTYPE(f) {f<double>, f<float>, f<bf16>, f<f16>}
#define SSAH_PER_ACT(f, T) {f<T, kSilu>, f<T, kGelu>, f<T, kGeluTanh>, f<T, kRelu>, f<T, kRelu2>}
#define SSAH_PER_DTYPE_AND_ACT(f) \
  {SSAH_PER_ACT(f, double), SSAH_PER_ACT(f, float), SSAH_PER_ACT(f, bf16), SSAH_PER_ACT(f, f16)}
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
    SSAH_PER_DTYPE(taylor_moments),
    SSAH_PER_DTYPE(column_sq_norms),
};

}  // namespace SSAH_ISA
}  // namespace ssah
