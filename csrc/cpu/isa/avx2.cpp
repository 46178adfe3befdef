// The target is set before any function is defined: only what this file compiles may use AVX2.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define SSAH_ISA avx2
#define SSAH_LANES 8
#define SSAH_INSTRUCTIONS "isa/avx2.h"
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
