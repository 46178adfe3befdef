#include "checks.h"
#include "ops.h"

namespace ssah {

void channel_moments_cpu(const Tensor& x, const Tensor& count, const Tensor& mean, const Tensor& m2,
                         const std::optional<Tensor>& token_mask) {
  check_rows(x, "x");
  const int64_t channels = x.size(x.dim() - 1);
  check_moments(count, mean, m2, channels);
  check_mask(token_mask, x);
  const std::vector<long> rows = select(row_offsets(x), token_mask, true);
  double* seen = static_cast<double*>(count.mutable_data_ptr());
  const ChannelMomentsArgs args{x.const_data_ptr(),
                                rows.data(),
                                static_cast<long>(rows.size()),
                                *seen,
                                static_cast<double*>(mean.mutable_data_ptr()),
                                static_cast<double*>(m2.mutable_data_ptr())};
  const auto run = kernels().channel_moments[dtype_of(x)];
  over_channels(channels, [&](ChannelRange range) { run(args, range); });
  *seen += static_cast<double>(rows.size());
}

}  // namespace ssah
