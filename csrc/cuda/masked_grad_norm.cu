// masked_grad_norm: Euclidean norm of the trained elements' gradient, for a list of tensors.
//
//   norm = sqrt(sum of g^2 over the selected elements of all grads) / grad_scale
//
//   grads  matrices, float64 / float32 / bfloat16 / float16, any strides, dense with an index or
//          compact without
//   Squares and sums in float64, so that nothing overflows; every block leaves a partial sum, and
//   a second launch of one block adds those in order. Bytes per element: sizeof(grad), read once.
#include "launch.cuh"
#include "masked_access.cuh"
#include "masked_host.h"

namespace ssah {

// The sum over the block in thread 0, in a fixed order.
__device__ __forceinline__ double block_sum(double sum, double* shared) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  }
  if (threadIdx.x % kLanes == 0) shared[threadIdx.x / kLanes] = sum;
  __syncthreads();
  sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += shared[warp];
  return sum;
}

template <typename T, int W>
__device__ __forceinline__ double sum_of_squares(const Target& target) {
  constexpr bool kIsWide = W == kWide<T>;
  const Place<W, kIsWide> place(target);
  if (place.valid == 0) return 0;
  int64_t columns[W];
  columns_of(columns, target, place, target.column_stride);
  const T* grads = global(static_cast<const T*>(target.grad));
  const RowIndex grad_rows(target, target.row_stride);
  double sum = 0;
  for (int64_t row = place.row; row < place.end; row += kBatch * place.row_step) {
    Vector<T, W> values[kBatch];
    int rows = 0;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int64_t mine = row + j * place.row_step;
      if (mine >= place.end) continue;
      read_at<kIsWide>(values[j], grads + grad_rows[mine], columns, place.valid);
      rows = j + 1;
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (j >= rows) continue;
#pragma unroll
      for (int k = 0; k < W; ++k) {
        const double value = to_real(values[j].at[k]);
        sum += value * value;
      }
    }
  }
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    masked_grad_norm_kernel(Targets targets, double* partial) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const Target& target = targets.table[find_target<&Target::first_block>(targets, blockIdx.x)];
  const double sum =
      target.wide ? sum_of_squares<T, kWide<T>>(target) : sum_of_squares<T, kNarrow<T>>(target);
  const double total = block_sum(sum, reinterpret_cast<double*>(shared_memory));
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

static __global__ void __launch_bounds__(kThreads)
    finish_norm_kernel(const double* partial, int64_t blocks, const double* grad_scale,
                       double* norm) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) sum += partial[i];
  const double total = block_sum(sum, reinterpret_cast<double*>(shared_memory));
  if (threadIdx.x == 0) *norm = sqrt(total) / (grad_scale == nullptr ? 1.0 : *grad_scale);
}

template <typename T>
cudaError_t launch_masked_grad_norm(const Table& table, const double* grad_scale, double* partial,
                                    double* norm, cudaStream_t stream) {
  constexpr size_t kSharedBytes = kWarps * sizeof(double);
  if (table.blocks > 0) {
    const cudaError_t status = launch(masked_grad_norm_kernel<T>, table.blocks, 1, kSharedBytes,
                                      stream, table.targets, partial);
    if (status != cudaSuccess) return status;
  }
  return launch(finish_norm_kernel, 1, 1, kSharedBytes, stream, partial, table.blocks, grad_scale,
                norm);
}

Tensor masked_grad_norm_cuda(const TensorList& grads, const IndexList& indices,
                             const std::vector<int64_t>& dims,
                             const std::optional<Tensor>& grad_scale) {
  const Tensor& first = first_of(grads, "grads");
  const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
  const cudaStream_t stream = current_stream(first);
  const Tensor norm = torch::stable::new_empty(first, {}, ScalarType::Double);
  const double* scale = scalar_pointer<double>(grad_scale, ScalarType::Double, first, "grad_scale");
  dispatch(first.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const Table table = make_gradient_table<T>(grads, indices, dims, stream);
    const Tensor partial = new_float64(first, table.blocks);
    check_launch(launch_masked_grad_norm<T>(table, scale, pointer<double>(partial),
                                            pointer<double>(norm), stream),
                 "masked_grad_norm");
  });
  return norm;
}

}  // namespace ssah
