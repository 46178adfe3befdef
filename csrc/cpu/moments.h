// Running moments of a tile of channels over a chunk of rows: shared by the *_moments kernels.
//
// Within a chunk, in the compute type: kGroup rows at a time are held in registers, their mean and
// their sum of squared deviations from it are exact to rounding (two passes, both in registers),
// and the group joins the chunk's (mean, M2) by Chan's formula. All values are relative to `shift`,
// the chunk's first row, so that a large common offset costs no bits. After the chunk, Chan's
// formula once more, in float64, into the caller's state.
#pragma once

#include "simd.h"

namespace ssah {
namespace SSAH_ISA {

constexpr int kGroup = 4;      // rows in registers, a power of two: more would share the ways of a
                               // cache set where rows are a multiple of a page apart
constexpr int kShiftRows = 4;  // rows that the shift is chosen from
constexpr long kChunk = 256;   // rows between merges into the float64 state
constexpr long kTile = 1024;   // channels whose accumulators stay in the first-level cache

template <class T>
struct MomentsTile {
  scalar<T> shift[kTile], mean[kTile], m2[kTile];
};

// Joins R rows, already relative to the shift, to the tile's moments at channel `c`.
// to_mean = R / (n + R) and to_m2 = R n / (n + R), for the n rows that the chunk holds so far.
template <int R, class T>
SSAH_INLINE void join_group(const vec<T> (&d)[R], MomentsTile<T>& tile, long c, scalar<T> to_mean,
                            scalar<T> to_m2) {
  vec<T> sum = d[0], group_m2 = {};
  const scalar<T> share = scalar<T>(1) / R;  // a power of two: to fuse with it changes no bit
  if (R > 1) {
#pragma GCC unroll 4
    for (int i = 1; i < R; ++i) sum += d[i];
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      vec<T> deviation = neg_mul_add(sum, share, d[i]);
      group_m2 = mul_add(deviation, deviation, group_m2);
    }
  }
  vec<T> mean = load(tile.mean + c), delta = mul_add(sum, share, -mean);
  store(tile.mean + c, mul_add(delta, to_mean, mean));
  store(tile.m2 + c, mul_add(delta * delta, to_m2, load(tile.m2 + c) + group_m2));
}

// `Source` gives a row's values: load(row, channel, n) with n channels left, prefetch(row,
// channel).
template <int R, class T, class Source>
SSAH_INLINE void moments_of_rows(Source& source, long row, long ahead, long begin, long width,
                                 long seen, MomentsTile<T>& tile) {
  const scalar<T> to_mean = scalar<T>(double(R) / double(seen + R));
  const scalar<T> to_m2 = scalar<T>(double(R) * double(seen) / double(seen + R));
  constexpr int lanes = compute<T>::lanes;
  const auto join = [&](long c, long n) __attribute__((always_inline)) {
    vec<T> d[R], shift = load(tile.shift + c);
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      source.prefetch(row + ahead + i, begin + c);
      d[i] = source.load(row + i, begin + c, n) - shift;
    }
    join_group<R, T>(d, tile, c, to_mean, to_m2);
  };
  long c = 0;
  for (; c + lanes <= width; c += lanes) join(c, lanes);
  if (c < width) join(c, width - c);
}

// Moments of the rows [0, n_rows) of `source` over `range`, merged into (mean, m2) of a state that
// holds `count` rows before this call.
template <class T, class Source>
SSAH_INLINE void accumulate_moments(Source& source, long n_rows, double count, double* mean,
                                    double* m2, ChannelRange range) {
  MomentsTile<T> tile;
  constexpr int lanes = compute<T>::lanes;
  for (long first = 0; first < n_rows; first += kChunk, count += kChunk) {
    const long n = n_rows - first < kChunk ? n_rows - first : kChunk;
    const double total = count + n, weight = n / total;
    for (long begin = range.begin; begin < range.end; begin += kTile) {
      const long width = range.end - begin < kTile ? range.end - begin : kTile;
      for (long c = 0; c < width; c += lanes) {
        vec<T> shift = source.peek(first, begin + c, width - c);
        for (long row = first + 1; row < first + n && row < first + kShiftRows; ++row) {
          vec<T> other = source.peek(row, begin + c, width - c);
          shift = other * other < shift * shift ? other : shift;
        }
        store(tile.shift + c, shift);
        store(tile.mean + c, vec<T>{});
        store(tile.m2 + c, vec<T>{});
      }
      long row = 0;
      for (; row + kGroup <= n; row += kGroup) {
        const long ahead = first + row + 2 * kGroup <= n_rows ? kGroup : 0;
        moments_of_rows<kGroup, T>(source, first + row, ahead, begin, width, row, tile);
      }
      for (; row < n; ++row) moments_of_rows<1, T>(source, first + row, 0, begin, width, row, tile);
      for (long c = 0; c < width; ++c) {
        const double delta = double(tile.shift[c]) + double(tile.mean[c]) - mean[begin + c];
        m2[begin + c] += double(tile.m2[c]) + delta * delta * count * weight;
        mean[begin + c] += delta * weight;
      }
    }
  }
}

}  // namespace SSAH_ISA
}  // namespace ssah
