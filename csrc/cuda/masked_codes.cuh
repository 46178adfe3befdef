// State in 8 bits: a warp holds a block of 256 elements of a row, 8 a lane.
//
//   x = values[code] * scale                       read
//   scale = max |x|;  code = nearest(x / scale)    written
//
// ssah_kernels/dynamic_map.py specifies it to the bit, with an example. The tables are 24 KiB,
// which stay in the L1 cache.
#pragma once

#include "../dynamic_map.h"
#include "masked_access.cuh"

namespace ssah {

using code8 = uint8_t;  // a code of the dynamic map
template <>
__device__ __forceinline__ code8 from_real<code8>(float) {
  return 0;  // of elements that do not exist
}

template <typename S>
constexpr bool kInCodes = false;
template <>
constexpr bool kInCodes<code8> = true;
// Columns of a lane where access is wide, and where it is not.
template <typename T, typename S>
constexpr int kWideColumns = kInCodes<S> ? kStateBlock / kLanes : kWide<T>;
template <typename T, typename S>
constexpr int kNarrowColumns = kInCodes<S> ? kStateBlock / kLanes : kNarrow<T>;

// Blocks on a multiprocessor. A lane with 8 elements and the states of all of them, read back,
// needs more registers than two blocks leave it.
template <typename S>
constexpr int kUpdateBlocks = kInCodes<S> ? 1 : 2;

// Of first and of second moments.
static __device__ const DynamicMap kMaps[2] = {make_dynamic_map(true), make_dynamic_map(false)};

__device__ __forceinline__ unsigned code_of(float y, const DynamicMap& map) {
  const unsigned word = __float_as_uint(y);
  const unsigned magnitude = word & 0x7fffffffu;
  if (magnitude == 0) return 0;
  const unsigned interval = magnitude >> 16;
  const unsigned start = __ldg(map.starts + (interval > kFirstStart ? interval - kFirstStart : 0));
  // Within an interval the upper halves of y and of its bound are the same.
  const unsigned code = (start >> 16) + ((magnitude & 0xffffu) > (start & 0xffffu));
  if (map.most_negative == 0 || magnitude == word) return code;
  return -(code < map.most_negative ? code : map.most_negative);
}

// The states of a lane's W elements of a row, as the update computes with them.
template <typename R, int W>
struct CodedStates {
  R values[2][W];

  template <bool kIsWide>
  __device__ __forceinline__ void read(int which, const code8* codes, float scale, int valid) {
    Vector<code8, W> bytes;
    ssah::read<kIsWide>(bytes, codes, valid);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      values[which][k] = k < valid ? __ldg(kMaps[which].values + bytes.at[k]) * scale : 0.0f;
    }
  }

  // By all lanes of a warp, also those without elements.
  template <bool kIsWide>
  __device__ __forceinline__ void write(int which, code8* codes, float* scale, int valid) const {
    float x[W];
    unsigned largest = 0;  // as whole numbers, infinity and NaN are above all others
#pragma unroll
    for (int k = 0; k < W; ++k) {
      x[k] = static_cast<float>(values[which][k]);
      const unsigned magnitude = __float_as_uint(x[k]) & 0x7fffffffu;
      if (k < valid && magnitude > largest) largest = magnitude;
    }
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      const unsigned other = __shfl_xor_sync(0xffffffffu, largest, distance);
      largest = other > largest ? other : largest;
    }
    const bool finite = largest < 0x7f800000u;
    const float most = __uint_as_float(finite ? largest : 0x7fc00000u);
    if (valid <= 0) return;
    if (threadIdx.x % kLanes == 0) *scale = most;
    Vector<code8, W> bytes;
#pragma unroll
    for (int k = 0; k < W; ++k) {
      const unsigned code = largest == 0 || !finite ? 0 : code_of(x[k] / most, kMaps[which]);
      bytes.at[k] = static_cast<code8>(code);
    }
    ssah::write<kIsWide>(codes, bytes, valid);
  }
};

}  // namespace ssah
