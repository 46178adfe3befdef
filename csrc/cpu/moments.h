// Running moments of a tile of channels over a chunk of rows: shared by the *_moments kernels.
//
// Within a chunk, in the compute type: kGroup rows at a time are held in registers, their mean and
// their sum of squared deviations from it are exact to rounding (two passes, both in registers),
// and the group joins the chunk's (mean, M2) by Chan's formula. All values are relative to `shift`,
// one of the chunk's first rows, so that a large common offset costs no bits. After the chunk,
// Chan's formula once more, in float64, into the caller's state. Channels whose squares float32
// does not hold (deviations beyond 1.8e19 or below 1e-14) are taken again, in float64.
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

// `Source` gives a row's values: load(row, channel, n) with n channels left, and again(...) after
// that; prefetch(row, channel).
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

// The lanes, at channel c, whose M2 float32 resolves. Nothing is lost where all values are 0, as in
// a dead channel, or where there is one row.
template <class T>
SSAH_INLINE auto resolved_at(const MomentsTile<T>& tile, long c, long n_rows) {
  const vec<T> m2 = load(tile.m2 + c), mean = load(tile.mean + c), shift = load(tile.shift + c);
  const auto one_row = vec<T>{} == scalar<T>(n_rows - 1);
  const auto zero = (m2 == 0) & (((mean == 0) & (shift == 0)) | one_row);
  return resolved(m2) | zero;
}

// Chan's merge of a channel's chunk into its state; weight = n / (count + n).
SSAH_INLINE void merge_chunk(double chunk_mean, double chunk_m2, double count, double weight,
                             double& mean, double& m2) {
  const double delta = chunk_mean - mean;
  m2 += chunk_m2 + delta * delta * count * weight;
  mean += delta * weight;
}

// Merges a tile of which some channels are not resolved: those from their rows, in float64.
template <class T, class Source>
__attribute__((noinline)) void merge_unresolved(Source source, const MomentsTile<T>& tile,
                                                long first, long n, long begin, long width,
                                                double count, double* mean, double* m2) {
  constexpr int lanes = compute<T>::lanes;
  const double weight = n / (count + n);
  for (long c = 0; c < width; c += lanes) {
    double chunk_mean[lanes], chunk_m2[lanes];
    for (int i = 0; i < lanes; ++i) {
      chunk_mean[i] = double(tile.shift[c + i]) + double(tile.mean[c + i]);
      chunk_m2[i] = double(tile.m2[c + i]);
    }
    if (!all_of(resolved_at<T>(tile, c, n))) {
      vdouble sum[kDoubles<T>] = {}, squares[kDoubles<T>] = {}, x[kDoubles<T>];
      for (long row = first; row < first + n; ++row) {
        widen(source.again(row, begin + c, width - c), x);
        for (int d = 0; d < kDoubles<T>; ++d) sum[d] += x[d];
      }
      for (long row = first; row < first + n; ++row) {
        widen(source.again(row, begin + c, width - c), x);
        for (int d = 0; d < kDoubles<T>; ++d) {
          const vdouble deviation = x[d] - sum[d] / double(n);
          squares[d] = mul_add(deviation, deviation, squares[d]);
        }
      }
      for (int d = 0; d < kDoubles<T>; ++d) {
        store(chunk_mean + d * (SSAH_LANES / 2), sum[d] / double(n));
        store(chunk_m2 + d * (SSAH_LANES / 2), squares[d]);
      }
    }
    for (int i = 0; i < lanes && c + i < width; ++i) {
      merge_chunk(chunk_mean[i], chunk_m2[i], count, weight, mean[begin + c + i],
                  m2[begin + c + i]);
    }
  }
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
      if constexpr (sizeof(scalar<T>) == sizeof(float)) {
        if (!all_resolved(tile.m2, width, n == 1)) {
          merge_unresolved<T>(source, tile, first, n, begin, width, count, mean, m2);
          continue;
        }
      }
      for (long c = 0; c < width; ++c) {
        merge_chunk(double(tile.shift[c]) + double(tile.mean[c]), double(tile.m2[c]), count, weight,
                    mean[begin + c], m2[begin + c]);
      }
    }
  }
}

}  // namespace SSAH_ISA
}  // namespace ssah
