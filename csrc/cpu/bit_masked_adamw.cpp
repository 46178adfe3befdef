#include "checks.h"
#include "masked_update_host.h"
#include "ops.h"

namespace ssah {
namespace {

constexpr long kBlocksAtOnce = 64;  // of kBitBlock elements: as many as a block of masked_adamw_

// A tensor that lies in one piece, of this many elements.
void check_piece(const Tensor& x, ScalarType dtype, int64_t numel, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == dtype && x.is_contiguous() && x.numel() == numel, name,
                  " must be contiguous, with ", numel, " elements and the dtype of its list");
}

// Number of trained elements. Whatever the mask says, states are read and written by the offsets
// alone: offsets that fit harm no memory.
int64_t check_offsets(const Tensor& offsets, int64_t blocks) {
  check_piece(offsets, ScalarType::Long, blocks + 1, "offsets");
  const auto* at = static_cast<const int64_t*>(offsets.const_data_ptr());
  STD_TORCH_CHECK(at[0] == 0, "offsets has ", at[0], " first; it must be 0");
  for (int64_t b = 0; b < blocks; ++b) {
    // By comparisons: a difference could be beyond 64 bits.
    STD_TORCH_CHECK(
        at[b + 1] >= at[b] && at[b + 1] <= (b + 1) * kBitBlock && at[b + 1] - at[b] <= kBitBlock,
        "offsets has ", at[b + 1], " after ", at[b], "; it must rise by 0 to ", kBitBlock,
        " a block");
  }
  return at[blocks];
}

}  // namespace

void bit_masked_adamw_cpu(const TensorList& params, const TensorList& grads,
                          const TensorList& exp_avgs, const TensorList& exp_avg_sqs,
                          const TensorList& masks, const TensorList& offsets, const Tensor& lr,
                          const Tensor& step, const std::optional<Tensor>& grad_scale,
                          const std::optional<Tensor>& clip_coef, const std::optional<Tensor>& seed,
                          double beta1, double beta2, double eps, double weight_decay,
                          bool maximize) {
  const AdamWArgs args =
      adamw_args(lr, step, grad_scale, clip_coef, beta1, beta2, eps, weight_decay, maximize);
  const size_t count = params.size();
  check_length(params, count, "params");
  check_length(grads, count, "grads");
  check_length(exp_avgs, count, "exp_avgs");
  check_length(exp_avg_sqs, count, "exp_avg_sqs");
  check_length(masks, count, "masks");
  check_length(offsets, count, "offsets");
  const ScalarType dtype = params[0].scalar_type(), state = exp_avgs[0].scalar_type();
  std::vector<BitMaskedTensor> tensors;
  std::vector<BlockOfTensor> blocks;
  int64_t first = 0;
  for (size_t i = 0; i < count; ++i) {
    const int64_t n = params[i].numel(), n_blocks = (n + kBitBlock - 1) / kBitBlock;
    check_piece(params[i], dtype, n, "params");
    check_piece(grads[i], dtype, n, "grads");
    check_piece(masks[i], ScalarType::Byte, (n + 7) / 8, "masks");
    const int64_t trained = check_offsets(offsets[i], n_blocks);
    check_piece(exp_avgs[i], state, trained, "exp_avgs");
    check_piece(exp_avg_sqs[i], state, trained, "exp_avg_sqs");
    const NoiseKeys keys =
        seed.has_value() ? noise_keys(*seed, scalar_of(step, 0), i) : NoiseKeys{};
    tensors.push_back({params[i].mutable_data_ptr(), grads[i].const_data_ptr(),
                       exp_avgs[i].mutable_data_ptr(), exp_avg_sqs[i].mutable_data_ptr(),
                       static_cast<const unsigned char*>(masks[i].const_data_ptr()),
                       static_cast<const long*>(offsets[i].const_data_ptr()), n, seed.has_value(),
                       keys.key0, keys.key1});
    for (long b = 0; b < n_blocks; b += kBlocksAtOnce) {
      const long end = b + kBlocksAtOnce < n_blocks ? b + kBlocksAtOnce : n_blocks;
      blocks.push_back({static_cast<long>(i), {b, end, 0, kBitBlock}, first});
      first += (end - b) * kBitBlock;
    }
  }
  const auto run =
      kernel_of(kernels().bit_masked_adamw, dtype_of(params[0]), state_type_of(exp_avgs[0]));
  over_blocks(blocks,
              [&](const BlockOfTensor& b, size_t) { run(tensors[b.tensor], args, b.block); });
}

}  // namespace ssah
