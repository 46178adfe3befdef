// A block is what one thread does at a time: about 65,536 elements, beside which it costs nothing
// to begin. Of a weight [4096, 11008] of which 2,202 columns train, a block is 29 rows of 2,202
// gathered elements, and the weight is 142 blocks. With importance per column a block is 1,024
// columns and all rows, so that one thread adds up a unit, in one order.
#include "masked_update_host.h"

#include <cmath>

#include "checks.h"

namespace ssah {
namespace {

constexpr long kBlockElements = 65536;

// Of first and of second moments.
constexpr DynamicMap kMaps[2] = {make_dynamic_map(true), make_dynamic_map(false)};

unsigned mix(unsigned x) {
  x = (x ^ x >> 16) * 0x21f0aaadu;
  x = (x ^ x >> 15) * 0xd35a2d97u;
  return x ^ x >> 15;
}

unsigned noise_key_of(unsigned key, uint64_t seed, int64_t step, unsigned number) {
  for (unsigned word : {static_cast<unsigned>(seed), static_cast<unsigned>(seed >> 32),
                        static_cast<unsigned>(step), number}) {
    key = mix(key ^ word);
  }
  return key;
}

double* doubles(const Tensor& x) { return static_cast<double*>(x.mutable_data_ptr()); }

// The memory of a tensor that holds one element for each that is trained.
void* compact(const Tensor& x, const UpdateTensor& t, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(
      x.scalar_type() == dtype && x.is_contiguous() && x.numel() == t.n_rows * t.n_columns, name,
      " must be contiguous, of the trained elements' shape, and of the dtype of its list");
  return x.data_ptr();
}

// Sets where the gradient of `t` lies: where it has the shape of `param`, it is read by the same
// index. If that selects everything, both shapes are one, and mean the same.
void set_gradient(UpdateTensor& t, const Tensor& grad, const Tensor& param, bool indexed,
                  ScalarType dtype) {
  t.wide_grad = dtype != param.scalar_type();
  const bool compacted = t.n_rows == param.size(0) && t.n_columns == param.size(1);
  const bool as_param =
      grad.dim() == 2 && grad.size(0) == param.size(0) && grad.size(1) == param.size(1);
  if (!indexed || compacted || !as_param) {
    t.grad = compact(grad, t, dtype, "grads");
    t.grad_row_stride = t.n_columns;
    t.grad_column_stride = 1;
    return;
  }
  STD_TORCH_CHECK(grad.scalar_type() == dtype, "grads must have one dtype");
  t.grad = grad.const_data_ptr();
  t.grad_rows = t.rows;
  t.grad_columns = t.columns;
  t.grad_row_stride = grad.stride(0);
  t.grad_column_stride = t.n_columns == 1 && t.columns == nullptr ? 1 : grad.stride(1);
}

// The scales of state in codes [n_rows, n_columns]; null where there are none.
float* scales_of(const OptionalTensorList* list, size_t i, const UpdateTensor& t,
                 ScalarType state) {
  const bool given = list != nullptr && list->has_value();
  STD_TORCH_CHECK(given == (state == ScalarType::Byte),
                  "states of uint8, and no others, must have scales");
  if (!given) return nullptr;
  const Tensor& scales = (**list)[i];
  const long blocks = (t.n_columns + kStateBlock - 1) / kStateBlock;
  STD_TORCH_CHECK(scales.scalar_type() == ScalarType::Float && scales.is_contiguous() &&
                      scales.numel() == t.n_rows * blocks,
                  "scales must be contiguous float32, one for each 256 elements of a row");
  return static_cast<float*>(scales.mutable_data_ptr());
}

void check_lists(const UpdateLists& lists) {
  const size_t n = lists.params.size();
  check_length(lists.params, n, "params");
  check_length(lists.grads, n, "grads");
  if (lists.state0 != nullptr) check_length(*lists.state0, n, "the first state");
  if (lists.state1 != nullptr) check_length(*lists.state1, n, "the second state");
  check_length(lists.indices, n, "indices");
  check_length(lists.axes, n, "dims");
  if (lists.compensations.has_value()) check_length(*lists.compensations, n, "compensations");
  for (const OptionalTensorList* scales : {lists.scales0, lists.scales1}) {
    if (scales != nullptr && scales->has_value()) check_length(**scales, n, "scales");
  }
  STD_TORCH_CHECK(lists.signed_sums.has_value() == lists.squared_sums.has_value(),
                  "signed and squared must be given together");
  if (!lists.signed_sums.has_value()) return;
  check_length(*lists.signed_sums, n, "signed");
  check_length(*lists.squared_sums, n, "squared");
}

}  // namespace

int state_type_of(const Tensor& state) {
  return state.scalar_type() == ScalarType::Byte ? kCodes : static_cast<int>(dtype_of(state));
}

NoiseKeys noise_keys(const Tensor& seed, double step, size_t number) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1,
                  "seed must be int64 of one element");
  STD_TORCH_CHECK(std::fabs(step) < 0x1p63, "step is ", step,
                  "; with a seed it must be a whole number below 2^63, which the noise follows");
  const auto word = *static_cast<const uint64_t*>(seed.const_data_ptr());
  const auto whole = static_cast<int64_t>(step);
  // The position among the tensors is part of the key: equal tensors get other noise.
  const auto position = static_cast<unsigned>(number);
  return {noise_key_of(0x243f6a88u, word, whole, position),
          noise_key_of(0x85a308d3u, word, whole, position)};
}

double scalar_of(const std::optional<Tensor>& x, double otherwise) {
  if (!x.has_value()) return otherwise;
  STD_TORCH_CHECK(x->scalar_type() == ScalarType::Double && x->numel() == 1,
                  "lr, step, grad_scale, clip_coef and found_inf must be float64 of one element");
  return *static_cast<const double*>(x->const_data_ptr());
}

UpdateTensor selected_matrix(const Tensor& x, const std::optional<Tensor>& index, int64_t axis) {
  STD_TORCH_CHECK(x.dim() == 2 && (axis == 0 || axis == 1),
                  "a parameter or gradient must be a matrix, and its dims 0 or 1");
  UpdateTensor t{};
  t.n_rows = x.size(0);
  t.n_columns = x.size(1);
  t.row_stride = x.stride(0);
  // The stride of a dimension of 1 means nothing, and 1 lets the kernel load vectors.
  t.column_stride = t.n_columns == 1 ? 1 : x.stride(1);
  t.units_are_columns = axis == 1;
  if (!index.has_value()) return t;
  STD_TORCH_CHECK(index->scalar_type() == ScalarType::Long && index->dim() == 1,
                  "indices must be int64 of one dimension");
  const long* entries = static_cast<const long*>(index->const_data_ptr());
  const long n = index->size(0), size = x.size(axis);
  STD_TORCH_CHECK(n < 2 || index->stride(0) == 1, "an index must be contiguous");
  // Checked here too: anybody may call this operator, and a wrong entry would write elsewhere.
  for (long i = 0; i < n; ++i) {
    STD_TORCH_CHECK(entries[i] >= 0 && entries[i] < size, "indices has ", entries[i],
                    "; it must be from 0 to ", size - 1);
    STD_TORCH_CHECK(i == 0 || entries[i] > entries[i - 1], "indices has ", entries[i], " after ",
                    i == 0 ? 0 : entries[i - 1], "; it must be strictly increasing");
  }
  (axis == 0 ? t.rows : t.columns) = entries;
  (axis == 0 ? t.n_rows : t.n_columns) = n;
  return t;
}

std::vector<UpdateTensor> update_tensors(const UpdateLists& lists) {
  check_lists(lists);
  std::vector<UpdateTensor> tensors;
  tensors.reserve(lists.params.size());
  const ScalarType dtype = lists.params[0].scalar_type();
  const bool params_of_16_bits = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  const ScalarType grad = lists.grads[0].scalar_type();
  STD_TORCH_CHECK(grad == dtype || (grad == ScalarType::Float && params_of_16_bits),
                  "grads must be of the params' dtype, or float32 with params of 16 bits");
  const ScalarType state = lists.state0 != nullptr ? (*lists.state0)[0].scalar_type() : dtype;
  const double step = scalar_of(lists.step, 0);
  const double unscale = 1 / scalar_of(lists.grad_scale, 1);
  for (size_t i = 0; i < lists.params.size(); ++i) {
    UpdateTensor t = selected_matrix(lists.params[i], lists.indices[i], lists.axes[i]);
    STD_TORCH_CHECK(lists.params[i].scalar_type() == dtype, "params must have one dtype");
    t.param = lists.params[i].mutable_data_ptr();
    set_gradient(t, lists.grads[i], lists.params[i], lists.indices[i].has_value(), grad);
    if (lists.state0 != nullptr) {
      t.state0 = compact((*lists.state0)[i], t, state, "states");
      t.scales[0] = scales_of(lists.scales0, i, t, state);
      t.maps[0] = &kMaps[0];
    }
    if (lists.state1 != nullptr) {
      t.state1 = compact((*lists.state1)[i], t, state, "states");
      t.scales[1] = scales_of(lists.scales1, i, t, state);
      t.maps[1] = &kMaps[1];
    }
    if (lists.compensations.has_value()) {
      // The lower half of a float32 weight, see masked_rounding.h.
      const ScalarType rest = dtype == ScalarType::BFloat16 ? ScalarType::Short : dtype;
      t.compensation = compact((*lists.compensations)[i], t, rest, "compensations");
    }
    if (lists.signed_sums.has_value()) {
      const int64_t units = t.units_are_columns ? t.n_columns : t.n_rows;
      check_state((*lists.signed_sums)[i], units, "signed");
      check_state((*lists.squared_sums)[i], units, "squared");
      t.signed_sum = doubles((*lists.signed_sums)[i]);
      t.squared_sum = doubles((*lists.squared_sums)[i]);
      t.unscale = unscale;
    } else if (t.rows == nullptr && t.columns == nullptr && t.column_stride == 1 &&
               (t.n_rows == 1 || t.row_stride == t.n_columns) &&
               (t.scales[0] == nullptr || t.n_columns % kStateBlock == 0)) {
      t.n_columns *= t.n_rows;  // contiguous in every tensor: one long row
      t.n_rows = t.n_columns == 0 ? 0 : 1;
    }
    if (lists.seed.has_value()) {
      const NoiseKeys keys = noise_keys(*lists.seed, step, i);
      t.stochastic = true;
      t.key0 = keys.key0;
      t.key1 = keys.key1;
    }
    tensors.push_back(t);
  }
  return tensors;
}

std::vector<BlockOfTensor> blocks_of(const std::vector<UpdateTensor>& tensors) {
  std::vector<BlockOfTensor> blocks;
  int64_t first = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const UpdateTensor& t = tensors[i];
    if (t.n_rows == 0 || t.n_columns == 0) continue;
    long columns = t.n_columns < kBlockElements ? t.n_columns : kBlockElements;
    long rows = kBlockElements / columns;
    if (t.signed_sum != nullptr) {  // no unit is cut, see above
      columns = t.units_are_columns ? kColumnStripe : t.n_columns;
      rows = t.units_are_columns ? t.n_rows : kBlockElements / columns + 1;
    }
    for (long row = 0; row < t.n_rows; row += rows) {
      for (long column = 0; column < t.n_columns; column += columns) {
        const long row_end = row + rows < t.n_rows ? row + rows : t.n_rows;
        const long column_end = column + columns < t.n_columns ? column + columns : t.n_columns;
        blocks.push_back({static_cast<long>(i), {row, row_end, column, column_end}, first});
        first += (row_end - row) * (column_end - column);
      }
    }
  }
  return blocks;
}

}  // namespace ssah
