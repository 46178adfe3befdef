#if defined(__aarch64__)
#define SSAH_ISA neon
#define SSAH_LANES 4
#define SSAH_INSTRUCTIONS "isa/neon.h"
#include "kernels.h"
#endif
