// Storage types, the arguments of each kernel, and the table of kernels of one instruction set.
//
// Plain C types only: included by the kernels (compiled once per instruction set) and by the host
// functions. Pointers are to elements; `rows` hold element offsets of each row from the base.
#pragma once

#include "../dynamic_map.h"

namespace ssah {

struct bf16 {
  unsigned short bits;
};
struct f16 {
  unsigned short bits;
};

// A code of the dynamic map, see DynamicMap.
struct code8 {
  unsigned char bits;
};

enum Dtype { kFloat64, kFloat32, kBFloat16, kFloat16, kDtypes };
// Types of the state of an update: those of Dtype, and code8.
constexpr int kCodes = kDtypes, kStateTypes = kDtypes + 1;
// In the order of ACTIVATIONS in ssah_kernels/checks.
enum Activation { kSilu, kGelu, kGeluTanh, kRelu, kRelu2, kActivations };

// A range of channels of the rows of one or more inputs. `rows[i]` are the offsets of input i.
struct ChannelRange {
  long begin, end;
};

struct ChannelMomentsArgs {
  const void* x;
  const long* rows;
  long n_rows;
  double count;  // before this call
  double *mean, *m2;
};

struct GatedMomentsArgs {
  const void *gate, *up;
  void* output;
  const long *gate_rows, *up_rows, *output_rows;  // the rows that count first, then the masked ones
  long n_rows, n_counted;
  double count;
  double *mean, *m2;
};

struct GatedBackwardArgs {
  const void *grad, *gate, *up;
  void *grad_gate, *grad_up;
  const long *grad_rows, *gate_rows, *up_rows;
  long n_rows, channels;
};

struct GatedProductArgs {
  const void *gate, *up, *factors;  // factors in the type of the arithmetic
  void* output;
  const long *gate_rows, *up_rows, *factor_rows;  // the last: of the arm of each row
  long n_rows, channels;
};

struct TaylorMomentsArgs {
  const void *x, *grad;
  const long *x_rows, *grad_rows;
  long n_rows;
  double *signed_sum, *squared_sum;
};

struct ColumnSqNormsArgs {
  const void* weight;
  long row_stride, n_rows;
  double* norms;
};

// The trained elements of one parameter: a matrix of which rows or columns may be selected. The
// states and the compensation are compact and contiguous [n_rows, n_columns]. So is the gradient;
// or it has the parameter's shape, and the same rows and columns are selected from it.
struct UpdateTensor {
  void* param;
  const void* grad;
  void *state0, *state1, *compensation;  // or null
  float* scales[2];                      // of states in codes: [n_rows, blocks] each
  const DynamicMap* maps[2];             // of these
  const long *rows, *columns;            // selected; null for all
  long row_stride, column_stride;        // of param (masked_grad_norm: of grad)
  const long *grad_rows, *grad_columns;  // rows and columns; null where the gradient is compact
  long grad_row_stride, grad_column_stride;
  bool wide_grad;          // float32, of a parameter of 16 bits
  long n_rows, n_columns;  // selected
  bool stochastic, units_are_columns;
  unsigned key0, key1;               // of the noise
  double *signed_sum, *squared_sum;  // per unit; or null
  double unscale;                    // of the gradient, for these sums
};

// At most kColumnStripe columns wide where column units keep sums.
constexpr long kColumnStripe = 1024;
struct UpdateBlock {
  long row_begin, row_end, column_begin, column_end;
};

// A parameter of which single elements train: those whose bit is set. Of 10 elements with bits 0, 3
// and 9 the mask is {9, 2}, and the states have 3 elements.
constexpr long kBitBlock = 1024;  // elements that one entry of the offsets stands for
struct BitMaskedTensor {
  void* param;
  const void* grad;
  void *state0, *state1;      // of the trained elements alone
  const unsigned char* mask;  // [ceil(n / 8)], the lowest bit first
  const long* offsets;        // trained elements before each block, and of all
  long n;                     // elements of param and grad, which are contiguous
  bool stochastic;
  unsigned key0, key1;  // of the noise
};

struct AdamWArgs {
  double scale, decay, beta1, beta2;
  double step_size, bias;  // lr / (1 - beta1^t), sqrt(1 - beta2^t)
  double eps;
};

struct SgdArgs {
  double scale, lr, weight_decay, momentum, one_minus_dampening;
  bool first, nesterov;
};

// Every kernel of one instruction set. Work is split over channels (over rows where no sum crosses
// rows), so a result never depends on the number of threads.
struct Kernels {
  const char* isa;
  void (*channel_moments[kDtypes])(const ChannelMomentsArgs&, ChannelRange);
  void (*gated_moments[kDtypes][kActivations])(const GatedMomentsArgs&, ChannelRange);
  void (*gated_backward[kDtypes][kActivations])(const GatedBackwardArgs&, long row_begin,
                                                long row_end);
  void (*gated_product[kDtypes][kActivations])(const GatedProductArgs&, long row_begin,
                                               long row_end);
  void (*taylor_moments[kDtypes])(const TaylorMomentsArgs&, ChannelRange);
  void (*column_sq_norms[kDtypes])(const ColumnSqNormsArgs&, ChannelRange);
  void (*masked_adamw[kDtypes][kStateTypes])(const UpdateTensor&, const AdamWArgs&, UpdateBlock);
  void (*masked_sgd[kDtypes][kStateTypes])(const UpdateTensor&, const SgdArgs&, UpdateBlock);
  // Rows of the block are blocks of kBitBlock elements.
  void (*bit_masked_adamw[kDtypes][kStateTypes])(const BitMaskedTensor&, const AdamWArgs&,
                                                 UpdateBlock);
  double (*masked_grad_norm[kDtypes])(const UpdateTensor&, UpdateBlock);
  unsigned (*read_blocks)(const void* p, long begin, long end);
};

}  // namespace ssah
