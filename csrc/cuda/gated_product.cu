// gated_product: h = act(gate) * up * factors[arm] of a gated FFN whose rows run under arms.
//
//   h = round(act(gate) up factors[arm])     computed in the arithmetic type, rounded once
//
//   gate, up, h  [..., channels], float64 / float32 / bfloat16 / float16; h is contiguous
//   factors      [arms, channels] in the arithmetic type: float64 of float64, else float32
//   arm          [...] int64: of three rows under the arms 0, 1, 1 the last two are multiplied by
//                factors[1]
//   Bytes per element: 3 sizeof(gate): two read, one written, once. A warp keeps the factors of its
//   channels in registers for as long as its rows stay under one arm, as the tokens of a row do.
#include "activations.cuh"
#include "launch.cuh"
#include "leading.h"
#include "tiles.cuh"

namespace ssah {

// The channels of a lane from a row of another type, in vectors of 16 bytes where the lane is wide.
template <typename R, typename T, int W>
__device__ __forceinline__ Vector<R, W> load_of(const Lane<T, W>& lane, const R* row) {
  Vector<R, W> vector;
  if constexpr (Lane<T, W>::kIsWide) {
    constexpr int kLoads = sizeof(vector) / sizeof(uint4);
    uint4 bits[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      bits[i] = __ldg(reinterpret_cast<const uint4*>(row + lane.first) + i);
    }
    memcpy(&vector, bits, sizeof(vector));
  } else {
#pragma unroll
    for (int k = 0; k < W; ++k) {
      vector.at[k] = k < lane.valid ? __ldg(row + lane.first + k * lane.kStep) : R(0);
    }
  }
  return vector;
}

template <typename T>
constexpr int kGatedProductBlocks = sizeof(T) == 8 ? 2 : 4;

template <typename T, int W, Act kAct>
__global__ void __launch_bounds__(kThreads, kGatedProductBlocks<T>)
    gated_product_kernel(Matrix<const T> gate, Matrix<const T> up, Matrix<T> output,
                         Matrix<const int64_t> arm, Matrix<const Real<T>> factors, int64_t arms,
                         Plan plan) {
  const Lane<T, W> lane(plan);
  Vector<Real<T>, W> factor{};
  int64_t held = -1;  // the arm whose factors they are
  for (Segment segment(plan); segment.any(); segment.next()) {
    const LaneRows<const T> rows_of_gate(gate, segment, lane);
    const LaneRows<const T> rows_of_up(up, segment, lane);
    const LaneRows<T> rows_of_output(output, segment, lane);
    for (uint32_t rows = segment.rows(); rows != 0;) {
      const uint32_t row = pop(rows);
      const Vector<T, W> gates = lane.load(rows_of_gate[row]);
      const Vector<T, W> ups = lane.load(rows_of_up[row]);
      const int64_t wanted = *arm.row(segment.row(row));
      if (wanted < 0 || wanted >= arms) __trap();
      if (wanted != held) {
        factor = load_of(lane, factors.row(wanted));
        held = wanted;
      }
      Real<T> product[W];
#pragma unroll
      for (int k = 0; k < W; ++k) {
        product[k] = activation<kAct, T>(real_at(gates, k)) * real_at(ups, k) * factor.at[k];
      }
      lane.store(rows_of_output[row], vector_of<T>(product));
    }
  }
}

template <typename T, int W, Act kAct>
cudaError_t launch_gated_product(Matrix<const T> gate, Matrix<const T> up, Matrix<T> output,
                                 Matrix<const int64_t> arm, Matrix<const Real<T>> factors,
                                 int64_t arms, const Plan& plan, cudaStream_t stream) {
  return launch_tiles(gated_product_kernel<T, W, kAct>, plan, 0, stream, gate, up, output, arm,
                      factors, arms, plan);
}

Tensor gated_product_cuda(const Tensor& gate, const Tensor& up, const Tensor& factors,
                          const Tensor& arm, int64_t act) {
  check_rows(gate, "gate");
  check_like(up, gate, "up");
  check_rows(up, "up");
  const int64_t channels = gate.size(gate.dim() - 1);
  const bool wide_type = gate.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(
      factors.dim() == 2 && factors.size(1) == channels &&
          factors.scalar_type() == (wide_type ? ScalarType::Double : ScalarType::Float) &&
          factors.get_device_index() == gate.get_device_index(),
      "factors must be [arms, channels] in the type of the arithmetic, beside gate");
  check_rows(factors, "factors");
  bool fits = arm.scalar_type() == ScalarType::Long && arm.dim() == gate.dim() - 1 &&
              arm.is_contiguous() && arm.get_device_index() == gate.get_device_index();
  for (int64_t d = 0; fits && d < arm.dim(); ++d) fits = arm.size(d) == gate.size(d);
  STD_TORCH_CHECK(fits, "arm must be contiguous int64 with the leading shape of gate, beside it");
  const torch::stable::accelerator::DeviceGuard guard(gate.get_device_index());
  const Tensor output = new_contiguous_like(gate);
  if (gate.numel() == 0) return output;
  const cudaStream_t stream = current_stream(gate);
  const Leading leading({&gate, &up, &output, &arm}, gate.dim() - 1);
  dispatch(gate.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const Matrix<const Real<T>> factor_rows{pointer<const Real<T>>(factors), factors.stride(0)};
    dispatch_act(act, [&](auto chosen) {
      leading.for_each([&](const Leading::Slice& slice) {
        const auto gates = slice_rows<const T>(gate, slice, 0);
        const auto ups = slice_rows<const T>(up, slice, 1);
        const auto outputs = slice_rows<T>(output, slice, 2);
        const auto arms = slice_rows<const int64_t>(arm, slice, 3);
        const bool wide = aligned(gates, slice.rows, channels) &&
                          aligned(ups, slice.rows, channels) &&
                          aligned(outputs, slice.rows, channels) &&
                          aligned(factor_rows, factors.size(0), channels);
        constexpr Act kAct = decltype(chosen)::value;
        const Plan plan = make_plan<T>(slice.rows, channels, wide, kGatedProductBlocks<T>);
        const auto launcher = plan.wide ? launch_gated_product<T, kWide<T>, kAct>
                                        : launch_gated_product<T, kNarrow<T>, kAct>;
        check_launch(
            launcher(gates, ups, outputs, arms, factor_rows, factors.size(0), plan, stream),
            "gated_product");
      });
    });
  });
  return output;
}

}  // namespace ssah
