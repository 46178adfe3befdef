// State in 8 bits: a block of 256 is read before its elements are updated and written after.
//
//   x = values[code] * scale                       read
//   scale = max |x|;  code = nearest(x / scale)    written
//
// ssah_kernels/dynamic_map.py specifies it to the bit. Of a row of 600 elements there are blocks of
// 256, 256 and 88. With the scale 0.5, 0.25 is y = 0.5: of the map with signs it lies between
// 0.4867 and 0.5008, above their bound 0.4937, and gets the code of the latter.
#pragma once

#include "simd.h"

namespace ssah {
namespace SSAH_ISA {

// Where the states of one tensor are while they are updated: where they are stored, or a copy.
template <class T, class S>
struct StateBlock {
  typedef S Values;
  const UpdateTensor& t;
  SSAH_METHOD explicit StateBlock(const UpdateTensor& tensor) : t(tensor) {}
  SSAH_METHOD Values* at(int which, unsigned long element, long) {
    return (Values*)(which == 0 ? t.state0 : t.state1) + element;
  }
  template <int kStates>
  SSAH_METHOD long begin(long, long, long n) {
    return n;
  }
  template <int kStates>
  SSAH_METHOD void end(long, long) {}
};

typedef vector_of<unsigned char, SSAH_LANES>::type vuchar;

// Elements of a table, one by one: on many processors a gather of a register takes longer.
template <class Index>
SSAH_INLINE void lookup(const unsigned* __restrict table, const Index* __restrict indices,
                        unsigned* __restrict found, long n) {
#pragma GCC unroll 8
  for (long i = 0; i < n; ++i) found[i] = table[indices[i]];
}

// The first n values of a block.
template <class V>
SSAH_INLINE void read_codes(const code8* codes, const DynamicMap& map, float scale, V* values,
                            long n) {
  unsigned found[kStateBlock];
  lookup((const unsigned*)map.values, (const unsigned char*)codes, found, n);
  float x[kStateBlock];
  __builtin_memcpy(x, found, n * sizeof(float));
  for (long i = 0; i < n; ++i) values[i] = V(x[i] * scale);
}

// Of the first n values of a block the largest magnitude, as the bits of a float32: as whole
// numbers these are in order, and infinity and NaN are above them all. Fills up the last register.
SSAH_INLINE unsigned largest_of(float* x, long n) {
  for (long i = n; i % SSAH_LANES != 0; ++i) x[i] = 0;
  vuint most = {};
  for (long i = 0; i < n; i += SSAH_LANES) {
    const vuint magnitude = load_raw<vuint>(x + i) & 0x7fffffffu;
    most = magnitude > most ? magnitude : most;
  }
  unsigned largest = 0;
  for (int i = 0; i < SSAH_LANES; ++i) largest = most[i] > largest ? most[i] : largest;
  return largest;
}

template <class V>
SSAH_INLINE void write_codes(code8* codes, const DynamicMap& map, float* scale, const V* values,
                             long n) {
  float x[kStateBlock];
  for (long i = 0; i < n; ++i) x[i] = float(values[i]);
  const unsigned largest = largest_of(x, n);
  const bool finite = largest < 0x7f800000u;
  float divisor;
  __builtin_memcpy(&divisor, &largest, sizeof(divisor));
  *scale = finite ? divisor : __builtin_nanf("");
  if (largest == 0 || !finite) {
    __builtin_memset(codes, 0, n);
    return;
  }
  unsigned intervals[kStateBlock], starts[kStateBlock];
  for (long i = 0; i < n; i += SSAH_LANES) {
    const vfloat y = load(x + i) / divisor;
    const vuint interval = ((vuint)y & 0x7fffffffu) >> 16;
    store(x + i, y);
    store_raw(intervals + i, interval > kFirstStart ? interval - kFirstStart : vuint{});
  }
  lookup(map.starts, intervals, starts, n);
  unsigned char bytes[kStateBlock];
  for (long i = 0; i < n; i += SSAH_LANES) {
    const vuint word = load_raw<vuint>(x + i), start = load_raw<vuint>(starts + i);
    // Within an interval the upper halves of y and of its bound are the same.
    const vuint above = (vuint)((word & 0xffffu) > (start & 0xffffu));  // -1 where it is
    vuint code = (start >> 16) - above;
    code &= (vuint)((word & 0x7fffffffu) != 0);
    if (map.most_negative > 0) {
      const vuint largest_negative = splat<vuint>(map.most_negative);
      code = word >> 31 == 0 ? code : code > largest_negative ? -largest_negative : -code;
    }
    store_raw(intervals + i, code);
  }
  for (long i = 0; i < n; ++i) bytes[i] = (unsigned char)intervals[i];
  __builtin_memcpy(codes, bytes, n);
}

template <class T>
struct StateBlock<T, code8> {
  typedef scalar<T> Values;
  const UpdateTensor& t;
  Values values[2][kStateBlock];
  SSAH_METHOD explicit StateBlock(const UpdateTensor& tensor) : t(tensor) {}

  SSAH_METHOD Values* at(int which, unsigned long, long column) {
    return values[which] + column % kStateBlock;
  }
  // A run of at most n elements that begins at `column` and ends with its block at the latest;
  // the block is read where it begins.
  template <int kStates>
  SSAH_METHOD long begin(long row, long column, long n) {
    const long at = column % kStateBlock;
    if (at == 0) {
      for (int s = 0; s < kStates; ++s) {
        read_codes(codes(s, row, column), *t.maps[s], *scale(s, row, column), values[s],
                   length(column));
      }
    }
    return n < kStateBlock - at ? n : kStateBlock - at;
  }
  // Writes the block that a run up to `column` has completed, if it has.
  template <int kStates>
  SSAH_METHOD void end(long row, long column) {
    if (column % kStateBlock != 0 && column != t.n_columns) return;
    const long first = (column - 1) / kStateBlock * kStateBlock;
    for (int s = 0; s < kStates; ++s) {
      write_codes(codes(s, row, first), *t.maps[s], scale(s, row, first), values[s], length(first));
    }
  }

 private:
  SSAH_METHOD long length(long first) const {
    return t.n_columns - first < kStateBlock ? t.n_columns - first : kStateBlock;
  }
  SSAH_METHOD code8* codes(int which, long row, long column) const {
    return (code8*)(which == 0 ? t.state0 : t.state1) + row * t.n_columns + column;
  }
  SSAH_METHOD float* scale(int which, long row, long column) const {
    const long blocks = (t.n_columns + kStateBlock - 1) / kStateBlock;
    return t.scales[which] + row * blocks + column / kStateBlock;
  }
};

}  // namespace SSAH_ISA
}  // namespace ssah
