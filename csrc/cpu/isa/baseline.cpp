// What every processor of an architecture has that no other file here is for; SSE2 on x86-64.
#if !defined(__aarch64__)
#define SSAH_ISA baseline
#define SSAH_LANES 4
#define SSAH_INSTRUCTIONS "isa/baseline.h"
#include "kernels.h"
#endif
