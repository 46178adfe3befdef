// Sums over rows per channel, of one or two terms: shared by taylor_moments_ and column_sq_norms.
//
// In the compute type within a chunk of rows, in float64 between chunks. Channels whose squares
// float32 does not hold are taken again, in float64.
#pragma once

#include "simd.h"

namespace ssah {
namespace SSAH_ISA {

constexpr long kSumChunk = 128;
constexpr long kSumTile = 1024;
constexpr int kSumRows = 4;  // rows that share one load and store of the accumulators

// The lanes at c whose sums float32 resolves. Where two sums, of terms and of their squares, are 0,
// so were the terms, as in a dead channel.
SSAH_INLINE auto resolved_sums(const float (&partial)[1][kSumTile], long c) {
  return resolved(load(partial[0] + c));
}
SSAH_INLINE auto resolved_sums(const float (&partial)[2][kSumTile], long c) {
  const vfloat terms = load(partial[0] + c), squares = load(partial[1] + c);
  return resolved(squares) | ((terms == 0) & (squares == 0));
}

// Adds a tile's sums, of which some are not resolved: those from their rows, in float64.
template <class T, int kSums, class Term>
__attribute__((noinline)) void add_unresolved(Term term, const float (&partial)[kSums][kSumTile],
                                              long first, long last, long begin, long width,
                                              double* const (&totals)[kSums]) {
  constexpr int lanes = compute<T>::lanes;
  for (long c = 0; c < width; c += lanes) {
    vdouble sums[kSums][kDoubles<T>] = {};
    if (all_of(resolved_sums(partial, c))) {
      for (int s = 0; s < kSums; ++s) widen(load(partial[s] + c), sums[s]);
    } else {
      for (long row = first; row < last; ++row) term.add_wide(row, begin + c, width - c, sums);
    }
    double chunk[kSums][lanes];
    __builtin_memcpy(chunk, sums, sizeof(chunk));
    for (int s = 0; s < kSums; ++s) {
      for (int i = 0; i < lanes && c + i < width; ++i) totals[s][begin + c + i] += chunk[s][i];
    }
  }
}

// `Term` gives term.add(row, channel, n, sums), which adds a row's terms to a register per sum, the
// last of which is of squares, and term.add_wide, which does it in float64.
template <class T, int kSums, class Term>
SSAH_INLINE void accumulate_sums(Term& term, long n_rows, double* const (&totals)[kSums],
                                 ChannelRange range) {
  scalar<T> partial[kSums][kSumTile];
  constexpr int lanes = compute<T>::lanes;
  for (long first = 0; first < n_rows; first += kSumChunk) {
    const long last = first + kSumChunk < n_rows ? first + kSumChunk : n_rows;
    for (long begin = range.begin; begin < range.end; begin += kSumTile) {
      const long width = range.end - begin < kSumTile ? range.end - begin : kSumTile;
      __builtin_memset(partial, 0, sizeof(partial));
      for (long row = first; row < last; row += kSumRows) {
        const int rows = last - row < kSumRows ? int(last - row) : kSumRows;
        for (long c = 0; c < width; c += lanes) {
          vec<T> sums[kSums];
          for (int s = 0; s < kSums; ++s) sums[s] = load(partial[s] + c);
          for (int i = 0; i < rows; ++i) term.add(row + i, begin + c, width - c, sums);
          for (int s = 0; s < kSums; ++s) store(partial[s] + c, sums[s]);
        }
      }
      if constexpr (sizeof(scalar<T>) == sizeof(float)) {
        if (!all_resolved(partial[kSums - 1], width, false)) {
          add_unresolved<T, kSums>(term, partial, first, last, begin, width, totals);
          continue;
        }
      }
      for (int s = 0; s < kSums; ++s) {
        for (long c = 0; c < width; ++c) totals[s][begin + c] += double(partial[s][c]);
      }
    }
  }
}

}  // namespace SSAH_ISA
}  // namespace ssah
