#include "checks.h"
#include "ops.h"

namespace ssah {
namespace {

// The rows that count, then the masked ones; `counted` is set to the number of the former.
std::vector<long> counted_first(const Tensor& x, const std::optional<Tensor>& mask, long& counted) {
  const std::vector<long> all = row_offsets(x);
  std::vector<long> rows = select(all, mask, true);
  const std::vector<long> masked = select(all, mask, false);
  counted = static_cast<long>(rows.size());
  rows.insert(rows.end(), masked.begin(), masked.end());
  return rows;
}

}  // namespace

Tensor gated_moments_cpu(const Tensor& gate, const Tensor& up, const Tensor& count,
                         const Tensor& mean, const Tensor& m2,
                         const std::optional<Tensor>& token_mask, int64_t act) {
  check_rows(gate, "gate");
  check_like(up, gate, "up");
  check_rows(up, "up");
  const int64_t channels = gate.size(gate.dim() - 1);
  check_moments(count, mean, m2, channels);
  check_mask(token_mask, gate);
  const auto run = kernels().gated_moments[dtype_of(gate)][activation_of(act)];
  Tensor output = contiguous_like(gate);
  long counted = 0;
  // Masked rows go last: the kernel sums the first `counted` and only writes the others.
  const std::vector<long> gate_rows = counted_first(gate, token_mask, counted);
  const std::vector<long> up_rows = counted_first(up, token_mask, counted);
  const std::vector<long> output_rows = counted_first(output, token_mask, counted);
  double* seen = static_cast<double*>(count.mutable_data_ptr());
  const GatedMomentsArgs args{gate.const_data_ptr(),
                              up.const_data_ptr(),
                              output.mutable_data_ptr(),
                              gate_rows.data(),
                              up_rows.data(),
                              output_rows.data(),
                              static_cast<long>(gate_rows.size()),
                              counted,
                              *seen,
                              static_cast<double*>(mean.mutable_data_ptr()),
                              static_cast<double*>(m2.mutable_data_ptr())};
  // Threads share channels, not rows: each adds its own in the order of the rows.
  over_channels(channels, [&](ChannelRange range) { run(args, range); });
  *seen += static_cast<double>(counted);
  return output;
}

std::tuple<Tensor, Tensor> gated_moments_backward_cpu(const Tensor& grad, const Tensor& gate,
                                                      const Tensor& up, int64_t act) {
  check_rows(gate, "gate");
  check_like(up, gate, "up");
  check_rows(up, "up");
  check_like(grad, gate, "grad");
  check_rows(grad, "grad");
  const auto run = kernels().gated_backward[dtype_of(gate)][activation_of(act)];
  Tensor grad_gate = contiguous_like(gate), grad_up = contiguous_like(up);
  const std::vector<long> grad_rows = row_offsets(grad), gate_rows = row_offsets(gate),
                          up_rows = row_offsets(up);
  const GatedBackwardArgs args{grad.const_data_ptr(),
                               gate.const_data_ptr(),
                               up.const_data_ptr(),
                               grad_gate.mutable_data_ptr(),
                               grad_up.mutable_data_ptr(),
                               grad_rows.data(),
                               gate_rows.data(),
                               up_rows.data(),
                               static_cast<long>(gate_rows.size()),
                               gate.size(gate.dim() - 1)};
  // Nothing is summed: rows may be shared among any number of threads.
  torch::stable::parallel_for(0, args.n_rows, 16,
                              [&](int64_t begin, int64_t end) { run(args, begin, end); });
  return {grad_gate, grad_up};
}

}  // namespace ssah
