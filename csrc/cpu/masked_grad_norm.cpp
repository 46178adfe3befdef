#include <cmath>

#include "masked_update_host.h"
#include "ops.h"

namespace ssah {

Tensor masked_grad_norm_cpu(const TensorList& grads, const IndexList& indices,
                            const std::vector<int64_t>& dims,
                            const std::optional<Tensor>& grad_scale) {
  std::vector<UpdateTensor> tensors;
  for (size_t i = 0; i < grads.size(); ++i) {
    UpdateTensor t = selected_matrix(grads[i], indices[i], dims[i]);
    t.grad = grads[i].const_data_ptr();
    tensors.push_back(t);
  }
  const std::vector<BlockOfTensor> blocks = blocks_of(tensors);
  std::vector<double> partial(blocks.size());
  const auto run = kernels().masked_grad_norm[dtype_of(grads[0])];
  torch::stable::parallel_for(0, static_cast<int64_t>(blocks.size()), 1,
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) {
                                  partial[i] = run(tensors[blocks[i].tensor], blocks[i].block);
                                }
                              });
  double total = 0;
  for (double part : partial) total += part;
  Tensor norm = torch::stable::new_zeros(grads[0], {}, torch::headeronly::ScalarType::Double);
  *static_cast<double*>(norm.mutable_data_ptr()) = std::sqrt(total) / scalar_of(grad_scale, 1);
  return norm;
}

}  // namespace ssah
