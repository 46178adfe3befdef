#include "host.h"

#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ssah {

Dtype dtype_of(const Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return kFloat64;
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      STD_TORCH_CHECK(false, "a tensor is neither float64, float32, bfloat16 nor float16");
  }
}

namespace {
// Offsets of the elements of the first `dims` dimensions, in row-major order: of x [2, 3, C] with
// strides (8 C, 2 C, 1), the six rows begin at 0, 2 C, 4 C, 8 C, 10 C and 12 C.
std::vector<long> leading_offsets(const Tensor& x, long dims) {
  std::vector<long> offsets(1, 0);
  for (long d = 0; d < dims; ++d) {
    std::vector<long> next;
    next.reserve(offsets.size() * x.size(d));
    for (long base : offsets) {
      for (long i = 0; i < x.size(d); ++i) next.push_back(base + i * x.stride(d));
    }
    offsets.swap(next);
  }
  return offsets;
}
}  // namespace

// A tensor that the C library maps anew (glibc: always from 32 MiB on) costs more to map, page by
// page, than to write: huge pages where they are to be had. It is advice; nothing depends on
// whether it is taken. Smaller ones share the heap, whose other users it would slow down.
Tensor contiguous_like(const Tensor& x) {
  Tensor output = torch::stable::new_empty(x, x.sizes());
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20, kMapped = 32 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(output.const_data_ptr());
  const uintptr_t bytes = output.numel() * output.element_size();
  const uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1);
  if (bytes >= kMapped) {
    madvise(reinterpret_cast<void*>(first), begin + bytes - first, MADV_HUGEPAGE);
  }
#endif
  return output;
}

std::vector<long> row_offsets(const Tensor& x) { return leading_offsets(x, x.dim() - 1); }

std::vector<long> select(const std::vector<long>& offsets, const std::optional<Tensor>& mask,
                         bool keep) {
  if (!mask.has_value()) return keep ? offsets : std::vector<long>{};
  const std::vector<long> positions = leading_offsets(*mask, mask->dim());
  // Bytes: a mask that was viewed as bool may hold others than 0 and 1, which no C++ bool may.
  const auto* flags = static_cast<const unsigned char*>(mask->const_data_ptr());
  std::vector<long> kept;
  kept.reserve(offsets.size());
  for (size_t i = 0; i < offsets.size(); ++i) {
    if ((flags[positions[i]] != 0) == keep) kept.push_back(offsets[i]);
  }
  return kept;
}

}  // namespace ssah
