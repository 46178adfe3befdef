// Sums over rows per channel, of one or two terms: shared by taylor_moments_ and column_sq_norms.
//
// In the compute type within a chunk of rows, in float64 between chunks.
#pragma once

#include "simd.h"

namespace ssah {
namespace SSAH_ISA {

constexpr long kSumChunk = 128;
constexpr long kSumTile = 1024;
constexpr int kSumRows = 4;  // rows that share one load and store of the accumulators

// `Term` gives term.add(row, channel, n, sums): adds a row's terms to a register per sum.
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
      for (int s = 0; s < kSums; ++s) {
        for (long c = 0; c < width; ++c) totals[s][begin + c] += double(partial[s][c]);
      }
    }
  }
}

}  // namespace SSAH_ISA
}  // namespace ssah
