// Vector types of one instruction set, on the compiler's vector extension (GCC and Clang).
//
// isa/<isa>.cpp sets the target, SSAH_ISA (a namespace), SSAH_LANES (float32 values in one
// register) and SSAH_INSTRUCTIONS (isa/<isa>.h: what the extension has no operator for).
#pragma once

#include "types.h"

#define SSAH_INLINE static inline __attribute__((always_inline))
#define SSAH_METHOD inline __attribute__((always_inline))  // of a class, or a specialisation

namespace ssah {
namespace SSAH_ISA {

constexpr int kFloatLanes = SSAH_LANES;

template <class S, int N>
struct vector_of {
  typedef S type __attribute__((vector_size(N * sizeof(S))));
};

typedef vector_of<float, SSAH_LANES>::type vfloat;
typedef vector_of<unsigned, SSAH_LANES>::type vuint;
typedef vector_of<unsigned short, SSAH_LANES>::type vushort;
typedef vector_of<double, SSAH_LANES / 2>::type vdouble;

template <class T>
struct compute {
  typedef float scalar;
  typedef vfloat vector;
  static constexpr int lanes = SSAH_LANES;
};
template <>
struct compute<double> {
  typedef double scalar;
  typedef vdouble vector;
  static constexpr int lanes = SSAH_LANES / 2;
};
template <class T>
using vec = typename compute<T>::vector;
template <class T>
using scalar = typename compute<T>::scalar;

// A scalar in every lane; a vector stays what it is.
template <class V, class S>
SSAH_INLINE V splat(S value) {
  return value - V{};
}

template <class V>
SSAH_INLINE V load_raw(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
SSAH_INLINE void store_raw(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

}  // namespace SSAH_ISA
}  // namespace ssah
