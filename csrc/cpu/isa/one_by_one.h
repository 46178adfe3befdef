// Lanes that are put side by side, and back: one by one, for what has no instruction for it.
#pragma once

#include "../vectors.h"

namespace ssah {
namespace SSAH_ISA {

// The lanes whose bit is set, one behind the other; what follows them is unspecified.
SSAH_INLINE vuint compressed(vuint v, unsigned bits) {
  vuint result = v;
  for (int i = 0, k = 0; i < SSAH_LANES; ++i) {
    if (bits >> i & 1) result[k++] = v[i];
  }
  return result;
}
// The reverse: lanes whose bit is set have those of `compact` in order, the others those of `rest`.
SSAH_INLINE vuint expanded(vuint compact, unsigned bits, vuint rest) {
  for (int i = 0, k = 0; i < SSAH_LANES; ++i) {
    if (bits >> i & 1) rest[i] = compact[k++];
  }
  return rest;
}

}  // namespace SSAH_ISA
}  // namespace ssah
