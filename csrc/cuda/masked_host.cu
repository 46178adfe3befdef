// A table of Targets, one for each part of a tensor that is read alike. A contiguous bfloat16
// matrix [1000, 100] is 100,000 elements and makes two: 390 rows of 256, which a warp reads by
// vectors of 8, and a row of the 160 that are left. As it is, its rows would be read one by one.
#include "masked_host.h"
#include "staging.h"

namespace ssah {

Target selected_matrix(const Tensor& x, const std::optional<Tensor>& index, int64_t dim) {
  STD_TORCH_CHECK(x.dim() == 2 && (dim == 0 || dim == 1), "the tensors must be matrices");
  Target target{};
  target.rows = x.size(0);
  target.columns = x.size(1);
  target.row_stride = x.stride(0);
  // The stride of a dimension of 1 means nothing, and 1 lets the kernel load vectors.
  target.column_stride = target.columns == 1 ? 1 : x.stride(1);
  target.limit = x.size(dim);
  target.dim = static_cast<int>(dim);
  if (!index) return target;
  STD_TORCH_CHECK(index->scalar_type() == ScalarType::Long && index->dim() == 1 &&
                      index->is_contiguous() && index->get_device_index() == x.get_device_index(),
                  "indices must be contiguous int64 of one dimension, beside the tensors");
  STD_TORCH_CHECK(target.limit < int64_t{1} << 31, "an indexed dimension must be below 2^31");
  target.index = pointer<const int64_t>(*index);
  (dim == 0 ? target.rows : target.columns) = index->numel();
  return target;
}

namespace {

void* compact_pointer(const Tensor& x, const Target& target, const Tensor& param, ScalarType dtype,
                      const char* name) {
  STD_TORCH_CHECK(
      x.scalar_type() == dtype && x.is_contiguous() && x.numel() == target.rows * target.columns &&
          x.get_device_index() == param.get_device_index(),
      name, " must be contiguous, of the trained elements' shape, and of the dtype of its list");
  return x.data_ptr();
}

// A list of one entry a parameter.
template <typename List>
void check_length(const List& list, size_t length, const char* name) {
  STD_TORCH_CHECK(list.size() == length && length > 0, name, " has ", list.size(),
                  " entries; it must have one a parameter, of which there are ", length);
}

// The scales of states in 8 bits; null where there are none.
float* scales_pointer(const std::optional<TensorList>* list, size_t i, const Target& target,
                      const Tensor& param, ScalarType state) {
  if (list == nullptr) return nullptr;
  STD_TORCH_CHECK(list->has_value() == (state == ScalarType::Byte),
                  "states of uint8, and no others, must have scales");
  if (!list->has_value()) return nullptr;
  const Tensor& scales = (**list)[i];
  STD_TORCH_CHECK(scales.scalar_type() == ScalarType::Float && scales.is_contiguous() &&
                      scales.numel() == target.rows * ceil_div(target.columns, kStateBlock) &&
                      scales.get_device_index() == param.get_device_index(),
                  "scales must be contiguous float32, one for each 256 elements of a row");
  return pointer<float>(scales);
}

void check_same(const Tensor& x, const Tensor& first, const char* name) {
  STD_TORCH_CHECK(
      x.scalar_type() == first.scalar_type() && x.get_device_index() == first.get_device_index(),
      name, " must have one dtype and one device");
}

void check_lists(const UpdateLists& lists) {
  const size_t n = lists.params.size();
  check_length(lists.grads, n, "grads");
  if (lists.state0) check_length(*lists.state0, n, "the first state");
  if (lists.state1) check_length(*lists.state1, n, "the second state");
  check_length(lists.indices, n, "indices");
  check_length(lists.dims, n, "dims");
  if (lists.compensations) check_length(*lists.compensations, n, "compensations");
  for (const std::optional<TensorList>* scales : {lists.scales0, lists.scales1}) {
    if (scales != nullptr && scales->has_value()) check_length(**scales, n, "scales");
  }
  STD_TORCH_CHECK(lists.signed_sums.has_value() == lists.squared_sums.has_value(),
                  "signed and squared must be given together");
  if (!lists.signed_sums) return;
  check_length(*lists.signed_sums, n, "signed");
  check_length(*lists.squared_sums, n, "squared");
}

bool wide_rows(const Target& target, const void* data, int width) {
  return (target.index == nullptr || target.dim == 0) && target.column_stride == 1 &&
         target.columns % width == 0 && target.row_stride % width == 0 && aligned_pointer(data);
}

template <typename Void>
Void* advanced(Void* data, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<Void>, const char, char>;
  return data == nullptr ? nullptr : static_cast<Byte*>(data) + bytes;
}

// Where the gradient of `target` lies: where it has the shape of `param`, it is read by the same
// index. If that selects everything, both shapes are one, and mean the same.
void set_gradient(Target& target, const Tensor& grad, const Tensor& param, ScalarType dtype) {
  const bool all = target.rows == param.size(0) && target.columns == param.size(1);
  target.grad_indexed =
      !all && grad.dim() == 2 && grad.size(0) == param.size(0) && grad.size(1) == param.size(1);
  if (!target.grad_indexed) {
    target.grad = compact_pointer(grad, target, param, dtype, "grads");
    return;
  }
  STD_TORCH_CHECK(
      grad.scalar_type() == dtype && grad.get_device_index() == param.get_device_index(),
      "grads must have one dtype and one device");
  target.grad = grad.data_ptr();
  target.grad_row_stride = grad.stride(0);
  target.grad_column_stride = param.size(1) == 1 ? 1 : grad.stride(1);
}

// Elements from `begin` on of a target that is contiguous in every tensor, as rows of `columns`.
Target flat_part(const Target& whole, int64_t begin, int64_t rows, int64_t columns,
                 size_t param_bytes, size_t state_bytes, size_t grad_bytes) {
  Target part = whole;
  part.param = advanced(whole.param, begin * param_bytes);
  part.grad = advanced(whole.grad, begin * grad_bytes);
  part.compensation = advanced(whole.compensation, begin * param_bytes);
  part.state0 = advanced(whole.state0, begin * state_bytes);
  part.state1 = advanced(whole.state1, begin * state_bytes);
  part.first_element = begin;
  part.rows = rows;
  part.columns = part.row_stride = columns;
  return part;
}

}  // namespace

std::vector<Target> update_targets(const UpdateLists& lists, int width, size_t param_bytes,
                                   size_t state_bytes, size_t grad_bytes) {
  check_lists(lists);
  std::vector<Target> targets;
  const ScalarType dtype = lists.params[0].scalar_type();
  const ScalarType state = lists.state0 ? (*lists.state0)[0].scalar_type() : dtype;
  for (size_t i = 0; i < lists.params.size(); ++i) {
    const Tensor& param = lists.params[i];
    check_same(param, lists.params[0], "params");
    Target target = selected_matrix(param, lists.indices[i], lists.dims[i]);
    target.number = static_cast<unsigned>(i);
    target.param = param.data_ptr();
    const auto compact = [&](const Tensor& x, ScalarType type, const char* name) {
      return compact_pointer(x, target, param, type, name);
    };
    set_gradient(target, lists.grads[i], param, lists.grads[0].scalar_type());
    if (lists.state0) target.state0 = compact((*lists.state0)[i], state, "states");
    if (lists.state1) target.state1 = compact((*lists.state1)[i], state, "states");
    target.scales[0] = scales_pointer(lists.scales0, i, target, param, state);
    target.scales[1] = scales_pointer(lists.scales1, i, target, param, state);
    if (lists.compensations) {
      // Of bfloat16 the lower half of a float32 weight, see masked_rounding.cuh.
      const ScalarType rest = dtype == ScalarType::BFloat16 ? ScalarType::Short : dtype;
      target.compensation = compact((*lists.compensations)[i], rest, "compensations");
    }
    // Blocks of states in 8 bits must stay within the rows that they were in.
    const bool contiguous = target.index == nullptr && target.column_stride == 1 &&
                            (target.rows <= 1 || target.row_stride == target.columns) &&
                            (!target.scales[0] || target.columns % kStateBlock == 0);
    // Sums of units need the rows as they are, so that no such tensor is laid out anew.
    if (lists.signed_sums) {
      check_state((*lists.signed_sums)[i], target.units(), param, "signed");
      check_state((*lists.squared_sums)[i], target.units(), param, "squared");
      target.signed_sums = pointer<double>((*lists.signed_sums)[i]);
      target.squared_sums = pointer<double>((*lists.squared_sums)[i]);
      targets.push_back(target);
    } else if (contiguous) {
      const int64_t n = target.rows * target.columns;
      const int64_t tile = kLanes * width;  // the columns of one warp
      const auto part = [&](int64_t begin, int64_t rows, int64_t columns) {
        return flat_part(target, begin, rows, columns, param_bytes, state_bytes, grad_bytes);
      };
      targets.push_back(part(0, n / tile, tile));
      targets.push_back(part(n / tile * tile, 1, n % tile));
    } else {
      targets.push_back(target);
    }
  }
  for (Target& t : targets) {
    const bool wide_grad =
        !t.grad_indexed || (t.grad_column_stride == 1 && t.grad_row_stride % width == 0);
    t.wide = wide_rows(t, t.param, width) && wide_grad && aligned_pointer(t.grad) &&
             aligned_pointer(t.state0) && aligned_pointer(t.state1) &&
             aligned_pointer(t.compensation);
    t.plain = t.wide && t.index == nullptr && !t.grad_indexed && t.row_stride == t.columns &&
              t.signed_sums == nullptr && t.compensation == nullptr;
  }
  return targets;
}

std::vector<Target> gradient_targets(const TensorList& grads, const IndexList& indices,
                                     const std::vector<int64_t>& dims, int width) {
  check_length(indices, grads.size(), "indices");
  check_length(dims, grads.size(), "dims");
  std::vector<Target> targets;
  for (size_t i = 0; i < grads.size(); ++i) {
    check_same(grads[i], grads[0], "grads");
    Target target = selected_matrix(grads[i], indices[i], dims[i]);
    target.grad = grads[i].data_ptr();
    target.wide = wide_rows(target, target.grad, width);
    targets.push_back(target);
  }
  return targets;
}

Table finish_table(std::vector<Target>& targets, Widths widths, size_t part_bytes,
                   const Tensor& like, cudaStream_t stream) {
  // An empty tensor has no block, and would begin at the same one as the next tensor.
  targets.erase(std::remove_if(targets.begin(), targets.end(),
                               [](const Target& t) { return t.rows == 0 || t.columns == 0; }),
                targets.end());
  Table table{{nullptr, static_cast<int>(targets.size())}, 0, 0, like, like};
  if (targets.empty()) return table;
  int64_t part_elements = 0;
  for (Target& t : targets) {
    // A block's warps lie below each other; of a tensor of few rows, beside each other.
    t.row_warps = t.rows < kWarps ? 1 : kWarps;
    const int64_t warp_columns =
        ceil_div(t.columns, kLanes * (t.wide ? widths.wide : widths.narrow));
    const int64_t block_rows = ceil_div(t.rows, kRowsPerWarp * t.row_warps);
    t.block_columns = t.row_warps == 1 ? ceil_div(warp_columns, kWarps) : warp_columns;
    t.first_block = table.blocks;
    table.blocks += t.block_columns * block_rows;
    if (t.signed_sums == nullptr) continue;
    t.n_parts = t.dim == 1         ? block_rows * t.row_warps
                : t.row_warps == 1 ? t.block_columns * kWarps
                                   : t.block_columns;
    t.first_unit = table.units;
    table.units += t.units();
    part_elements += 2 * t.n_parts * t.units();  // [2, parts, units]: signed, then squared
  }
  if (table.units > 0) {
    table.part_memory = new_bytes(like, part_elements * part_bytes);
    char* next = pointer<char>(table.part_memory);
    for (Target& t : targets) {
      t.parts = next;
      next += 2 * t.n_parts * t.units() * part_bytes;
    }
  }
  const size_t bytes = targets.size() * sizeof(Target);
  table.memory = new_bytes(like, bytes);
  table.targets.table = pointer<const Target>(table.memory);
  copy_table(table.memory.data_ptr(), targets.data(), bytes, like, stream);
  return table;
}

}  // namespace ssah
