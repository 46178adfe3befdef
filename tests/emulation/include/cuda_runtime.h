// The CUDA execution model on the CPU: what the kernels of csrc/cuda use of it, and no more.
//
// This header stands in for CUDA's own, so that a .cu file compiles unchanged as C++. A launch runs
// at once, block after block in random order; a block's threads are fibers that run one at a time,
// in random order, from one barrier or warp-wide operation to the next (runtime.cpp). Shared memory
// is dynamic alone (`extern __shared__`), and is filled with 0xff (NaN) before every block. A
// launch or copy fails unless it is on the current stream of the tensors' device, with that device
// current.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __builtin_assume(condition)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
const char* cudaGetErrorString(cudaError_t error);

// Whether the stream is being captured; tests say so (emulation_capture).
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);

enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1 };
cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);

constexpr unsigned cudaHostAllocDefault = 0, cudaEventDisableTiming = 2;
using cudaEvent_t = int*;
cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned flags);
cudaError_t cudaFreeHost(void* memory);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);

// Of the fiber that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// The one shared memory, as the kernels declare it inside namespace ssah.
namespace ssah {
extern __align__(16) unsigned char shared_memory[];
}

namespace emulation {

constexpr int kWarpSize = 32;

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& thread);

// Suspends the calling fiber until the whole block, or its whole warp, has arrived at `site`;
// a warp's lanes also exchange a value, and get those of all.
void block_barrier();
const uint64_t* warp_exchange(const char* site, uint32_t mask, uint64_t value);

// Ends the launch with an error; the calling fiber does not go on.
void trap();

void count_read(size_t bytes);

template <typename T>
T shuffle(const char* site, uint32_t mask, T value, int source) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_exchange(site, mask, bits)[source];
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulation

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return emulation::run(*config, [&] { kernel(arguments...); });
}

inline void __syncthreads() { emulation::block_barrier(); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) {
  emulation::warp_exchange("__syncwarp", mask, 0);
}
inline uint32_t __ballot_sync(uint32_t mask, bool predicate) {
  const uint64_t* of_lane = emulation::warp_exchange("__ballot_sync", mask, predicate);
  uint32_t bits = 0;
  for (int lane = 0; lane < emulation::kWarpSize; ++lane) bits |= uint32_t(of_lane[lane]) << lane;
  return bits;
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask) {
  return emulation::shuffle("__shfl_xor_sync", mask, value,
                            int(threadIdx.x % emulation::kWarpSize) ^ lane_mask);
}
// Read-only memory; counted.
template <typename T>
T __ldg(const T* address) {
  emulation::count_read(sizeof(T));
  return *address;
}

// A store with the default caching.
template <typename T>
void __stwb(T* address, T value) {
  *address = value;
}

inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
// Four of the eight bytes of low and high, which the digits of the selector name.
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7u) & 0xffu) << 8 * i;
  }
  return result;
}
inline void __trap() { emulation::trap(); }
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline float __fdividef(float a, float b) {
  return std::fabs(b) > 8.507059e37f && std::isfinite(b) ? 0.0f : a / b;
}

// csrc/cuda/approximate.cuh: the largest errors that it states, up or down by the argument's bits.
namespace emulation {
inline float flushed(float value) {
  return std::fabs(value) < 1.17549435e-38f ? 0.0f * value : value;
}
inline float off(double value, float of, double error) {
  const bool up = (__float_as_uint(of) * 0x9e3779b1u >> 31) != 0;
  return flushed(static_cast<float>(value * (up ? 1 + error : 1 - error)));
}
}  // namespace emulation
inline float exp2_approximate(float x) {
  return emulation::off(std::exp2(static_cast<double>(emulation::flushed(x))), x, 0x1p-22);
}
inline float reciprocal_approximate(float x) {
  return emulation::off(1.0 / static_cast<double>(emulation::flushed(x)), x, 0x1p-23);
}
inline float root_approximate(float x) {
  return emulation::off(std::sqrt(static_cast<double>(x < 0x1p-126f ? 0x1p-126f : x)), x, 0x1p-23);
}
