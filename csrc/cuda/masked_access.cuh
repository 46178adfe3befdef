// Loads and stores of a lane's W elements: 16 bytes of neighbours (wide), or one by one.
#pragma once

#include <type_traits>

#include "tiles.cuh"

namespace ssah {

// W neighbours through 16-byte accesses, or one of 8 (bfloat16 state of a float32 parameter).
template <typename T, int W>
using Access = std::conditional_t<W * sizeof(T) % sizeof(uint4) == 0, uint4, uint2>;

template <typename T, int W>
__device__ __forceinline__ void read_wide(Vector<T, W>& vector, const T* source) {
  constexpr int kAccesses = W * sizeof(T) / sizeof(Access<T, W>);
  Access<T, W> bits[kAccesses];
#pragma unroll
  for (int i = 0; i < kAccesses; ++i) bits[i] = reinterpret_cast<const Access<T, W>*>(source)[i];
  memcpy(&vector, bits, sizeof(vector));
}
template <typename T, int W>
__device__ __forceinline__ void write_wide(T* target, const Vector<T, W>& vector) {
  constexpr int kAccesses = W * sizeof(T) / sizeof(Access<T, W>);
  Access<T, W> bits[kAccesses];
  memcpy(bits, &vector, sizeof(vector));
#pragma unroll
  for (int i = 0; i < kAccesses; ++i) __stwb(reinterpret_cast<Access<T, W>*>(target) + i, bits[i]);
}

// W elements of contiguous memory, neighbours or 32 apart.
template <bool kIsWide, typename T, int W>
__device__ __forceinline__ void read(Vector<T, W>& vector, const T* source, int valid) {
  if constexpr (kIsWide) {
    read_wide(vector, source);
  } else {
#pragma unroll
    for (int k = 0; k < W; ++k) vector.at[k] = k < valid ? source[k * kLanes] : from_real<T>(0);
  }
}
template <bool kIsWide, typename T, int W>
__device__ __forceinline__ void write(T* target, const Vector<T, W>& vector, int valid) {
  if constexpr (kIsWide) {
    write_wide(target, vector);
  } else {
#pragma unroll
    for (int k = 0; k < W; ++k) {
      if (k < valid) target[k * kLanes] = vector.at[k];
    }
  }
}

// The parameter's elements of a lane, at `columns[k]` from the row's start where not wide.
template <bool kIsWide, typename T, int W>
__device__ __forceinline__ void read_at(Vector<T, W>& vector, const T* row,
                                        const int64_t (&columns)[W], int valid) {
  if constexpr (kIsWide) {
    read_wide(vector, row + columns[0]);
  } else {
#pragma unroll
    for (int k = 0; k < W; ++k) vector.at[k] = k < valid ? row[columns[k]] : from_real<T>(0);
  }
}
template <bool kIsWide, typename T, int W>
__device__ __forceinline__ void write_at(T* row, const Vector<T, W>& vector,
                                         const int64_t (&columns)[W], int valid) {
  if constexpr (kIsWide) {
    write_wide(row + columns[0], vector);
  } else {
#pragma unroll
    for (int k = 0; k < W; ++k) {
      if (k < valid) row[columns[k]] = vector.at[k];
    }
  }
}

}  // namespace ssah
