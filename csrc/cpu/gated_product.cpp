#include "checks.h"
#include "ops.h"

namespace ssah {
namespace {

// Element offsets in factors [arms, units] of the row that each token has: where arm is 0, 2, 0 and
// a row of factors takes 64 elements, they are 0, 128, 0.
std::vector<long> factor_offsets(const Tensor& factors, const Tensor& arm) {
  const auto* arms = static_cast<const long*>(arm.const_data_ptr());
  std::vector<long> offsets(arms, arms + arm.numel());
  for (long& each : offsets) {
    STD_TORCH_CHECK(each >= 0 && each < factors.size(0), "arm has ", each,
                    "; it must be from 0 to ", factors.size(0) - 1);
    each *= factors.stride(0);
  }
  return offsets;
}

}  // namespace

Tensor gated_product_cpu(const Tensor& gate, const Tensor& up, const Tensor& factors,
                         const Tensor& arm, int64_t act) {
  check_rows(gate, "gate");
  check_like(up, gate, "up");
  check_rows(up, "up");
  const int64_t channels = gate.size(gate.dim() - 1);
  const Dtype dtype = dtype_of(gate);
  const Dtype wide = dtype == kFloat64 ? kFloat64 : kFloat32;
  STD_TORCH_CHECK(factors.dim() == 2 && factors.size(1) == channels && dtype_of(factors) == wide,
                  "factors must be [arms, units] in the type of the arithmetic");
  check_rows(factors, "factors");
  const std::vector<long> gate_rows = row_offsets(gate), up_rows = row_offsets(up);
  STD_TORCH_CHECK(arm.scalar_type() == ScalarType::Long && arm.is_contiguous() &&
                      arm.dim() == gate.dim() - 1 &&
                      arm.numel() == static_cast<int64_t>(gate_rows.size()),
                  "arm must be contiguous int64 with the leading shape of gate");
  const std::vector<long> factor_rows = factor_offsets(factors, arm);
  const auto run = kernels().gated_product[dtype][activation_of(act)];
  const Tensor output = contiguous_like(gate);
  const GatedProductArgs args{gate.const_data_ptr(),
                              up.const_data_ptr(),
                              factors.const_data_ptr(),
                              output.mutable_data_ptr(),
                              gate_rows.data(),
                              up_rows.data(),
                              factor_rows.data(),
                              static_cast<long>(gate_rows.size()),
                              channels};
  // Nothing is summed: rows may be shared among any number of threads.
  torch::stable::parallel_for(0, args.n_rows, 16,
                              [&](int64_t begin, int64_t end) { run(args, begin, end); });
  return output;
}

}  // namespace ssah
