// Tables that are copied to the GPU while the host goes on.
//
// A copy from memory that the system may move (a std::vector's) can wait for everything before it
// in the stream. A copy from pinned memory is queued. The memory must stay as it is until the copy
// is done, so that there is a ring of pieces, and an event behind each copy:
//
//   call        1   2   3  ...  32   33
//   piece       0   1   2  ...  31    0     waits for the copy of call 1, which is long done
#pragma once

#include <cstring>
#include <map>
#include <mutex>

#include "host.h"

namespace ssah {

constexpr unsigned kPieces = 32;  // a host that is 32 calls ahead of its GPU waits

struct PinnedPiece {
  void* memory = nullptr;
  size_t capacity = 0;
  cudaEvent_t copied = nullptr;
};

struct PinnedRing {
  PinnedPiece pieces[kPieces];
  unsigned next = 0;
};

// Copies `bytes` from `source`, which may go when this returns, to `target` on the device of
// `like`.
inline void copy_table(void* target, const void* source, size_t bytes, const Tensor& like,
                       cudaStream_t stream) {
  refuse_capture(stream);
  static std::mutex mutex;
  // Never freed: when the process ends, the driver may be gone before it.
  static auto& rings = *new std::map<int32_t, PinnedRing>;  // by device, as events are
  const std::lock_guard<std::mutex> lock(mutex);
  PinnedRing& ring = rings[like.get_device_index()];
  PinnedPiece& piece = ring.pieces[ring.next++ % kPieces];
  if (piece.copied == nullptr) {
    check_launch(cudaEventCreateWithFlags(&piece.copied, cudaEventDisableTiming), "event");
  } else {
    check_launch(cudaEventSynchronize(piece.copied), "copy of an earlier table");
  }
  if (piece.capacity < bytes) {
    check_launch(cudaFreeHost(piece.memory), "free of pinned memory");
    piece.memory = nullptr;
    piece.capacity = 0;
    // Room for a few parameters more, as those that join late would need a new piece each.
    check_launch(cudaHostAlloc(&piece.memory, bytes + bytes / 2, cudaHostAllocDefault),
                 "pinned memory of a table");
    piece.capacity = bytes + bytes / 2;
  }
  std::memcpy(piece.memory, source, bytes);
  check_launch(cudaMemcpyAsync(target, piece.memory, bytes, cudaMemcpyHostToDevice, stream),
               "copy of the table");
  check_launch(cudaEventRecord(piece.copied, stream), "event");
}

}  // namespace ssah
