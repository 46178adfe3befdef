#include "checks.h"
#include "ops.h"

namespace ssah {

void taylor_moments_cpu(const Tensor& x, const Tensor& grad, const Tensor& signed_sum,
                        const Tensor& squared_sum, const std::optional<Tensor>& token_mask) {
  check_rows(x, "x");
  check_like(grad, x, "grad");
  check_rows(grad, "grad");
  const int64_t channels = x.size(x.dim() - 1);
  check_state(signed_sum, channels, "signed");
  check_state(squared_sum, channels, "squared");
  check_mask(token_mask, x);
  const std::vector<long> x_rows = select(row_offsets(x), token_mask, true);
  const std::vector<long> grad_rows = select(row_offsets(grad), token_mask, true);
  const TaylorMomentsArgs args{x.const_data_ptr(),
                               grad.const_data_ptr(),
                               x_rows.data(),
                               grad_rows.data(),
                               static_cast<long>(x_rows.size()),
                               static_cast<double*>(signed_sum.mutable_data_ptr()),
                               static_cast<double*>(squared_sum.mutable_data_ptr())};
  const auto run = kernels().taylor_moments[dtype_of(x)];
  over_channels(channels, [&](ChannelRange range) { run(args, range); });
}

}  // namespace ssah
