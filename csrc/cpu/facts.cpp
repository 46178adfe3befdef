// Build and processor facts, for reports of bugs and beside measurements.
#include "host.h"
#include "ops.h"

namespace ssah {

// One "name=value" per line: the stable ABI knows strings, but no dictionaries of them.
std::string facts_cpu() {
  std::string built;
  for (const Kernels* table : built_kernels()) {
    built += (built.empty() ? "" : ", ") + std::string(table->isa);
  }
  return "isa_built=" + built + "\nisa=" + kernels().isa + "\ncompiler=" __VERSION__ +
         "\ntorch_built_with=" SSAH_TORCH_VERSION;
}

}  // namespace ssah
