// Host function of read_bytes.h, on all threads: to measure the bandwidth of reading.
#include <atomic>

#include "host.h"
#include "ops.h"

namespace ssah {

int64_t read_bytes_cpu(const Tensor& data) {
  STD_TORCH_CHECK(data.scalar_type() == torch::headeronly::ScalarType::Byte && data.dim() == 1 &&
                      data.is_contiguous() && data.numel() % 64 == 0,
                  "data must be a contiguous uint8 tensor [n_bytes], n_bytes a multiple of 64");
  const void* bytes = data.data_ptr();
  std::atomic<unsigned> total{0};
  torch::stable::parallel_for(0, data.numel() / 64, 1024, [&](int64_t begin, int64_t end) {
    total += kernels().read_blocks(bytes, begin, end);
  });
  return total.load();
}

}  // namespace ssah
