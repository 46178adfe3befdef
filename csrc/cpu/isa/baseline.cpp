// What every machine of this architecture has: SSE2 on x86-64, NEON on AArch64.
#define SSAH_ISA baseline
#define SSAH_LANES 4
#include "kernels.h"
