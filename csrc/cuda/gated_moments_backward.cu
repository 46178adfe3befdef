// gated_moments_backward: derivatives of h = act(gate) * up; the rounding has slope 1.
//
//   grad_gate = round(grad up act'(gate)),  grad_up = round(grad act(gate))
//
//   all [..., channels], float64 / float32 / bfloat16 / float16; the results are contiguous
//   Bytes per element: 5 sizeof(grad): three read, two written, once.
#include "activations.cuh"
#include "launch.cuh"
#include "leading.h"
#include "tiles.cuh"

namespace ssah {

template <typename T>
constexpr int kGatedMomentsBackwardBlocks = sizeof(T) == 8 ? 2 : 3;

template <typename T, int W, Act kAct>
__global__ void __launch_bounds__(kThreads, kGatedMomentsBackwardBlocks<T>)
    gated_moments_backward_kernel(Matrix<const T> grad, Matrix<const T> gate, Matrix<const T> up,
                                  Matrix<T> grad_gate, Matrix<T> grad_up, Plan plan) {
  const Lane<T, W> lane(plan);
  for (Segment segment(plan); segment.any(); segment.next()) {
    const LaneRows<const T> rows_of_grad(grad, segment, lane);
    const LaneRows<const T> rows_of_gate(gate, segment, lane);
    const LaneRows<const T> rows_of_up(up, segment, lane);
    const LaneRows<T> rows_of_grad_gate(grad_gate, segment, lane);
    const LaneRows<T> rows_of_grad_up(grad_up, segment, lane);
    for (uint32_t rows = segment.rows(); rows != 0;) {
      const uint32_t row = pop(rows);
      const Vector<T, W> grads = lane.load(rows_of_grad[row]);
      const Vector<T, W> gates = lane.load(rows_of_gate[row]);
      const Vector<T, W> ups = lane.load(rows_of_up[row]);
      Real<T> to_gate[W];
      Real<T> to_up[W];
#pragma unroll
      for (int k = 0; k < W; ++k) {
        const Real<T> g = real_at(grads, k);
        const auto act = activation_and_slope<kAct, T>(real_at(gates, k));
        to_gate[k] = g * real_at(ups, k) * act.slope;
        to_up[k] = g * act.value;
      }
      lane.store(rows_of_grad_gate[row], vector_of<T>(to_gate));
      lane.store(rows_of_grad_up[row], vector_of<T>(to_up));
    }
  }
}

template <typename T, int W, Act kAct>
cudaError_t launch_gated_moments_backward(Matrix<const T> grad, Matrix<const T> gate,
                                          Matrix<const T> up, Matrix<T> grad_gate,
                                          Matrix<T> grad_up, const Plan& plan,
                                          cudaStream_t stream) {
  return launch_tiles(gated_moments_backward_kernel<T, W, kAct>, plan, 0, stream, grad, gate, up,
                      grad_gate, grad_up, plan);
}

std::tuple<Tensor, Tensor> gated_moments_backward_cuda(const Tensor& grad, const Tensor& gate,
                                                       const Tensor& up, int64_t act) {
  check_rows(gate, "gate");
  check_like(up, gate, "up");
  check_rows(up, "up");
  check_like(grad, gate, "grad");
  check_rows(grad, "grad");
  const int64_t channels = gate.size(gate.dim() - 1);
  const torch::stable::accelerator::DeviceGuard guard(gate.get_device_index());
  const Tensor grad_gate = new_contiguous_like(gate);
  const Tensor grad_up = new_contiguous_like(gate);
  if (gate.numel() == 0) return {grad_gate, grad_up};
  const cudaStream_t stream = current_stream(gate);
  const Leading leading({&grad, &gate, &up, &grad_gate, &grad_up}, gate.dim() - 1);
  dispatch(gate.scalar_type(), [&](auto element) {
    using T = decltype(element);
    dispatch_act(act, [&](auto chosen) {
      leading.for_each([&](const Leading::Slice& slice) {
        const auto grads = slice_rows<const T>(grad, slice, 0);
        const auto gates = slice_rows<const T>(gate, slice, 1);
        const auto ups = slice_rows<const T>(up, slice, 2);
        const auto to_gate = slice_rows<T>(grad_gate, slice, 3);
        const auto to_up = slice_rows<T>(grad_up, slice, 4);
        const bool wide =
            aligned(grads, slice.rows, channels) && aligned(gates, slice.rows, channels) &&
            aligned(ups, slice.rows, channels) && aligned(to_gate, slice.rows, channels) &&
            aligned(to_up, slice.rows, channels);
        constexpr Act kAct = decltype(chosen)::value;
        const Plan plan = make_plan<T>(slice.rows, channels, wide, kGatedMomentsBackwardBlocks<T>);
        const auto launcher = plan.wide ? launch_gated_moments_backward<T, kWide<T>, kAct>
                                        : launch_gated_moments_backward<T, kNarrow<T>, kAct>;
        check_launch(launcher(grads, gates, ups, to_gate, to_up, plan, stream),
                     "gated_moments_backward");
      });
    });
  });
  return {grad_gate, grad_up};
}

}  // namespace ssah
