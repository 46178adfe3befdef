#include <cmath>

#include "checks.h"
#include "masked_update_host.h"
#include "ops.h"

namespace ssah {

Tensor masked_grad_norm_cpu(const TensorList& grads, const IndexList& indices,
                            const std::vector<int64_t>& dims,
                            const std::optional<Tensor>& grad_scale) {
  check_length(grads, grads.size(), "grads");
  check_length(indices, grads.size(), "indices");
  check_length(dims, grads.size(), "dims");
  std::vector<UpdateTensor> tensors;
  for (size_t i = 0; i < grads.size(); ++i) {
    UpdateTensor t = selected_matrix(grads[i], indices[i], dims[i]);
    STD_TORCH_CHECK(grads[i].scalar_type() == grads[0].scalar_type(), "grads must have one dtype");
    t.grad = grads[i].const_data_ptr();
    tensors.push_back(t);
  }
  const std::vector<BlockOfTensor> blocks = blocks_of(tensors);
  std::vector<double> partial(blocks.size());
  const auto run = kernels().masked_grad_norm[dtype_of(grads[0])];
  over_blocks(blocks, [&](const BlockOfTensor& b, size_t i) {
    partial[i] = run(tensors[b.tensor], b.block);
  });
  // In the order of the blocks, whichever thread did them.
  double total = 0;
  for (double part : partial) total += part;
  Tensor norm = torch::stable::new_zeros(grads[0], {}, torch::headeronly::ScalarType::Double);
  *static_cast<double*>(norm.mutable_data_ptr()) = std::sqrt(total) / scalar_of(grad_scale, 1);
  return norm;
}

}  // namespace ssah
