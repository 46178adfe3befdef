// column_sq_norms: squared Euclidean norm of every column, norms_j = sum_i weight_ij^2.
//
//   weight  [out_features, in_features], float64 / float32 / bfloat16 / float16, last dimension
//           contiguous
//   norms   [in_features] float64
//   accumulation: see sums.cuh. Bytes per element: sizeof(weight), each read once.
#include "leading.h"
#include "sums.cuh"

namespace ssah {

template <typename T, int W, int kRows>
__device__ __forceinline__ void add_squares(LaneSums<T, W, 1>& sums, const Vector<T, W>* rows) {
#pragma unroll
  for (int k = 0; k < W; ++k) {
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const Real<T> value = real_at(rows[j], k);
      sums.at[0][k] += value * value;
    }
  }
}

constexpr int kColumnSqNormsBlocks = 4;

template <typename T, int W>
__global__ void __launch_bounds__(kThreads, kColumnSqNormsBlocks)
    column_sq_norms_kernel(Matrix<const T> weight, Plan plan, double* partial) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  auto& shared = *reinterpret_cast<SumsShared<W, 1>*>(shared_memory);
  const Lane<T, W> lane(plan);
  LaneSums<T, W, 1> sums;
  for (Segment segment(plan); segment.any(); segment.next()) {
    sums.clear();
    uint32_t rows = segment.rows();
    const LaneRows<const T> rows_of_weight(weight, segment, lane);
    while (__popc(rows) >= kBatch) {
      Vector<T, W> batch[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) batch[j] = lane.load(rows_of_weight[pop(rows)]);
      add_squares<T, W, kBatch>(sums, batch);
    }
    while (rows != 0) {
      const Vector<T, W> row = lane.load(rows_of_weight[pop(rows)]);
      add_squares<T, W, 1>(sums, &row);
    }
    sums.flush(shared);
  }
  sums.finish(shared, plan, partial);
}

template <typename T, int W>
cudaError_t launch_column_sq_norms(Matrix<const T> weight, const Plan& plan, double* norms,
                                   double* workspace, cudaStream_t stream) {
  const cudaError_t status =
      launch_tiles(column_sq_norms_kernel<T, W>, plan, sizeof(SumsShared<W, 1>), stream, weight,
                   plan, workspace);
  if (status != cudaSuccess) return status;
  return launch_add_sums(plan, 1, workspace, SumOutputs{norms, nullptr}, stream);
}

Tensor column_sq_norms_cuda(const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight must have two dimensions");
  check_rows(weight, "weight");
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  Tensor norms = new_float64(weight, weight.size(1));
  torch::stable::zero_(norms);
  if (weight.numel() == 0) return norms;
  const cudaStream_t stream = current_stream(weight);
  dispatch(weight.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const Matrix<const T> rows{pointer<const T>(weight), weight.stride(0)};
    const Plan plan =
        make_plan<T>(weight.size(0), weight.size(1), aligned(rows, weight.size(0), weight.size(1)),
                     kColumnSqNormsBlocks);
    const Tensor workspace = new_float64(weight, plan.chunks * plan.slots);
    const auto launcher =
        plan.wide ? launch_column_sq_norms<T, kWide<T>> : launch_column_sq_norms<T, kNarrow<T>>;
    check_launch(launcher(rows, plan, pointer<double>(norms), pointer<double>(workspace), stream),
                 "column_sq_norms");
  });
  return norms;
}

}  // namespace ssah
