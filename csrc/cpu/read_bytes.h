// Reads memory and does nothing else: the bandwidth that the other kernels are held against.
#pragma once

#include "simd.h"

namespace ssah {
namespace SSAH_ISA {

// The sum of the 64-byte blocks [begin, end) at `p`, as 32-bit words.
inline unsigned read_blocks(const void* p, long begin, long end) {
  vuint sums[4] = {};
  const char* bytes = (const char*)p;
  long i = begin * 64;
  for (; i + 4 * (long)sizeof(vuint) <= end * 64; i += 4 * sizeof(vuint)) {
    __builtin_prefetch(bytes + i + 2048);
    for (int k = 0; k < 4; ++k) sums[k] += load_raw<vuint>(bytes + i + k * sizeof(vuint));
  }
  for (; i < end * 64; i += sizeof(vuint)) sums[0] += load_raw<vuint>(bytes + i);
  sums[0] += sums[1] + sums[2] + sums[3];
  unsigned total = 0;
  for (int lane = 0; lane < SSAH_LANES; ++lane) total += sums[0][lane];
  return total;
}

}  // namespace SSAH_ISA
}  // namespace ssah
