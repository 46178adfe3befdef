// gated_moments: h = act(gate) * up of a gated FFN, and the moments of h in the same pass.
//
//   h = round(act(gate) * up)     computed in the arithmetic type, rounded once
//   (count, mean, M2) <- merged with the moments of the unmasked rows of h, by Chan's formula
//
//   gate, up, h  [..., channels], float64 / float32 / bfloat16 / float16; h is contiguous
//   token_mask   [...] bool; masked rows of h are computed like any other, and do not count
//   accumulation: see moments.cuh. Bytes per element: 3 sizeof(gate): two read, one written, once.
#include "activations.cuh"
#include "leading.h"
#include "merge_moments.cuh"

namespace ssah {

template <Act kAct, typename T, int W>
__device__ __forceinline__ Vector<T, W> gated(const Vector<T, W>& gate, const Vector<T, W>& up) {
  Real<T> product[W];
#pragma unroll
  for (int k = 0; k < W; ++k) {
    product[k] = activation<kAct, T>(real_at(gate, k)) * real_at(up, k);
  }
  return vector_of<T>(product);
}

constexpr int kGatedMomentsBlocks = 2;

template <typename T, int W, Act kAct>
__global__ void __launch_bounds__(kThreads, kGatedMomentsBlocks)
    gated_moments_kernel(Matrix<const T> gate, Matrix<const T> up, Matrix<T> output, Mask mask,
                         Plan plan, const double* count, MomentsWorkspace partial) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  auto& shared = *reinterpret_cast<MomentsShared<W>*>(shared_memory);
  const Lane<T, W> lane(plan);
  constexpr int kRows = sizeof(T) == 8 ? kBatch / 2 : kBatch;  // fits in 128 registers
  LaneMoments<T, W> moments;
  for (Segment segment(plan); segment.any(); segment.next()) {
    uint32_t kept = segment.kept(mask);
    uint32_t skipped = segment.rows() & ~kept;
    const LaneRows<const T> rows_of_gate(gate, segment, lane);
    const LaneRows<const T> rows_of_up(up, segment, lane);
    const LaneRows<T> rows_of_output(output, segment, lane);
    while (__popc(kept) >= kRows) {
      uint32_t bit[kRows];
      Vector<T, W> gates[kRows];
      Vector<T, W> ups[kRows];
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        bit[j] = pop(kept);
        gates[j] = lane.load(rows_of_gate[bit[j]]);
        ups[j] = lane.load(rows_of_up[bit[j]]);
      }
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        gates[j] = gated<kAct>(gates[j], ups[j]);
        lane.store(rows_of_output[bit[j]], gates[j]);
      }
      moments.template add<kRows>(gates);
    }
    while ((kept | skipped) != 0) {
      const bool counts = kept != 0;
      const uint32_t row = counts ? pop(kept) : pop(skipped);
      const Vector<T, W> product =
          gated<kAct>(lane.load(rows_of_gate[row]), lane.load(rows_of_up[row]));
      lane.store(rows_of_output[row], product);
      if (counts) moments.template add<1>(&product);
    }
    moments.flush(shared);
  }
  moments.finish(shared, plan, count, partial);
}

template <typename T, int W, Act kAct>
cudaError_t launch_gated_moments(Matrix<const T> gate, Matrix<const T> up, Matrix<T> output,
                                 Mask mask, const Plan& plan, MomentsState state, double* workspace,
                                 cudaStream_t stream) {
  const MomentsWorkspace partial = MomentsWorkspace::over(workspace, plan);
  const cudaError_t status =
      launch_tiles(gated_moments_kernel<T, W, kAct>, plan, sizeof(MomentsShared<W>), stream, gate,
                   up, output, mask, plan, state.count, partial);
  return status != cudaSuccess ? status : launch_merge_moments(plan, partial, state, stream);
}

Tensor gated_moments_cuda(const Tensor& gate, const Tensor& up, const Tensor& count,
                          const Tensor& mean, const Tensor& m2,
                          const std::optional<Tensor>& token_mask, int64_t act) {
  check_rows(gate, "gate");
  check_like(up, gate, "up");
  check_rows(up, "up");
  const int64_t channels = gate.size(gate.dim() - 1);
  check_state(count, 1, gate, "count");
  check_state(mean, channels, gate, "mean");
  check_state(m2, channels, gate, "m2");
  check_mask(token_mask, gate);
  const torch::stable::accelerator::DeviceGuard guard(gate.get_device_index());
  const Tensor output = new_contiguous_like(gate);
  const cudaStream_t stream = current_stream(gate);
  const MomentsState state{pointer<double>(count), pointer<double>(mean), pointer<double>(m2)};
  std::vector<const Tensor*> operands{&gate, &up, &output};
  if (token_mask) operands.push_back(&*token_mask);
  const Leading leading(operands, gate.dim() - 1);
  dispatch(gate.scalar_type(), [&](auto element) {
    using T = decltype(element);
    dispatch_act(act, [&](auto chosen) {
      leading.for_each([&](const Leading::Slice& slice) {
        const auto gate_rows = slice_rows<const T>(gate, slice, 0);
        const auto up_rows = slice_rows<const T>(up, slice, 1);
        const auto output_rows = slice_rows<T>(output, slice, 2);
        const Mask mask = slice_mask(token_mask, slice, 3);
        const bool wide = aligned(gate_rows, slice.rows, channels) &&
                          aligned(up_rows, slice.rows, channels) &&
                          aligned(output_rows, slice.rows, channels);
        const Plan plan = make_plan<T>(slice.rows, channels, wide, kGatedMomentsBlocks);
        const Tensor workspace = new_float64(gate, MomentsWorkspace::size(plan));
        constexpr Act kAct = decltype(chosen)::value;
        const auto launcher = plan.wide ? launch_gated_moments<T, kWide<T>, kAct>
                                        : launch_gated_moments<T, kNarrow<T>, kAct>;
        check_launch(launcher(gate_rows, up_rows, output_rows, mask, plan, state,
                              pointer<double>(workspace), stream),
                     "gated_moments");
      });
    });
  });
  return output;
}

}  // namespace ssah
