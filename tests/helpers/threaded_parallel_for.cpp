// Stands in for torch's torch_parallel_for (LD_PRELOAD): std::thread in place of OpenMP, whose
// barriers ThreadSanitizer does not know; 2, 3 and 5 workers in turn, and no grain, so that the
// smallest call is shared out too. With PLANTED_RACE in the environment the workers race, which the
// sanitizer must report.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {
std::atomic<unsigned> calls{0};
const bool planted = std::getenv("PLANTED_RACE") != nullptr;
long counted = 0;
}  // namespace

extern "C" __attribute__((visibility("default"))) AOTITorchError
torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc run, void* context) {
  constexpr int64_t kWorkers[] = {2, 3, 5};
  const int64_t workers = kWorkers[calls++ % 3];
  const int64_t share = (end - begin + workers - 1) / workers;
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += share) {
    threads.emplace_back([=] {
      run(first, std::min(first + share, end), context);
      if (planted) counted += 1;
    });
  }
  for (std::thread& thread : threads) thread.join();
  return AOTI_TORCH_SUCCESS;
}
