// bit_masked_adamw_: one AdamW step of single elements, those whose bit is set in a mask.
//
// Of a block of 1,024 elements the trained ones of p and g are put side by side, updated as
// masked_adamw.h does, beside their states, which lie side by side in memory too; and p is spread
// again. Of 8 lanes of which 1, 4 and 5 train:
//
//   p     a b c d e f g h      compressed     b e f          bits 0b00110010
//   state                      as it lies     0 1 2
//   p     a B c d E F g h      expanded       B E F          a, c, d, g, h as they were read
//
// So arithmetic is done for what trains alone. Bytes moved per element of a parameter of which a
// share s trains: in f32 with f32 state 4 + 4 + 4 and 16 s, which is 20 for s = 0.5. A vector
// without a trained element is neither read nor written.
#pragma once

#include "masked_adamw.h"

namespace ssah {
namespace SSAH_ISA {

constexpr long kWord = 64;  // elements whose bits are read at once

SSAH_INLINE unsigned long word_at(const unsigned char* mask, long i) {
  unsigned long word;
  __builtin_memcpy(&word, mask + i / 8, sizeof(word));
  return word;
}
// Of a word, the bits of the register of elements from i on.
SSAH_INLINE unsigned bits_of(unsigned long word, int i) {
  return (unsigned)(word >> i) & ((1u << SSAH_LANES) - 1);
}
SSAH_INLINE bool bit_at(const unsigned char* mask, long i) { return mask[i / 8] >> i % 8 & 1; }

// Elements of 32 bits, or of 16 in the upper half of a lane: moved, and never computed with.
template <class T>
SSAH_INLINE vuint load_lanes(const T* p) {
  if constexpr (sizeof(T) == 4) return load_raw<vuint>(p);
  if constexpr (sizeof(T) == 2) return widen_to_upper(load_raw<vushort>(p));
}
template <class T>
SSAH_INLINE void store_lanes(T* p, vuint lanes) {
  if constexpr (sizeof(T) == 4) store_raw(p, lanes);
  if constexpr (sizeof(T) == 2) store_raw(p, narrow_upper(lanes));
}

// The trained ones of the n elements of a block, side by side; the buffers have room for a register
// more.
template <class T>
SSAH_INLINE void compress_block(const T* p, const T* g, const unsigned char* mask, long n,
                                T* __restrict own_p, T* __restrict own_g) {
  long i = 0, k = 0;
  if constexpr (sizeof(T) <= 4) {
    for (; i + kWord <= n; i += kWord) {
      const unsigned long word = word_at(mask, i);
      if (word == 0) continue;
#pragma GCC unroll 8
      for (int j = 0; j < kWord; j += SSAH_LANES) {
        const unsigned bits = bits_of(word, j);
        store_lanes(own_p + k, compressed(load_lanes(p + i + j), bits));
        store_lanes(own_g + k, compressed(load_lanes(g + i + j), bits));
        k += __builtin_popcount(bits);
      }
    }
  }
  for (; i < n; ++i) {
    if (!bit_at(mask, i)) continue;
    own_p[k] = p[i];
    own_g[k++] = g[i];
  }
}

// The reverse, of p. What does not train keeps its bits, those of a NaN included.
template <class T>
SSAH_INLINE void expand_block(T* p, const unsigned char* mask, long n, const T* __restrict own_p) {
  long i = 0, k = 0;
  if constexpr (sizeof(T) <= 4) {
    for (; i + kWord <= n; i += kWord) {
      const unsigned long word = word_at(mask, i);
      if (word == 0) continue;
#pragma GCC unroll 8
      for (int j = 0; j < kWord; j += SSAH_LANES) {
        const unsigned bits = bits_of(word, j);
        store_lanes(p + i + j, expanded(load_lanes(own_p + k), bits, load_lanes(p + i + j)));
        k += __builtin_popcount(bits);
      }
    }
  }
  for (; i < n; ++i) {
    if (bit_at(mask, i)) p[i] = own_p[k++];
  }
}

template <class T, class S>
void bit_masked_adamw(const BitMaskedTensor& t, const AdamWArgs& args, UpdateBlock block) {
  typedef AdamWRule<T, false> Rule;
  const Rule rule(args);
  const UpdateRun<T, S, Rule> update = choose_run<kNoUnits, T, T, S, Rule>(t.stochastic, false);
  T own_p[kBitBlock + SSAH_LANES], own_g[kBitBlock + SSAH_LANES];
  for (long b = block.row_begin; b < block.row_end; ++b) {
    const long first = t.offsets[b], trained = t.offsets[b + 1] - first;
    if (trained == 0) continue;
    const long begin = b * kBitBlock, n = t.n - begin < kBitBlock ? t.n - begin : kBitBlock;
    const unsigned char* const mask = t.mask + begin / 8;
    T* const p = (T*)t.param + begin;
    compress_block(p, (const T*)t.grad + begin, mask, n, own_p, own_g);
    for (long k = 0, length; k < trained; k += length) {
      // The noise of elements 2^32 apart has other keys: no run crosses a multiple of it.
      const unsigned long element = (unsigned long)(first + k);
      const unsigned long to_wrap = (1ul << 32) - (element & 0xffffffffu);
      length = trained - k;
      if ((unsigned long)length > to_wrap) length = (long)to_wrap;
      update(Run<T, S>{own_p + k, own_g + k, (S*)t.state0 + element, (S*)t.state1 + element,
                       nullptr, length, (unsigned)element,
                       Noise{t.key0, t.key1 + (unsigned)(element >> 32)}, nullptr, nullptr},
             rule);
    }
    expand_block(p, mask, n, own_p);
  }
}

}  // namespace SSAH_ISA
}  // namespace ssah
