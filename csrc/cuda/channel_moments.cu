// channel_moments_: merges count, mean and M2 of every channel of x into a float64 state.
//
//   mu_b = sum_i x_i / n,  M2_b = sum_i (x_i - mu_b)^2   over the unmasked rows i
//   (count, mean, M2) <- merged with (n, mu_b, M2_b) by Chan's formula
//
//   x           [..., channels], float64 / float32 / bfloat16 / float16, last dimension contiguous
//   token_mask  [...] bool; a masked row is not read
//   accumulation: see moments.cuh. Bytes per element: sizeof(x), each read once.
#include "leading.h"
#include "merge_moments.cuh"

namespace ssah {

constexpr int kChannelMomentsBlocks = 3;

template <typename T, int W>
__global__ void __launch_bounds__(kThreads, kChannelMomentsBlocks)
    channel_moments_kernel(Matrix<const T> x, Mask mask, Plan plan, const double* count,
                           MomentsWorkspace partial) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  auto& shared = *reinterpret_cast<MomentsShared<W>*>(shared_memory);
  const Lane<T, W> lane(plan);
  LaneMoments<T, W> moments;
  for (Segment segment(plan); segment.any(); segment.next()) {
    uint32_t kept = segment.kept(mask);
    const LaneRows<const T> rows_of_x(x, segment, lane);
    while (__popc(kept) >= kBatch) {
      Vector<T, W> rows[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) rows[j] = lane.load(rows_of_x[pop(kept)]);
      moments.template add<kBatch>(rows);
    }
    while (kept != 0) {
      const Vector<T, W> row = lane.load(rows_of_x[pop(kept)]);
      moments.template add<1>(&row);
    }
    moments.flush(shared);
  }
  moments.finish(shared, plan, count, partial);
}

template <typename T, int W>
cudaError_t launch_channel_moments(Matrix<const T> x, Mask mask, const Plan& plan,
                                   MomentsState state, double* workspace, cudaStream_t stream) {
  const MomentsWorkspace partial = MomentsWorkspace::over(workspace, plan);
  const cudaError_t status =
      launch_tiles(channel_moments_kernel<T, W>, plan, sizeof(MomentsShared<W>), stream, x, mask,
                   plan, state.count, partial);
  return status != cudaSuccess ? status : launch_merge_moments(plan, partial, state, stream);
}

void channel_moments_cuda(const Tensor& x, const Tensor& count, const Tensor& mean,
                          const Tensor& m2, const std::optional<Tensor>& token_mask) {
  check_rows(x, "x");
  const int64_t channels = x.size(x.dim() - 1);
  check_state(count, 1, x, "count");
  check_state(mean, channels, x, "mean");
  check_state(m2, channels, x, "m2");
  check_mask(token_mask, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  const MomentsState state{pointer<double>(count), pointer<double>(mean), pointer<double>(m2)};
  std::vector<const Tensor*> operands{&x};
  if (token_mask) operands.push_back(&*token_mask);
  const Leading leading(operands, x.dim() - 1);
  dispatch(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    leading.for_each([&](const Leading::Slice& slice) {
      const auto rows = slice_rows<const T>(x, slice, 0);
      const Mask mask = slice_mask(token_mask, slice, 1);
      const Plan plan = make_plan<T>(slice.rows, channels, aligned(rows, slice.rows, channels),
                                     kChannelMomentsBlocks);
      const Tensor workspace = new_float64(x, MomentsWorkspace::size(plan));
      const auto launcher =
          plan.wide ? launch_channel_moments<T, kWide<T>> : launch_channel_moments<T, kNarrow<T>>;
      check_launch(launcher(rows, mask, plan, state, pointer<double>(workspace), stream),
                   "channel_moments_");
    });
  });
}

}  // namespace ssah
