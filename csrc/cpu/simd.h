// Loads, stores, conversions and functions of the vectors of one instruction set.
//
// Included by isa/<isa>.cpp alone; see vectors.h. Nothing here includes a standard or torch header:
// an inline function of one of those, compiled for this target, could be the copy that the linker
// keeps.
//
// A kernel is written once over a storage type T: `vec<T>` is a register of the type that T is
// computed in (float for float, bf16 and f16; double for double), load and store convert.
//
// Products and sums are rounded one by one (-ffp-contract=off). Where one rounding is wanted for
// both, a kernel says mul_add: its result is then that of the source, whatever the compiler.
#pragma once

#include SSAH_INSTRUCTIONS

namespace ssah {
namespace SSAH_ISA {

// As isa/<isa>.h has it, with scalars among b and c; and c - a * b.
template <class V, class B, class C>
SSAH_INLINE V mul_add(V a, B b, C c) {
  return mul_add(a, splat<V>(b), splat<V>(c));
}
template <class V, class B, class C>
SSAH_INLINE V neg_mul_add(V a, B b, C c) {
  return mul_add(-a, splat<V>(b), splat<V>(c));
}

SSAH_INLINE vdouble load(const double* p) { return load_raw<vdouble>(p); }
SSAH_INLINE vfloat load(const float* p) { return load_raw<vfloat>(p); }
SSAH_INLINE vfloat load(const bf16* p) { return (vfloat)widen_to_upper(load_raw<vushort>(p)); }
SSAH_INLINE vfloat load(const f16* p) { return from_f16(load_raw<vushort>(p)); }
SSAH_INLINE void store(double* p, vdouble v) { store_raw(p, v); }
SSAH_INLINE void store(float* p, vfloat v) { store_raw(p, v); }

// float32 -> bfloat16, to nearest even, in the upper half of each lane.
SSAH_INLINE vuint bf16_rounded(vfloat v) {
  vuint bits = (vuint)v;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}
// The same; a NaN stays a (quiet) NaN.
SSAH_INLINE vuint bf16_bits(vfloat v) { return v == v ? bf16_rounded(v) : ((vuint)v | 0x400000u); }
SSAH_INLINE void store(bf16* p, vfloat v) { store_raw(p, narrow_upper(bf16_bits(v))); }
SSAH_INLINE void store(f16* p, vfloat v) { store_raw(p, to_f16(v)); }

// The lanes of a register in float64: two registers for those of a vfloat, one for a vdouble.
template <class T>
constexpr int kDoubles = compute<T>::lanes / (SSAH_LANES / 2);
SSAH_INLINE void widen(vfloat x, vdouble (&wide)[2]) {
  typedef vector_of<float, SSAH_LANES / 2>::type vhalf;
  vhalf halves[2];
  __builtin_memcpy(halves, &x, sizeof(x));
  wide[0] = __builtin_convertvector(halves[0], vdouble);
  wide[1] = __builtin_convertvector(halves[1], vdouble);
}
SSAH_INLINE void widen(vdouble x, vdouble (&wide)[1]) { wide[0] = x; }

template <class Lanes>
SSAH_INLINE bool all_of(Lanes lanes) {
  long words[sizeof(Lanes) / sizeof(long)], all = -1;
  __builtin_memcpy(words, &lanes, sizeof(lanes));
  for (long word : words) all &= word;
  return all == -1;
}
// The lanes of a sum of squares that float32 resolves: it is finite, and so large that what was
// lost below the smallest normal number does not show.
SSAH_INLINE auto resolved(vfloat squares) {
  return (squares >= 0x1p-90f) & (squares <= 0x1.fffffep127f);
}
// Whether all of the sums squares[0 .. width) are resolved, or 0 where that is no loss; false, too,
// where they add up to infinity. Four registers at a time: they do not wait for each other.
SSAH_INLINE bool all_resolved(const float* squares, long width, bool or_zero) {
  vfloat sum[4] = {}, least[4] = {};
  for (int i = 0; i < 4; ++i) least[i] = splat<vfloat>(1.0f);
  long c = 0;
  for (; c + 4 * SSAH_LANES <= width; c += 4 * SSAH_LANES) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const vfloat each = load_raw<vfloat>(squares + c + i * SSAH_LANES);
      sum[i] += each;  // NaN and infinity stay
      least[i] = each < least[i] ? each : least[i];
    }
  }
  for (; c < width; ++c) {
    sum[0][0] += squares[c];
    least[0][0] = squares[c] < least[0][0] ? squares[c] : least[0][0];
  }
  for (int i = 1; i < 4; ++i) {
    sum[0] += sum[i];
    least[0] = least[i] < least[0] ? least[i] : least[0];
  }
  const float limit = or_zero ? 0.0f : 0x1p-90f;
  return all_of((sum[0] <= 0x1.fffffep127f) & (least[0] >= limit));
}

// The first n < lanes values; the rest of the register is zero.
template <class T>
SSAH_INLINE vec<T> load_n(const T* p, int n) {
  T buffer[compute<T>::lanes] = {};
  __builtin_memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <class T>
SSAH_INLINE void store_n(T* p, vec<T> v, int n) {
  T buffer[compute<T>::lanes];
  store(buffer, v);
  __builtin_memcpy(p, buffer, n * sizeof(T));
}
template <class T>
SSAH_INLINE vec<T> load_up_to(const T* p, long n) {
  return n >= compute<T>::lanes ? load(p) : load_n(p, (int)n);
}
template <class T>
SSAH_INLINE void store_up_to(T* p, vec<T> v, long n) {
  if (n >= compute<T>::lanes) {
    store(p, v);
  } else {
    store_n(p, v, (int)n);
  }
}

// Stores v as a T and gives v as it reads back. For bf16, v comes of arithmetic on bf16: the lower
// half of a NaN is zero then, and rounding leaves it a NaN.
SSAH_INLINE vdouble store_rounded(double* p, vdouble v) {
  store_raw(p, v);
  return v;
}
SSAH_INLINE vfloat store_rounded(float* p, vfloat v) {
  store_raw(p, v);
  return v;
}
SSAH_INLINE vfloat store_rounded(bf16* p, vfloat v) {
  vuint bits = bf16_rounded(v);
  store_raw(p, narrow_upper(bits));
  return (vfloat)(bits & 0xffff0000u);
}
SSAH_INLINE vfloat store_rounded(f16* p, vfloat v) {
  store(p, v);
  return load(p);
}

SSAH_INLINE vdouble exp(vdouble x) {
  for (int i = 0; i < SSAH_LANES / 2; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}
SSAH_INLINE vdouble reciprocal(vdouble v) { return 1 / v; }

// e^x / 2^kHalvings where both are normal and finite. It is 2^n e^r with n = round(x / ln 2), so
// that |r| is at most half of ln 2. The polynomial is the minimax of degree 5 for the relative
// error, 1.9e-7 with rounding; ln 2 as a float adds 2e-9 n to it. Of NaN it is unspecified: every
// caller multiplies by the argument.
template <int kHalvings>
SSAH_INLINE vfloat exp_within(vfloat x) {
  const float to_integer = 12582912.0f - kHalvings;  // 1.5 * 2^23: adding it rounds to an integer
  vfloat shifted = mul_add(x, 1.44269504f, to_integer);
  vfloat n = shifted - to_integer;
  vfloat r = kFused ? neg_mul_add(n, 0.693147182f, x)
                    : x - n * 0.693359375f + n * 2.12194440e-4f;  // the first product is exact
  vfloat p = splat<vfloat>(0.00829765479f);
  p = mul_add(p, r, 0.0419153820f);
  p = mul_add(p, r, 0.166675747f);
  p = mul_add(p, r, 0.499988949f);
  p = mul_add(p, r, 0.999999692f);
  p = mul_add(p, r, 1.00000007f);
  // The low bits of `shifted` are n - kHalvings: adding them to the exponent multiplies p, in
  // [0.7, 1.42], by 2^n.
  return (vfloat)((vuint)p + ((vuint)shifted << 23));
}
// e^x, for x clamped to [-87, 88].
SSAH_INLINE vfloat exp(vfloat x) { return exp_within<0>(max(-87.0f, min(88.0f, x))); }

}  // namespace SSAH_ISA
}  // namespace ssah
