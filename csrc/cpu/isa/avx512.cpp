#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define SSAH_ISA avx512
#define SSAH_LANES 16
#define SSAH_INSTRUCTIONS "isa/avx512.h"
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
