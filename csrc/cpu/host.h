// What every host function needs: the chosen instruction set, dtypes, and rows as offsets.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "types.h"

namespace ssah {

using torch::stable::Tensor;

// The table for this processor, or the one that SSAH_CPU_CAPABILITY names. See capability.cpp.
const Kernels& kernels();
std::vector<const Kernels*> built_kernels();

Dtype dtype_of(const Tensor& x);

// A new contiguous tensor of the shape and type of x, for a kernel to fill.
Tensor contiguous_like(const Tensor& x);

// Element offset of every row of x [..., channels] from its first element, in row-major order of
// the leading dimensions; with `mask`, which was checked to fit, the rows where it is `keep`.
std::vector<long> row_offsets(const Tensor& x);
std::vector<long> select(const std::vector<long>& offsets, const std::optional<Tensor>& mask,
                         bool keep);

// Splits the channels among threads, in whole cache lines of the widest kernel's registers.
template <class F>
void over_channels(long channels, F run) {
  constexpr long kBlock = 64;
  const long blocks = (channels + kBlock - 1) / kBlock;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const long last = end * kBlock < channels ? end * kBlock : channels;
    run(ChannelRange{begin * kBlock, last});
  });
}

}  // namespace ssah
