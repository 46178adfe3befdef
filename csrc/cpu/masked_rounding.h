// How the masked update reads and writes: to nearest, stochastically, or with a compensation.
//
// Noise and rounding are specified, to the bit, in ssah_kernels/reference/masked_update.py.
#pragma once

#include "simd.h"

namespace ssah {
namespace SSAH_ISA {

// A scalar of an update in the compute type. A NaN loses its payload: with the low bits of that of
// NVIDIA's GPUs set (0x7fffffff), noise would carry a NaN of bfloat16 over to -0.
template <class S>
SSAH_INLINE S factor(double x) {
  return x == x ? S(x) : S(__builtin_nan(""));
}

// The keys of a tensor's noise, and where in the tensor a vector lies.
struct Noise {
  unsigned key0, key1;
  // 32 random bits for each of the elements from `low`, the lower half of the element's number.
  SSAH_METHOD vuint bits(vuint low) const {
    vuint x = low + key0;
    x = (x ^ x >> 16) * 0x21f0aaadu;
    x = (x ^ x >> 15 ^ key1) * 0xd35a2d97u;
    return x ^ x >> 15;
  }
};

SSAH_INLINE vuint lane_numbers() {
  vuint lanes = {};
  for (int i = 0; i < SSAH_LANES; ++i) lanes[i] = (unsigned)i;
  return lanes;
}

// Which 16 of the random bits a tensor uses.
template <int kWhich>
SSAH_INLINE vuint noise_of(vuint bits) {
  return kWhich == 0 ? bits & 0xffffu : kWhich == 1 ? bits >> 16 : (bits * 0x9e3779b1u) >> 16;
}

// The upper halves of `words`, as the first n values at p.
SSAH_INLINE void store_upper(bf16* p, vuint words, long n) {
  const vushort halves = narrow_upper(words);
  if (n >= SSAH_LANES) {
    store_raw(p, halves);
  } else {
    __builtin_memcpy(p, &halves, n * sizeof(bf16));
  }
}

// Stores x, rounded to nearest or, bfloat16 with noise, stochastically. Cutting off the lower half
// keeps an infinity; noise could carry out of a NaN, which arithmetic has made a quiet one.
template <bool kNoise, int kWhich, class T>
SSAH_INLINE void write(T* p, vec<T> x, vuint, long n) {
  store_up_to(p, x, n);
}
template <bool kNoise, int kWhich>
SSAH_INLINE void write(bf16* p, vfloat x, vuint bits, long n) {
  if constexpr (kNoise) {
    const vuint noise = noise_of<kWhich>(bits);
    store_upper(p, (vuint)x + (x == x ? noise : noise & 0u), n);
  } else {
    store_upper(p, bf16_bits(x), n);
  }
}

// What the update reads: p and what it is compensated by. Of bf16 that is the lower half of the
// bits of a float32, from -2^15 on, and `rest` has it in its upper half: 0x3f81 and 0x8312 are
// 0x3f808312, which is 1.004.
template <class T>
SSAH_INLINE vec<T> compensated(const T*, vec<T> p, vec<T> rest) {
  return p + rest;
}
SSAH_INLINE vfloat compensated(const bf16*, vfloat p, vfloat rest) {
  typedef vector_of<int, SSAH_LANES>::type vint;
  return (vfloat)((vuint)p + (vuint)((vint)rest >> 16));
}
// The bits of x half a unit of bf16 up: p is their upper half, and the rest the lower one less
// 2^15.
SSAH_INLINE vuint split_bits(vfloat x) {
  return (x == x ? (vuint)x : 0x7fc00000u + vuint{}) + 0x8000u;
}
SSAH_INLINE vuint rest_of(vuint split) { return (split ^ 0x8000u) << 16; }

// Stores x rounded to nearest, and what that cut off.
template <class T>
SSAH_INLINE void write_compensated(T* p, T* compensation, vec<T> x, long n) {
  T buffer[compute<T>::lanes];
  store(buffer, x);
  store_up_to(compensation, x - load(buffer), n);
  store_up_to(p, load(buffer), n);
}
SSAH_INLINE void write_compensated(bf16* p, bf16* compensation, vfloat x, long n) {
  const vuint split = split_bits(x);
  store_upper(compensation, rest_of(split), n);
  store_upper(p, split, n);
}

// 2 * SSAH_LANES bfloat16 values at a time: a word holds an even one below and an odd one above, so
// that neither way needs more than a shift and a mask. Values that are kept with noise come from
// bfloat16 ones and from factors that `factor` made: a NaN among them has an empty lower half, out
// of which nothing is carried.
SSAH_INLINE void read_pair(const bf16* p, vfloat (&values)[2]) {
  const vuint words = load_raw<vuint>(p);
  values[0] = (vfloat)(words << 16);
  values[1] = (vfloat)(words & 0xffff0000u);
}
SSAH_INLINE void store_upper_pair(bf16* p, const vuint (&words)[2]) {
  store_raw(p, (words[0] >> 16) | (words[1] & 0xffff0000u));
}
template <bool kNoise, int kWhich>
SSAH_INLINE void write_pair(bf16* p, const vfloat (&values)[2], const vuint (&bits)[2]) {
  vuint words[2];
  for (int i = 0; i < 2; ++i) {
    words[i] = kNoise ? (vuint)values[i] + noise_of<kWhich>(bits[i]) : bf16_bits(values[i]);
  }
  store_upper_pair(p, words);
}
SSAH_INLINE void write_compensated_pair(bf16* p, bf16* compensation, const vfloat (&values)[2]) {
  vuint words[2], rest[2];
  for (int i = 0; i < 2; ++i) {
    words[i] = split_bits(values[i]);
    rest[i] = rest_of(words[i]);
  }
  store_upper_pair(compensation, rest);
  store_upper_pair(p, words);
}

}  // namespace SSAH_ISA
}  // namespace ssah
