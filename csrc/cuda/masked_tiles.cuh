// Many tensors in one launch: a table of Targets in device memory, and the block's place in one.
//
// A target is the matrix of one tensor's trained elements. Its blocks are numbered after those of
// the targets before it. A block is 8 warps; a warp takes 32 lanes x W columns of 16 rows: W
// neighbours in 16 bytes of the parameter where everything allows it (wide), else half as many, 32
// apart. The warps lie above one another, or side by side where the matrix has fewer than 8 rows.
#pragma once

#include "tiles.cuh"

namespace ssah {

constexpr int kRowsPerWarp = 16;

struct Target {
  void* param;
  const void* grad;
  void* state0;
  void* state1;
  float* scales[2];  // of states in 8 bits, one for 256 elements of a row; else null
  void* compensation;
  const int64_t* index;  // of rows (dim 0) or columns (dim 1) of the parameter; null: all
  double* signed_sums;   // [units]; null: no importance
  double* squared_sums;
  void* parts;  // signed, then squared: [2, n_parts, units] in the arithmetic type
  int64_t rows;
  int64_t columns;
  int64_t row_stride;       // of the parameter
  int64_t column_stride;    // of the parameter
  int64_t grad_row_stride;  // where it is indexed
  int64_t grad_column_stride;
  int64_t limit;          // size of the indexed dimension
  int64_t first_element;  // position of the first element in the compact tensor
  int64_t first_block;
  int64_t block_columns;  // blocks side by side
  int64_t n_parts;
  int64_t first_unit;  // among the units of all targets
  unsigned number;     // position of the tensor in the list
  int dim;             // what units are: 0 rows, 1 columns
  int row_warps;       // 8 above one another, or 1
  bool grad_indexed;   // the gradient is not compact, but lies as the parameter does
  bool wide;
  bool plain;  // wide, compact and contiguous, without importance and compensation

  int64_t units() const { return dim == 0 ? rows : columns; }
};

struct Targets {
  const Target* table;
  int count;
};

// The last of `count` entries of a table that starts at `position` or before.
template <auto kFirst, typename Entry>
__device__ __forceinline__ int find_entry(const Entry* table, int count, int64_t position) {
  int low = 0;
  int high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table[middle].*kFirst <= position) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}
template <int64_t Target::* kFirst>
__device__ __forceinline__ int find_target(const Targets& targets, int64_t position) {
  return find_entry<kFirst>(targets.table, targets.count, position);
}

// A lane's part of a target.
template <int W, bool kIsWide>
struct Place {
  static constexpr int kStep = kIsWide ? 1 : kLanes;
  int64_t warp_column;  // number of the warp's 32 W columns
  int64_t warp_row;     // number of the warp's rows
  int64_t row;
  int64_t end;  // of rows
  int row_step;
  int64_t column;  // the lane's first
  int valid;       // how many of its W columns exist: all or none where access is wide

  __device__ __forceinline__ explicit Place(const Target& target) : row_step(target.row_warps) {
    const int warp = threadIdx.x / kLanes;
    const int lane = threadIdx.x % kLanes;
    const bool stacked = row_step == kWarps;
    const int64_t block = blockIdx.x - target.first_block;
    const int64_t block_row = block / target.block_columns;
    warp_column = block - block_row * target.block_columns;
    if (!stacked) warp_column = warp_column * kWarps + warp;
    warp_row = block_row * row_step + (stacked ? warp : 0);
    const int64_t start = block_row * kRowsPerWarp * row_step;
    const int64_t stop = start + kRowsPerWarp * row_step;
    row = start + (stacked ? warp : 0);
    end = stop < target.rows ? stop : target.rows;
    column = warp_column * (kLanes * W) + (kIsWide ? lane * W : lane);
    const int64_t left = target.columns - column;
    valid = left <= 0 ? 0 : left >= W * kStep ? W : static_cast<int>(ceil_div(left, kStep));
  }
};

// The entry of the parameter's indexed dimension that the target's entry stands for.
__device__ __forceinline__ int64_t entry_of(const int64_t* index, int64_t limit, int64_t entry) {
  if (index == nullptr) return entry;
  const int64_t selected = index[entry];
  if (selected < 0 || selected >= limit) __trap();
  return selected;
}

// Where the rows of a target start in the parameter, or in the gradient.
struct RowIndex {
  const int64_t* index;
  int64_t limit;
  int64_t stride;

  __device__ __forceinline__ RowIndex(const Target& target, int64_t row_stride)
      : index(target.dim == 0 ? global(target.index) : nullptr),
        limit(target.limit),
        stride(row_stride) {}
  __device__ __forceinline__ int64_t operator[](int64_t row) const {
    return entry_of(index, limit, row) * stride;
  }
};

// Where a lane's columns lie in a row of the parameter, or of the gradient.
template <int W, bool kIsWide>
__device__ __forceinline__ void columns_of(int64_t (&columns)[W], const Target& target,
                                           const Place<W, kIsWide>& place, int64_t column_stride) {
  if constexpr (kIsWide) {
    columns[0] = place.column;
  } else {
#pragma unroll
    for (int k = 0; k < W; ++k) {
      const int64_t column = place.column + k * kLanes;
      const int64_t* index = target.dim == 1 && k < place.valid ? target.index : nullptr;
      columns[k] = entry_of(index, target.limit, column) * column_stride;
    }
  }
}

}  // namespace ssah
