// channel_moments_: mean and M2 of every channel of x [tokens, channels], merged into the state.
//
// Reads each element of x once: 2 bytes for bf16 and f16, 4 for f32, 8 for f64; writes nothing
// but the state. float32 arithmetic within a chunk of 256 rows (float64 for f64), float64 between.
#pragma once

#include "moments.h"

namespace ssah {
namespace SSAH_ISA {

template <class T>
struct RowSource {
  const T* x;
  const long* rows;
  SSAH_METHOD vec<T> peek(long row, long c, long n) { return load_up_to(x + rows[row] + c, n); }
  SSAH_METHOD vec<T> load(long row, long c, long n) { return peek(row, c, n); }
  SSAH_METHOD vec<T> again(long row, long c, long n) { return peek(row, c, n); }
  SSAH_METHOD void prefetch(long row, long c) { __builtin_prefetch(x + rows[row] + c, 0, 2); }
};

template <class T>
void channel_moments(const ChannelMomentsArgs& a, ChannelRange range) {
  RowSource<T> source{(const T*)a.x, a.rows};
  accumulate_moments<T>(source, a.n_rows, a.count, a.mean, a.m2, range);
}

}  // namespace SSAH_ISA
}  // namespace ssah
