// Host side of the masked update: tensors as selected matrices, cut into blocks for the threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "host.h"

namespace ssah {

using TensorList = std::vector<Tensor>;
using OptionalTensorList = std::optional<std::vector<Tensor>>;
using IndexList = std::vector<std::optional<Tensor>>;

struct BlockOfTensor {
  long tensor;
  UpdateBlock block;
  int64_t first;  // elements before it, over all blocks
};

// The matrix `x` of which `index` selects rows (axis 0) or columns. Raises unless x is one and the
// index strictly increasing and within x.
UpdateTensor selected_matrix(const Tensor& x, const std::optional<Tensor>& index, int64_t axis);

// Blocks of every tensor, in order. They depend on the shapes alone, so that sums do not depend on
// the number of threads; where importance is summed, no unit is cut.
std::vector<BlockOfTensor> blocks_of(const std::vector<UpdateTensor>& tensors);

double scalar_of(const std::optional<Tensor>& x, double otherwise);

// Of the noise of the tensor at position `number`; raises where seed or step have none.
struct NoiseKeys {
  unsigned key0, key1;
};
NoiseKeys noise_keys(const Tensor& seed, double step, size_t number);

// What is the same for every element of an AdamW step, computed in double.
AdamWArgs adamw_args(const Tensor& lr, const Tensor& step, const std::optional<Tensor>& grad_scale,
                     const std::optional<Tensor>& clip_coef, double beta1, double beta2, double eps,
                     double weight_decay, bool maximize);

// What an update's lists have in common.
struct UpdateLists {
  const TensorList &params, &grads;
  const TensorList *state0, *state1;  // or null
  const IndexList& indices;
  const std::vector<int64_t>& axes;
  const std::optional<Tensor>&step, &grad_scale, &seed;
  const OptionalTensorList &compensations, &signed_sums, &squared_sums;
  const OptionalTensorList *scales0, *scales1;  // of states in 8 bits; null where there is no state
};
// Raises unless all lists fit each other.
std::vector<UpdateTensor> update_tensors(const UpdateLists& lists);

// The entry of a table of kernels, of a parameter's and its state's type.
template <class Kernel>
Kernel kernel_of(Kernel const (&table)[kDtypes][kStateTypes], Dtype param, int state) {
  const Kernel kernel = table[param][state];
  STD_TORCH_CHECK(kernel != nullptr, "states must be float64 with float64 parameters, and else ",
                  "float32 or bfloat16, or uint8 with scales");
  return kernel;
}
// The type of `state`: a Dtype, or kCodes.
int state_type_of(const Tensor& state);

// Runs run(block, its number) over all blocks; every thread gets as many elements.
template <class F>
void over_blocks(const std::vector<BlockOfTensor>& blocks, F run) {
  if (blocks.empty()) return;
  const UpdateBlock& last = blocks.back().block;
  const int64_t elements =
      blocks.back().first + (last.row_end - last.row_begin) * (last.column_end - last.column_begin);
  const auto starts_before = [](const BlockOfTensor& b, int64_t e) { return b.first < e; };
  torch::stable::parallel_for(0, elements, 4096, [&](int64_t begin, int64_t end) {
    auto it = std::lower_bound(blocks.begin(), blocks.end(), begin, starts_before);
    for (; it != blocks.end() && it->first < end; ++it) {
      run(*it, static_cast<size_t>(it - blocks.begin()));
    }
  });
}

}  // namespace ssah
