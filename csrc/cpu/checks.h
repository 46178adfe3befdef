// What the host functions ask of their arguments, so that no call of torch.ops.ssah_cpu.* reads or
// writes memory that is not its own. ssah_kernels/checks has asked before, in better words,
// where the call came through torch.ops.ssah.*.
#pragma once

#include "host.h"

namespace ssah {

using torch::headeronly::ScalarType;

inline void check_rows(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() >= 1, name, " has no dimension; it must be [..., channels]");
  const int64_t last = x.dim() - 1;
  STD_TORCH_CHECK(x.size(last) < 2 || x.stride(last) == 1 || x.numel() == 0, name,
                  " must be contiguous in its last dimension");
}

inline void check_like(const Tensor& x, const Tensor& like, const char* name) {
  bool same = x.dim() == like.dim() && x.scalar_type() == like.scalar_type();
  for (int64_t d = 0; same && d < like.dim(); ++d) same = x.size(d) == like.size(d);
  STD_TORCH_CHECK(same, name, " must have the shape and dtype of the first input");
}

inline void check_state(const Tensor& state, int64_t numel, const char* name) {
  STD_TORCH_CHECK(
      state.scalar_type() == ScalarType::Double && state.numel() == numel && state.is_contiguous(),
      name, " must be contiguous float64 with ", numel, " elements");
}

// The state of moments of rows of `channels`.
inline void check_moments(const Tensor& count, const Tensor& mean, const Tensor& m2,
                          int64_t channels) {
  check_state(count, 1, "count");
  check_state(mean, channels, "mean");
  check_state(m2, channels, "m2");
}

inline void check_mask(const std::optional<Tensor>& mask, const Tensor& x) {
  if (!mask.has_value()) return;
  bool fits = mask->scalar_type() == ScalarType::Bool && mask->dim() == x.dim() - 1;
  for (int64_t d = 0; fits && d < mask->dim(); ++d) fits = mask->size(d) == x.size(d);
  STD_TORCH_CHECK(fits, "token_mask must be bool with the leading shape of the input");
}

// `act` as an entry of the tables of kernels.
inline Activation activation_of(int64_t act) {
  STD_TORCH_CHECK(act >= 0 && act < kActivations, "act is ", act, "; it must be from 0 to ",
                  kActivations - 1);
  return static_cast<Activation>(act);
}

// A list of one entry a parameter.
template <class List>
void check_length(const List& list, size_t length, const char* name) {
  STD_TORCH_CHECK(list.size() == length && length > 0, name, " has ", list.size(),
                  " entries; it must have one a parameter, of which there are ", length);
}

}  // namespace ssah
