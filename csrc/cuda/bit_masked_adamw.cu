// bit_masked_adamw_: one AdamW step of single elements, those whose bit is set in a mask, for a
// list of tensors in one launch.
//
//   per element as masked_adamw_; an element whose bit is not set is neither read nor written
//
// A block of threads takes 1,024 elements, whose bits are 32 words; a warp takes four words, and a
// lane one bit of each. Where an element's state lies is the block's offset and the number of bits
// before it. Of the word 0b00110010, lane 4 has one bit below its own: its state is the second.
//
//   params, grads contiguous float64 / float32 / bfloat16 / float16; states [trained] float64 for
//   float64, else float32 or bfloat16; arithmetic in float32 (float64 for float64).
//   Bytes per element of which a share s trains, drawn at random: in float32 p and g 12 (memory is
//   read in sectors of 32 bytes), states 16 s: 20 for s = 0.5.
#include "adamw_rule.cuh"
#include "launch.cuh"
#include "masked_host.h"
#include "staging.h"

namespace ssah {

constexpr int kWordBits = 32;
constexpr int kBlockBits = 1024;  // as ssah_kernels/bit_masks.py
constexpr int kWordsPerWarp = kBlockBits / kWordBits / kWarps;

struct BitTarget {
  void* param;
  const void* grad;
  void* state0;
  void* state1;
  const uint8_t* mask;     // [ceil(n / 8)]
  const int64_t* offsets;  // [blocks + 1]
  int64_t n;
  int64_t trained;
  int64_t first_block;
  unsigned number;  // position of the tensor in the list
};

struct BitTargets {
  const BitTarget* table;
  int count;
};

// 32 bits of the mask, which may lie anywhere and end anywhere.
__device__ __forceinline__ uint32_t mask_word(const uint8_t* mask, int64_t bytes, int64_t word) {
  uint32_t bits = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int64_t at = 4 * word + k;
    if (at < bytes) bits |= static_cast<uint32_t>(mask[at]) << (8 * k);
  }
  return bits;
}

template <typename T, typename S>
struct BitShared {
  GradientFactors<Real<T>> factors;
  AdamwRule<T> rule;
};

template <typename T, typename S>
__global__ void __launch_bounds__(kThreads)
    bit_masked_adamw_kernel(BitTargets targets, UpdateScalars scalars, AdamwSettings settings) {
  using R = Real<T>;
  const BitTarget& target =
      targets.table[find_entry<&BitTarget::first_block>(targets.table, targets.count, blockIdx.x)];
  const int64_t block = blockIdx.x - target.first_block;
  const int64_t first = target.offsets[block];
  if (target.offsets[block + 1] == first) return;  // nothing of the block trains
  extern __shared__ __align__(16) unsigned char shared_memory[];
  auto& shared = *reinterpret_cast<BitShared<T, S>*>(shared_memory);
  if (threadIdx.x == 0) {
    shared.factors = GradientFactors<R>(scalars);
    shared.rule = AdamwRule<T>(settings, scalars);
  }
  __syncthreads();
  const AdamwRule<T> rule = shared.rule;
  const R scale = shared.factors.gradient;
  const Noise noise(scalars, target.number);
  T* const params = global(static_cast<T*>(target.param));
  const T* const grads = global(static_cast<const T*>(target.grad));
  S* const states0 = global(static_cast<S*>(target.state0));
  S* const states1 = global(static_cast<S*>(target.state1));
  const uint8_t* const mask = global(target.mask);

  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int64_t bytes = ceil_div(target.n, 8);
  const int64_t words = block * (kBlockBits / kWordBits);  // before the block
  const int own = warp * kWordsPerWarp;                    // the warp's first word
  int before = lane < own ? __popc(mask_word(mask, bytes, words + lane)) : 0;
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    before += __shfl_xor_sync(0xffffffffu, before, distance);
  }
  bool trains[kWordsPerWarp];
  int64_t states[kWordsPerWarp];
  T p[kWordsPerWarp], g[kWordsPerWarp];
  S m[kWordsPerWarp], v[kWordsPerWarp];
  const int64_t start = (words + own) * kWordBits + lane;
#pragma unroll
  for (int k = 0; k < kWordsPerWarp; ++k) {  // all loads before the first store
    const uint32_t word = mask_word(mask, bytes, words + own + k);
    const int64_t element = start + k * kWordBits;
    trains[k] = (word >> lane & 1u) != 0 && element < target.n;
    states[k] = first + before + __popc(word & ((1u << lane) - 1));
    before += __popc(word);
    if (!trains[k]) continue;
    if (states[k] < 0 || states[k] >= target.trained) __trap();  // offsets of another mask
    p[k] = params[element];
    g[k] = grads[element];
    m[k] = states0[states[k]];
    v[k] = states1[states[k]];
  }
#pragma unroll
  for (int k = 0; k < kWordsPerWarp; ++k) {
    if (!trains[k]) continue;
    R w = to_real(p[k]), state0 = to_real(m[k]), state1 = to_real(v[k]);
    rule.update(to_real(g[k]) * scale, w, state0, state1);
    const uint32_t bits = noise.on ? noise.bits(states[k]) : 0u;
    params[start + k * kWordBits] = rounded<T>(w, noise.on, bits & 0xffffu);
    states0[states[k]] = rounded<S>(state0, noise.on, bits >> 16);
    states1[states[k]] = rounded<S>(state1, noise.on, (bits * 0x9e3779b1u) >> 16);
  }
}

template <typename T, typename S>
cudaError_t launch_bit_masked_adamw(const BitTargets& targets, int64_t blocks,
                                    const UpdateScalars& scalars, const AdamwSettings& settings,
                                    cudaStream_t stream) {
  return launch(bit_masked_adamw_kernel<T, S>, blocks, 1, sizeof(BitShared<T, S>), stream, targets,
                scalars, settings);
}

namespace {

// The memory of a tensor that lies in one piece, of this many elements.
void* piece(const Tensor& x, ScalarType dtype, int64_t numel, const Tensor& like,
            const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == dtype && x.numel() == numel && x.is_contiguous() &&
                      x.get_device_index() == like.get_device_index(),
                  name, " must be contiguous, with ", numel,
                  " elements and the dtype of its list, beside the parameters");
  return x.data_ptr();
}

void check_length(const TensorList& list, size_t length, const char* name) {
  STD_TORCH_CHECK(list.size() == length, name, " has ", list.size(),
                  " entries; it must have one a parameter, of which there are ", length);
}

}  // namespace

void bit_masked_adamw_cuda(const TensorList& params, const TensorList& grads,
                           const TensorList& exp_avgs, const TensorList& exp_avg_sqs,
                           const TensorList& masks, const TensorList& offsets, const Tensor& lr,
                           const Tensor& step, const std::optional<Tensor>& grad_scale,
                           const std::optional<Tensor>& clip_coef,
                           const std::optional<Tensor>& seed, double beta1, double beta2,
                           double eps, double weight_decay, bool maximize) {
  const Tensor& like = first_of(params, "params");
  check_length(grads, params.size(), "grads");
  check_length(exp_avgs, params.size(), "exp_avgs");
  check_length(exp_avg_sqs, params.size(), "exp_avg_sqs");
  check_length(masks, params.size(), "masks");
  check_length(offsets, params.size(), "offsets");
  const UpdateScalars scalars =
      update_scalars(like, lr, step, grad_scale, clip_coef, seed, std::nullopt, maximize);
  const ScalarType dtype = like.scalar_type(), state = exp_avgs[0].scalar_type();
  STD_TORCH_CHECK(state != ScalarType::Byte, "states must be floating-point");
  std::vector<BitTarget> targets;
  int64_t blocks = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t n = params[i].numel(), n_blocks = ceil_div(n, kBlockBits);
    const int64_t trained = exp_avgs[i].numel();
    BitTarget t{};
    t.param = piece(params[i], dtype, n, like, "params");
    t.grad = piece(grads[i], dtype, n, like, "grads");
    t.state0 = piece(exp_avgs[i], state, trained, like, "exp_avgs");
    t.state1 = piece(exp_avg_sqs[i], state, trained, like, "exp_avg_sqs");
    t.mask = static_cast<const uint8_t*>(
        piece(masks[i], ScalarType::Byte, ceil_div(n, 8), like, "masks"));
    t.offsets = static_cast<const int64_t*>(
        piece(offsets[i], ScalarType::Long, n_blocks + 1, like, "offsets"));
    t.n = n;
    t.trained = trained;
    t.first_block = blocks;
    t.number = static_cast<unsigned>(i);
    blocks += n_blocks;
    if (n > 0) targets.push_back(t);
  }
  if (blocks == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const cudaStream_t stream = current_stream(like);
  const size_t table_bytes = targets.size() * sizeof(BitTarget);
  const Tensor memory = new_bytes(like, static_cast<int64_t>(table_bytes));
  copy_table(memory.data_ptr(), targets.data(), table_bytes, like, stream);
  const BitTargets table{pointer<const BitTarget>(memory), static_cast<int>(targets.size())};
  const AdamwSettings settings{beta1, beta2, eps, weight_decay};
  dispatch_update(dtype, state, dtype, [&](auto p, auto s, auto) {
    using T = decltype(p);
    using S = decltype(s);
    if constexpr (!std::is_same_v<S, code8>) {
      check_launch(launch_bit_masked_adamw<T, S>(table, blocks, scalars, settings, stream),
                   "bit_masked_adamw_");
    }
  });
}

}  // namespace ssah
