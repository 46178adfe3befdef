// What the host functions share: checks, the device and its stream, leading dimensions, dtypes.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "activations.cuh"
#include "operators.h"
#include "types.cuh"

// Defined by libtorch_cuda, which CUDA builds of torch alone have. Weak, so that the library also
// loads where it cannot run. It is found through libtorch, which setup.py therefore makes a
// dependency: torch loads libtorch_cuda with RTLD_LOCAL, where no other search looks.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace ssah {

using torch::headeronly::ScalarType;

inline cudaStream_t current_stream(const Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
  void* stream = nullptr;
  // Not the macro with STABLE_ in front, which is new in torch 2.13.
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(cudaError_t status, const char* op) {
  STD_TORCH_CHECK(status == cudaSuccess, op, ": CUDA launch failed: ", cudaGetErrorString(status));
}

// A replayed graph would copy again from the memory of this call, which a later one has written to.
inline void refuse_capture(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_launch(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  STD_TORCH_CHECK(status == cudaStreamCaptureStatusNone,
                  "masked updates and masked_grad_norm copy a table from the host, which "
                  "a CUDA graph cannot: call them outside torch.cuda.graph");
}

inline void check_like(const Tensor& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == like.dim() && tensor.scalar_type() == like.scalar_type() &&
                      tensor.get_device_index() == like.get_device_index(),
                  name, " must have the shape, dtype and device of the first input");
  for (int64_t d = 0; d < like.dim(); ++d) {
    STD_TORCH_CHECK(tensor.size(d) == like.size(d), name, " has the wrong shape");
  }
}

inline void check_rows(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() >= 1, name, " must have at least one dimension");
  const int64_t last = tensor.dim() - 1;
  STD_TORCH_CHECK(tensor.stride(last) == 1 || tensor.size(last) <= 1 || tensor.numel() == 0, name,
                  " must be contiguous in its last dimension");
}

inline void check_state(const Tensor& state, int64_t numel, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(state.scalar_type() == ScalarType::Double && state.numel() == numel &&
                      state.is_contiguous() && state.get_device_index() == like.get_device_index(),
                  name, " must be contiguous float64 with ", numel, " elements, beside the input");
}

inline void check_mask(const std::optional<Tensor>& mask, const Tensor& x) {
  if (!mask) return;
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == x.dim() - 1 &&
                      mask->get_device_index() == x.get_device_index(),
                  "token_mask must be bool with the leading shape of the input");
  for (int64_t d = 0; d < mask->dim(); ++d) {
    STD_TORCH_CHECK(mask->size(d) == x.size(d), "token_mask has the wrong shape");
  }
}

inline Tensor new_float64(const Tensor& like, int64_t numel) {
  return torch::stable::new_empty(like, {numel}, ScalarType::Double);
}

// Calls visit(T{}) with the element type.
template <typename Visit>
void dispatch(ScalarType dtype, Visit&& visit) {
  switch (dtype) {
    case ScalarType::Double:
      return visit(double{});
    case ScalarType::Float:
      return visit(float{});
    case ScalarType::BFloat16:
      return visit(__nv_bfloat16{});
    case ScalarType::Half:
      return visit(__half{});
    default:
      STD_TORCH_CHECK(false, "the input must be float64, float32, bfloat16 or float16");
  }
}

// Calls visit with the activation as a std::integral_constant.
template <typename Visit>
void dispatch_act(int64_t act, Visit&& visit) {
  STD_TORCH_CHECK(act >= 0 && act <= 4, "act is ", act, "; it must be from 0 to 4");
  switch (static_cast<Act>(act)) {
    case Act::kSilu:
      return visit(std::integral_constant<Act, Act::kSilu>{});
    case Act::kGelu:
      return visit(std::integral_constant<Act, Act::kGelu>{});
    case Act::kGeluTanh:
      return visit(std::integral_constant<Act, Act::kGeluTanh>{});
    case Act::kRelu:
      return visit(std::integral_constant<Act, Act::kRelu>{});
    case Act::kRelu2:
      return visit(std::integral_constant<Act, Act::kRelu2>{});
  }
}

template <typename T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

inline Tensor new_bytes(const Tensor& like, int64_t n_bytes) {
  return torch::stable::new_empty(like, {n_bytes}, ScalarType::Byte);
}

inline Tensor new_contiguous_like(const Tensor& like) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < like.dim(); ++d) sizes.push_back(like.size(d));
  return torch::stable::new_empty(like, sizes);
}

}  // namespace ssah
