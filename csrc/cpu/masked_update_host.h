// Host side of the masked update: tensors as selected matrices, cut into blocks for the threads.
#pragma once

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
};

// The matrix `x` of which `index` selects rows (axis 0) or columns. Raises unless the index is
// strictly increasing and within x.
UpdateTensor selected_matrix(const Tensor& x, const std::optional<Tensor>& index, int64_t axis);

// Blocks of every tensor, in order. They depend on the shapes alone, so that sums do not depend on
// the number of threads; where importance is summed, no unit is cut.
std::vector<BlockOfTensor> blocks_of(const std::vector<UpdateTensor>& tensors);

double scalar_of(const std::optional<Tensor>& x, double otherwise);

// What an update's lists have in common.
struct UpdateLists {
  const TensorList &params, &grads;
  const TensorList *state0, *state1;  // or null
  const IndexList& indices;
  const std::vector<int64_t>& axes;
  const std::optional<Tensor>&step, &grad_scale, &seed;
  const OptionalTensorList &compensations, &signed_sums, &squared_sums;
};
std::vector<UpdateTensor> update_tensors(const UpdateLists& lists);

// Runs run(tensor, block) over all blocks on all threads.
template <class F>
void over_blocks(const std::vector<UpdateTensor>& tensors, F run) {
  const std::vector<BlockOfTensor> blocks = blocks_of(tensors);
  torch::stable::parallel_for(0, static_cast<int64_t>(blocks.size()), 1,
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) {
                                  run(tensors[blocks[i].tensor], blocks[i].block);
                                }
                              });
}

}  // namespace ssah
