// Host side of the masked operators: lists of tensors as a table of Targets in device memory.
#pragma once

#include <vector>

#include "leading.h"
#include "masked_codes.cuh"
#include "masked_rounding.cuh"
#include "masked_tiles.cuh"

namespace ssah {

// Matrices as ssah_kernels/checks makes them.
struct UpdateLists {
  const TensorList& params;
  const TensorList& grads;
  const TensorList* state0;  // or null
  const TensorList* state1;  // or null
  const IndexList& indices;
  const std::vector<int64_t>& dims;
  const std::optional<TensorList>& compensations;
  const std::optional<TensorList>& signed_sums;
  const std::optional<TensorList>& squared_sums;
  const std::optional<TensorList>* scales0;  // of states in 8 bits; null where there is no state
  const std::optional<TensorList>* scales1;
};

struct Table {
  Targets targets;
  int64_t blocks;
  int64_t units;       // of all targets, where there is importance
  Tensor memory;       // of the table
  Tensor part_memory;  // of the importance's parts
};

template <typename T>
T* scalar_pointer(const std::optional<Tensor>& x, ScalarType dtype, const Tensor& like,
                  const char* name) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->numel() == 1 && x->scalar_type() == dtype &&
                      x->get_device_index() == like.get_device_index(),
                  name, " must be one float64 value (seed: int64), beside the tensors");
  return pointer<T>(*x);
}

inline UpdateScalars update_scalars(const Tensor& like, const Tensor& lr, const Tensor& step,
                                    const std::optional<Tensor>& grad_scale,
                                    const std::optional<Tensor>& clip_coef,
                                    const std::optional<Tensor>& seed,
                                    const std::optional<Tensor>& found_inf, bool maximize) {
  return {scalar_pointer<const double>(lr, ScalarType::Double, like, "lr"),
          scalar_pointer<const double>(step, ScalarType::Double, like, "step"),
          scalar_pointer<const double>(grad_scale, ScalarType::Double, like, "grad_scale"),
          scalar_pointer<const double>(clip_coef, ScalarType::Double, like, "clip_coef"),
          scalar_pointer<const int64_t>(seed, ScalarType::Long, like, "seed"),
          scalar_pointer<const double>(found_inf, ScalarType::Double, like, "found_inf"),
          maximize};
}

// Calls visit(T{}, G{}) with the types of parameters and gradients.
template <typename Visit>
void dispatch_gradient(ScalarType dtype, ScalarType grad, Visit&& visit) {
  dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2) {
      if (grad == ScalarType::Float) return visit(T{}, float{});
    }
    STD_TORCH_CHECK(grad == dtype, "grads must be of the params' dtype, or float32 of 16 bits");
    visit(T{}, T{});
  });
}

// Calls visit(T{}, S{}, G{}) with the types of parameters, states and gradients.
template <typename Visit>
void dispatch_update(ScalarType dtype, ScalarType state, ScalarType grad, Visit&& visit) {
  dispatch_gradient(dtype, grad, [&](auto element, auto gradient) {
    using T = decltype(element);
    if (state == ScalarType::Byte) {
      visit(T{}, code8{}, gradient);
    } else if constexpr (sizeof(T) == sizeof(double)) {
      STD_TORCH_CHECK(state == ScalarType::Double, "states of float64 must be float64 or uint8");
      visit(T{}, double{}, gradient);
    } else if (state == ScalarType::BFloat16) {
      visit(T{}, __nv_bfloat16{}, gradient);
    } else {
      STD_TORCH_CHECK(state == ScalarType::Float, "states must be float32, bfloat16 or uint8");
      visit(T{}, float{}, gradient);
    }
  });
}

inline bool aligned_pointer(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

// The first of a list that must not be empty.
inline const Tensor& first_of(const TensorList& list, const char* name) {
  STD_TORCH_CHECK(!list.empty(), name, " is empty; it must have at least one tensor");
  return list[0];
}

// The trained elements of `x`: shape, strides and index.
Target selected_matrix(const Tensor& x, const std::optional<Tensor>& index, int64_t dim);

// Columns of a lane, as the kernels have them.
struct Widths {
  int wide, narrow;
};

// Fills in blocks and units of the targets, drops empty ones, and copies the table to the device.
Table finish_table(std::vector<Target>& targets, Widths widths, size_t part_bytes,
                   const Tensor& like, cudaStream_t stream);

// The targets of an update, whose elements have `width` in 16 bytes. A contiguous one without
// importance becomes rows as long as a warp is wide, whatever its shape, and a rest.
std::vector<Target> update_targets(const UpdateLists& lists, int width, size_t param_bytes,
                                   size_t state_bytes, size_t grad_bytes);
std::vector<Target> gradient_targets(const TensorList& grads, const IndexList& indices,
                                     const std::vector<int64_t>& dims, int width);

template <typename T, typename S, typename G>
Table make_update_table(const UpdateLists& lists, cudaStream_t stream) {
  constexpr Widths widths{kWideColumns<T, S>, kNarrowColumns<T, S>};
  std::vector<Target> targets = update_targets(lists, widths.wide, sizeof(T), sizeof(S), sizeof(G));
  return finish_table(targets, widths, sizeof(Real<T>), lists.params[0], stream);
}

template <typename T>
Table make_gradient_table(const TensorList& grads, const IndexList& indices,
                          const std::vector<int64_t>& dims, cudaStream_t stream) {
  std::vector<Target> targets = gradient_targets(grads, indices, dims, kWide<T>);
  return finish_table(targets, {kWide<T>, kNarrow<T>}, 0, grads[0], stream);
}

}  // namespace ssah
