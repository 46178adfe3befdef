// Stands in for torch's header: remembers which device is current (runtime.cpp).
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>

namespace torch::stable::accelerator {

using DeviceIndex = int32_t;

struct DeviceGuard {
  explicit DeviceGuard(DeviceIndex index);
  ~DeviceGuard();
  DeviceIndex before;
};

}  // namespace torch::stable::accelerator
