// Registers the CPU kernels as torch.ops.ssah_cpu.* (their schemas are defined by
// ssah_kernels/backends/cpu.py, from the catalogue), and the module ssah_kernels._C: build facts.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include <map>
#include <string>

#include "cpu/host.h"
#include "cpu/ops.h"

STABLE_TORCH_LIBRARY_IMPL(ssah_cpu, CPU, m) {
  m.impl("channel_moments_", TORCH_BOX(&ssah::channel_moments_cpu));
  m.impl("gated_moments", TORCH_BOX(&ssah::gated_moments_cpu));
  m.impl("gated_moments_backward", TORCH_BOX(&ssah::gated_moments_backward_cpu));
  m.impl("taylor_moments_", TORCH_BOX(&ssah::taylor_moments_cpu));
  m.impl("column_sq_norms", TORCH_BOX(&ssah::column_sq_norms_cpu));
  m.impl("masked_adamw_", TORCH_BOX(&ssah::masked_adamw_cpu));
  m.impl("masked_sgd_", TORCH_BOX(&ssah::masked_sgd_cpu));
  m.impl("masked_grad_norm", TORCH_BOX(&ssah::masked_grad_norm_cpu));
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build and processor facts of the CPU kernels.";
  m.def(
      "facts",
      [] {
        std::string built;
        for (const ssah::Kernels* table : ssah::built_kernels()) {
          built += (built.empty() ? "" : ", ") + std::string(table->isa);
        }
        return std::map<std::string, std::string>{{"isa_built", built},
                                                  {"isa", ssah::kernels().isa},
                                                  {"compiler", __VERSION__},
                                                  {"torch_built_with", SSAH_TORCH_VERSION}};
      },
      "Instruction sets built, the one chosen, the compiler, and the torch of the build.");
}
