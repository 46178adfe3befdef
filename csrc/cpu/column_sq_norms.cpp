#include "checks.h"
#include "ops.h"

namespace ssah {

Tensor column_sq_norms_cpu(const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight has ", weight.dim(), " dimensions; it must have 2");
  check_rows(weight, "weight");
  const auto run = kernels().column_sq_norms[dtype_of(weight)];
  Tensor norms =
      torch::stable::new_zeros(weight, {weight.size(1)}, torch::headeronly::ScalarType::Double);
  const ColumnSqNormsArgs args{weight.const_data_ptr(), weight.stride(0), weight.size(0),
                               static_cast<double*>(norms.mutable_data_ptr())};
  over_channels(weight.size(1), [&](ChannelRange range) { run(args, range); });
  return norms;
}

}  // namespace ssah
