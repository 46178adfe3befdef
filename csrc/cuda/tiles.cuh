// How a matrix [rows, channels] is cut into blocks, the same way for every operator.
//
// A lane holds W channels of a row: 16 bytes of neighbours where pointers, strides and the number
// of channels allow 16-byte access (wide), else half as many, 32 apart, so that a warp's loads are
// coalesced (narrow). A tile is the channels of 32 lanes; a chunk is a range of rows, its length a
// function of the matrix's shape alone. A block of 8 warps takes one tile of one chunk, its warp w
// rows w, w + 8, ... of it, several rows of loads in flight. Every element is read once, and what
// happens to a channel does not depend on the width.
//
// Results are kept by slot = (tile * W + k) * 32 + lane for the k-th channel of a lane, so that
// shared memory is accessed without bank conflicts and the workspace coalesced.
#pragma once

#include "types.cuh"

namespace ssah {

constexpr int kLanes = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kLanes * kWarps;
constexpr int kBatch = 4;         // rows whose loads are in flight together
constexpr int kSegment = kLanes;  // rows of a warp whose mask is read at once
constexpr int kChunkQuantum = kWarps * kBatch;
constexpr int64_t kMultiprocessors = 132;  // of an H100 or H200
constexpr int64_t kMostWaves = 4;

template <typename T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));
template <typename T>
constexpr int kNarrow = kWide<T> / 2;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Plan {
  int64_t rows;
  int64_t channels;
  int64_t rows_per_chunk;
  int64_t chunks;
  int64_t tiles;
  int64_t slots;  // channels, rounded up to whole tiles
  int width;      // W
  bool wide;
};

// Rows of a chunk, so that the blocks fill whole waves: `resident` of them run at a time. Example:
// [4096, 11008] in bfloat16 has 43 tiles. With three blocks on a multiprocessor, 396, chunks of 480
// rows make 387 blocks, one wave. Chunks of 192 rows would make 946, and the third wave would be
// half empty. The time of a block is taken to be its rows and a quantum more, for start and end.
inline int64_t rows_of_chunk(int64_t rows, int64_t tiles, int64_t resident) {
  int64_t best = 0;
  int64_t least_time = 0;
  for (int64_t waves = 1; waves <= kMostWaves; ++waves) {
    const int64_t chunks = tiles == 0 || tiles > waves * resident ? 1 : waves * resident / tiles;
    const int64_t length = ceil_div(ceil_div(rows, chunks), kChunkQuantum) * kChunkQuantum;
    const int64_t blocks = tiles * ceil_div(rows, length);
    const int64_t time = ceil_div(blocks, resident) * (length + kChunkQuantum);
    if (best == 0 || time < least_time) {
      best = length;
      least_time = time;
    }
  }
  return best;
}

// `blocks` of the kernel fit on a multiprocessor, as its launch bounds say.
template <typename T>
Plan make_plan(int64_t rows, int64_t channels, bool wide, int blocks) {
  Plan plan{};
  plan.rows = rows;
  plan.channels = channels;
  const int64_t wide_tiles = ceil_div(channels, kLanes * kWide<T>);
  plan.rows_per_chunk = rows_of_chunk(rows, wide_tiles, blocks * kMultiprocessors);
  plan.chunks = ceil_div(rows, plan.rows_per_chunk);
  plan.width = wide ? kWide<T> : kNarrow<T>;
  plan.tiles = channels == 0 ? 1 : ceil_div(channels, kLanes * plan.width);
  plan.slots = plan.tiles * kLanes * plan.width;
  plan.wide = wide;
  return plan;
}

// Rows of one tensor: the last dimension is contiguous, `stride` is in elements.
template <typename T>
struct Matrix {
  T* data;
  int64_t stride;
  __device__ __forceinline__ T* row(int64_t index) const { return data + index * stride; }
};

// One byte a row, 0 where it does not count; data is null where every row counts.
struct Mask {
  const uint8_t* data;
  int64_t stride;
};

// The channels of one lane.
template <typename T, int W>
struct Lane {
  static constexpr bool kIsWide = W == kWide<T>;
  static constexpr int kStep = kIsWide ? 1 : kLanes;
  int64_t first;  // channel of k = 0; the last whole vector where a wide lane has no channels
  int valid;      // how many of the W channels exist: all or none where access is wide

  __device__ __forceinline__ explicit Lane(const Plan& plan) {
    const int lane = threadIdx.x % kLanes;
    first = blockIdx.x * static_cast<int64_t>(kLanes * W) + (kIsWide ? lane * W : lane);
    const int64_t left = plan.channels - first;
    valid = left <= 0 ? 0 : left >= W * kStep ? W : static_cast<int>(ceil_div(left, kStep));
    if (kIsWide && left <= 0) first = plan.channels - W;
  }

  // `source` and `target` are where the lane's first channel of a row lies (LaneRows). A wide lane
  // without channels loads what its neighbour does: no traffic, and no branch.
  __device__ __forceinline__ Vector<T, W> load(const T* source) const {
    Vector<T, W> vector;
    if constexpr (kIsWide) {
      const uint4 bits = __ldg(reinterpret_cast<const uint4*>(source));
      memcpy(&vector, &bits, sizeof(vector));
    } else {
#pragma unroll
      for (int k = 0; k < W; ++k) {
        vector.at[k] = k < valid ? __ldg(source + k * kStep) : from_real<T>(0);
      }
    }
    return vector;
  }

  __device__ __forceinline__ void store(T* target, const Vector<T, W>& vector) const {
    if constexpr (kIsWide) {
      uint4 bits;
      memcpy(&bits, &vector, sizeof(vector));
      if (valid > 0) *reinterpret_cast<uint4*>(target) = bits;
    } else {
#pragma unroll
      for (int k = 0; k < W; ++k) {
        if (k < valid) target[k * kStep] = vector.at[k];
      }
    }
  }
};

// The channel of a slot, the inverse of a Lane's numbering; at least `channels` for padding.
__device__ __forceinline__ int64_t slot_channel(const Plan& plan, int64_t slot) {
  const int tile_channels = kLanes * plan.width;
  const int64_t tile_start = slot / tile_channels * tile_channels;
  const int within = static_cast<int>(slot - tile_start);
  const int k = within / kLanes;
  const int lane = within % kLanes;
  return tile_start + (plan.wide ? lane * plan.width + k : within);
}

// Up to 32 rows of one warp: bit i stands for row first + i * kWarps.
struct Segment {
  int64_t first;
  int left;  // rows of the warp in the chunk, from first on

  __device__ __forceinline__ explicit Segment(const Plan& plan) {
    const int64_t start = blockIdx.y * plan.rows_per_chunk;
    const int64_t stop = start + plan.rows_per_chunk;
    first = start + threadIdx.x / kLanes;
    left = static_cast<int>(((stop < plan.rows ? stop : plan.rows) - first + kWarps - 1) / kWarps);
  }
  __device__ __forceinline__ bool any() const { return left > 0; }
  __device__ __forceinline__ void next() {
    first += kSegment * kWarps;
    left -= kSegment;
  }
  __device__ __forceinline__ int64_t row(uint32_t bit) const { return first + bit * kWarps; }
  __device__ __forceinline__ uint32_t rows() const {
    return left < kSegment ? (1u << left) - 1u : 0xffffffffu;
  }
  __device__ __forceinline__ uint32_t kept(const Mask& mask) const {
    const uint32_t rows_there = rows();
    if (mask.data == nullptr) return rows_there;
    const int lane = threadIdx.x % kLanes;
    const bool keep = (rows_there >> lane & 1u) != 0 && mask.data[row(lane) * mask.stride] != 0;
    return __ballot_sync(0xffffffffu, keep);
  }
};

// The rows of a segment from a lane's first channel on. Row `bit` lies as many steps from the first
// one: two instructions, where an address from the row's number takes seven.
template <typename T>
struct LaneRows {
  T* first;
  int64_t step;  // in bytes

  template <typename AnyLane>
  __device__ __forceinline__ LaneRows(const Matrix<T>& matrix, const Segment& segment,
                                      const AnyLane& lane)
      : first(matrix.row(segment.first) + lane.first),
        step(matrix.stride * kWarps * static_cast<int64_t>(sizeof(T))) {}
  __device__ __forceinline__ T* operator[](uint32_t bit) const {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return reinterpret_cast<T*>(reinterpret_cast<Byte*>(first) + bit * step);
  }
};

// Takes the lowest bit out of a set of rows and returns its number.
__device__ __forceinline__ uint32_t pop(uint32_t& rows) {
  const uint32_t bit = __ffs(static_cast<int>(rows)) - 1;
  rows &= rows - 1u;
  return bit;
}

}  // namespace ssah
