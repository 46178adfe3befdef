// Storage types, the arguments of each kernel, and the table of kernels of one instruction set.
//
// Plain C types only: included by the kernels (compiled once per instruction set) and by the host
// functions. Pointers are to elements; `rows` hold element offsets of each row from the base.
#pragma once

namespace ssah {

struct bf16 {
  unsigned short bits;
};
struct f16 {
  unsigned short bits;
};

enum Dtype { kFloat64, kFloat32, kBFloat16, kFloat16, kDtypes };
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
  bool stream;  // write past the cache
};

struct GatedBackwardArgs {
  const void *grad, *gate, *up;
  void *grad_gate, *grad_up;
  const long *grad_rows, *gate_rows, *up_rows;
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

// Every kernel of one instruction set. Work is split over channels (over rows where no sum crosses
// rows), so a result never depends on the number of threads.
struct Kernels {
  const char* isa;
  void (*channel_moments[kDtypes])(const ChannelMomentsArgs&, ChannelRange);
  void (*gated_moments[kDtypes][kActivations])(const GatedMomentsArgs&, ChannelRange);
  void (*gated_backward[kDtypes][kActivations])(const GatedBackwardArgs&, long row_begin,
                                                long row_end);
  void (*taylor_moments[kDtypes])(const TaylorMomentsArgs&, ChannelRange);
  void (*column_sq_norms[kDtypes])(const ColumnSqNormsArgs&, ChannelRange);
};

}  // namespace ssah
