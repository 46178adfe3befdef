// taylor_moments_: first-order importance of every channel.
//
//   signed  += sum_i x_i g_i,   squared += sum_i (x_i g_i)^2   over the unmasked rows i
//
//   x, grad     [..., channels], float64 / float32 / bfloat16 / float16, last dimension contiguous
//   token_mask  [...] bool; a masked row is not read
//   accumulation: see sums.cuh. Bytes per element: 2 sizeof(x), each read once.
#include "leading.h"
#include "sums.cuh"

namespace ssah {

template <typename T, int W, int kRows>
__device__ __forceinline__ void add_products(LaneSums<T, W, 2>& sums, const Vector<T, W>* x,
                                             const Vector<T, W>* grad) {
#pragma unroll
  for (int k = 0; k < W; ++k) {
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const Real<T> product = real_at(x[j], k) * real_at(grad[j], k);
      sums.at[0][k] += product;
      sums.at[1][k] += product * product;
    }
  }
}

constexpr int kTaylorMomentsBlocks = 3;

template <typename T, int W>
__global__ void __launch_bounds__(kThreads, kTaylorMomentsBlocks)
    taylor_moments_kernel(Matrix<const T> x, Matrix<const T> grad, Mask mask, Plan plan,
                          double* partial) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  auto& shared = *reinterpret_cast<SumsShared<W, 2>*>(shared_memory);
  const Lane<T, W> lane(plan);
  constexpr int kRows = kBatch / 2;  // of two tensors
  LaneSums<T, W, 2> sums;
  for (Segment segment(plan); segment.any(); segment.next()) {
    sums.clear();
    uint32_t kept = segment.kept(mask);
    const LaneRows<const T> rows_of_x(x, segment, lane);
    const LaneRows<const T> rows_of_grad(grad, segment, lane);
    while (__popc(kept) >= kRows) {
      Vector<T, W> x_rows[kRows];
      Vector<T, W> grad_rows[kRows];
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const uint32_t row = pop(kept);
        x_rows[j] = lane.load(rows_of_x[row]);
        grad_rows[j] = lane.load(rows_of_grad[row]);
      }
      add_products<T, W, kRows>(sums, x_rows, grad_rows);
    }
    while (kept != 0) {
      const uint32_t row = pop(kept);
      const Vector<T, W> x_row = lane.load(rows_of_x[row]);
      const Vector<T, W> grad_row = lane.load(rows_of_grad[row]);
      add_products<T, W, 1>(sums, &x_row, &grad_row);
    }
    sums.flush(shared);
  }
  sums.finish(shared, plan, partial);
}

template <typename T, int W>
cudaError_t launch_taylor_moments(Matrix<const T> x, Matrix<const T> grad, Mask mask,
                                  const Plan& plan, SumOutputs outputs, double* workspace,
                                  cudaStream_t stream) {
  const cudaError_t status =
      launch_tiles(taylor_moments_kernel<T, W>, plan, sizeof(SumsShared<W, 2>), stream, x, grad,
                   mask, plan, workspace);
  return status != cudaSuccess ? status : launch_add_sums(plan, 2, workspace, outputs, stream);
}

void taylor_moments_cuda(const Tensor& x, const Tensor& grad, const Tensor& signed_sum,
                         const Tensor& squared, const std::optional<Tensor>& token_mask) {
  check_rows(x, "x");
  check_like(grad, x, "grad");
  check_rows(grad, "grad");
  const int64_t channels = x.size(x.dim() - 1);
  check_state(signed_sum, channels, x, "signed");
  check_state(squared, channels, x, "squared");
  check_mask(token_mask, x);
  if (x.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  const SumOutputs outputs{pointer<double>(signed_sum), pointer<double>(squared)};
  std::vector<const Tensor*> operands{&x, &grad};
  if (token_mask) operands.push_back(&*token_mask);
  const Leading leading(operands, x.dim() - 1);
  dispatch(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    leading.for_each([&](const Leading::Slice& slice) {
      const auto x_rows = slice_rows<const T>(x, slice, 0);
      const auto grad_rows = slice_rows<const T>(grad, slice, 1);
      const Mask mask = slice_mask(token_mask, slice, 2);
      const bool wide =
          aligned(x_rows, slice.rows, channels) && aligned(grad_rows, slice.rows, channels);
      const Plan plan = make_plan<T>(slice.rows, channels, wide, kTaylorMomentsBlocks);
      const Tensor workspace = new_float64(x, plan.chunks * 2 * plan.slots);
      const auto launcher =
          plan.wide ? launch_taylor_moments<T, kWide<T>> : launch_taylor_moments<T, kNarrow<T>>;
      check_launch(
          launcher(x_rows, grad_rows, mask, plan, outputs, pointer<double>(workspace), stream),
          "taylor_moments_");
    });
  });
}

}  // namespace ssah
