// Fibers and their scheduler: see include/cuda_runtime.h.
#include <cuda_runtime.h>
#include <setjmp.h>
#include <torch/csrc/stable/accelerator.h>
#include <ucontext.h>

#include <cstdlib>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace {

constexpr size_t kSharedBytes = 64 * 1024;
constexpr size_t kStackBytes = 128 * 1024;

std::mt19937_64 random_bits(0);
std::string failure;
uint64_t bytes_read = 0;
bool capturing = false;
std::set<const void*> pinned;  // where memory of the host begins that copies need not wait for

// Tensors are on the CPU, whose index is -1. Without a guard another device is current, and a stream
// that was not asked for is null.
constexpr int32_t kTensorDevice = -1;
int32_t current_device = 3;
char streams[8];

cudaStream_t stream_of(int32_t device) { return &streams[device + 1]; }

bool astray(cudaStream_t stream) {
  if (stream != stream_of(kTensorDevice)) failure = "not on the current stream of the tensors";
  if (current_device != kTensorDevice) failure = "not on the device of the tensors";
  return !failure.empty();
}

enum class State { kReady, kAtBlockBarrier, kAtWarpOperation, kDone };

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  ucontext_t start;
  jmp_buf resume;
  bool started;
  State state;
  const char* site;  // of the warp-wide operation
  uint64_t value;    // handed in there
};

struct Warp {
  int waiting;
  uint64_t exchanged[emulation::kWarpSize];
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<unsigned> ready;
unsigned running;
unsigned at_barrier;
jmp_buf scheduler;
const std::function<void()>* thread_body;

void suspend(State state) {
  Fiber& self = fibers[running];
  self.state = state;
  if (_setjmp(self.resume) == 0) _longjmp(scheduler, 1);
}

void fiber_main() {
  (*thread_body)();
  suspend(State::kDone);
}

void resume(unsigned index) {
  running = index;
  threadIdx = {index, 0, 0};
  Fiber& fiber = fibers[index];
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

void wake(State from, unsigned begin, unsigned end) {
  for (unsigned i = begin; i < end; ++i) {
    if (fibers[i].state != from) continue;
    fibers[i].state = State::kReady;
    ready.push_back(i);
  }
}

// After a fiber stopped: does what it waited for now happen?
void settle(unsigned index, unsigned threads) {
  const Fiber& fiber = fibers[index];
  if (fiber.state == State::kAtBlockBarrier && ++at_barrier == threads) {
    at_barrier = 0;
    wake(State::kAtBlockBarrier, 0, threads);
  } else if (fiber.state == State::kAtWarpOperation) {
    const unsigned first = index / emulation::kWarpSize * emulation::kWarpSize;
    Warp& warp = warps[index / emulation::kWarpSize];
    if (++warp.waiting < emulation::kWarpSize) return;
    warp.waiting = 0;
    for (int lane = 0; lane < emulation::kWarpSize; ++lane) {
      const Fiber& other = fibers[first + lane];
      if (other.site != fiber.site) failure = "lanes of a warp wait in different operations";
      warp.exchanged[lane] = other.value;
    }
    wake(State::kAtWarpOperation, first, first + emulation::kWarpSize);
  }
}

void run_block(unsigned threads) {
  at_barrier = 0;
  warps.assign(threads / emulation::kWarpSize, Warp{});
  ready.clear();
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.started = false;
    fiber.state = State::kReady;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.start, fiber_main, 0);
    ready.push_back(i);
  }
  while (!ready.empty() && failure.empty()) {
    std::swap(ready[random_bits() % ready.size()], ready.back());
    const unsigned index = ready.back();
    ready.pop_back();
    resume(index);
    settle(index, threads);
  }
  for (unsigned i = 0; i < threads && failure.empty(); ++i) {
    if (fibers[i].state != State::kDone) failure = "threads wait for others that do not come";
  }
}

}  // namespace

namespace ssah {
alignas(16) unsigned char shared_memory[kSharedBytes];
}

namespace emulation {

void block_barrier() { suspend(State::kAtBlockBarrier); }

const uint64_t* warp_exchange(const char* site, uint32_t mask, uint64_t value) {
  if (mask != 0xffffffffu) failure = "only whole warps are modelled";
  fibers[running].site = site;
  fibers[running].value = value;
  suspend(State::kAtWarpOperation);
  return warps[running / kWarpSize].exchanged;
}

void trap() {
  failure = "trap";
  suspend(State::kDone);
}

void count_read(size_t bytes) { bytes_read += bytes; }

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  const unsigned threads = config.blockDim.x;
  const size_t shared_bytes = config.dynamicSmemBytes;
  if (threads == 0 || threads > 1024 || threads % kWarpSize != 0 || config.blockDim.y != 1 ||
      config.gridDim.x == 0 || config.gridDim.y == 0 || config.gridDim.y > 65535 ||
      config.gridDim.z != 1 || shared_bytes > 48 * 1024) {
    return cudaErrorInvalidConfiguration;
  }
  if (fibers.size() < threads) fibers.resize(threads);
  failure.clear();
  if (astray(config.stream)) return cudaErrorLaunchFailure;
  thread_body = &thread;
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  std::vector<uint64_t> blocks(uint64_t(gridDim.x) * gridDim.y);
  for (uint64_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
  std::shuffle(blocks.begin(), blocks.end(), random_bits);
  for (const uint64_t block : blocks) {
    blockIdx = {unsigned(block % gridDim.x), unsigned(block / gridDim.x), 0};
    std::memset(ssah::shared_memory, 0xff, kSharedBytes);
    run_block(threads);
    for (size_t i = shared_bytes; i < kSharedBytes && failure.empty(); ++i) {
      if (ssah::shared_memory[i] != 0xff) failure = "shared memory written beyond its end";
    }
    if (!failure.empty()) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace emulation

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration" : failure.c_str();
}

cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  failure.clear();
  if (astray(stream)) return cudaErrorLaunchFailure;
  if (pinned.count(source) == 0) {
    failure = "copied from memory that is not pinned: the host may wait for the GPU";
    return cudaErrorLaunchFailure;
  }
  std::memcpy(target, source, bytes);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  *memory = std::malloc(bytes);
  pinned.insert(*memory);
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* memory) {
  pinned.erase(memory);
  std::free(memory);
  return cudaSuccess;
}

// Copies do not queue: an event is a number that is counted up.
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new int(0);
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  failure.clear();
  ++*event;
  return astray(stream) ? cudaErrorLaunchFailure : cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  failure = "the copy was not recorded";
  return *event > 0 ? cudaSuccess : cudaErrorLaunchFailure;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

namespace torch::stable::accelerator {
DeviceGuard::DeviceGuard(DeviceIndex index) : before(std::exchange(current_device, index)) {}
DeviceGuard::~DeviceGuard() { current_device = before; }
}  // namespace torch::stable::accelerator

// Launches do not queue.
extern "C" __attribute__((visibility("default"))) int aoti_torch_get_current_cuda_stream(
    int32_t device, void** stream) {
  *stream = stream_of(device);
  return 0;
}

extern "C" __attribute__((visibility("default"))) void emulation_seed(uint64_t seed) {
  random_bits.seed(seed);
}

extern "C" __attribute__((visibility("default"))) void emulation_capture(bool on) {
  capturing = on;
}

extern "C" __attribute__((visibility("default"))) uint64_t emulation_take_bytes_read() {
  return std::exchange(bytes_read, 0);
}
