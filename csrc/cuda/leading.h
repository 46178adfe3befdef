// The leading dimensions of an operator's tensors, as matrices [rows, channels] for the kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "host.h"
#include "tiles.cuh"

namespace ssah {

// The leading dimensions of operands of one shape, merged where every operand's strides allow it.
// What cannot be merged is visited slice by slice; the longest dimension becomes the rows.
class Leading {
 public:
  struct Slice {
    int64_t rows;
    std::vector<int64_t> offset;  // of each operand, in elements
    std::vector<int64_t> stride;  // of each operand's rows, in elements
  };

  Leading(const std::vector<const Tensor*>& operands, int64_t dims) : count_(operands.size()) {
    for (int64_t d = dims - 1; d >= 0; --d) {
      Dimension next{operands[0]->size(d), {}};
      for (const Tensor* operand : operands) next.stride.push_back(operand->stride(d));
      if (next.size == 1) continue;
      if (!dimensions_.empty() && mergeable(next, dimensions_.back())) {
        dimensions_.back().size *= next.size;
      } else {
        dimensions_.push_back(next);
      }
    }
    if (dimensions_.empty()) dimensions_.push_back({1, std::vector<int64_t>(count_, 0)});
    std::stable_sort(dimensions_.begin(), dimensions_.end(),
                     [](const Dimension& a, const Dimension& b) { return a.size > b.size; });
  }

  template <typename Visit>
  void for_each(Visit&& visit) const {
    if (dimensions_.back().size == 0) return;
    Slice slice{dimensions_[0].size, std::vector<int64_t>(count_, 0), dimensions_[0].stride};
    descend(dimensions_.size() - 1, slice, visit);
  }

 private:
  struct Dimension {
    int64_t size;
    std::vector<int64_t> stride;
  };

  bool mergeable(const Dimension& outer, const Dimension& inner) const {
    for (size_t i = 0; i < count_; ++i) {
      if (outer.stride[i] != inner.stride[i] * inner.size) return false;
    }
    return true;
  }

  template <typename Visit>
  void descend(size_t level, Slice& slice, Visit& visit) const {
    if (level == 0) return visit(slice);
    const Dimension& dimension = dimensions_[level];
    for (int64_t index = 0; index < dimension.size; ++index) {
      descend(level - 1, slice, visit);
      for (size_t i = 0; i < count_; ++i) slice.offset[i] += dimension.stride[i];
    }
    for (size_t i = 0; i < count_; ++i) slice.offset[i] -= dimension.size * dimension.stride[i];
  }

  size_t count_;
  std::vector<Dimension> dimensions_;
};

template <typename T>
Matrix<T> slice_rows(const Tensor& tensor, const Leading::Slice& slice, size_t operand) {
  return {pointer<T>(tensor) + slice.offset[operand], slice.stride[operand]};
}

inline Mask slice_mask(const std::optional<Tensor>& mask, const Leading::Slice& slice,
                       size_t operand) {
  if (!mask) return {nullptr, 0};
  return {pointer<const uint8_t>(*mask) + slice.offset[operand], slice.stride[operand]};
}

// Whether every row consists of whole, aligned 16-byte vectors.
template <typename T>
bool aligned(const Matrix<T>& matrix, int64_t rows, int64_t channels) {
  return channels > 0 && channels % kWide<T> == 0 &&
         reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 &&
         (rows <= 1 || matrix.stride % kWide<T> == 0);
}

}  // namespace ssah
