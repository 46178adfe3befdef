// Registers the CPU kernels as torch.ops.ssah_cpu.* (their schemas are defined by
// ssah_kernels/backends/cpu.py, from the catalogue), and the module ssah_kernels._C: build facts.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include <atomic>
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
  m.def(
      "read_bytes",
      [](uintptr_t address, int64_t n_bytes) {
        std::atomic<unsigned> total{0};
        torch::stable::parallel_for(0, n_bytes / 64, 1024, [&](int64_t begin, int64_t end) {
          total += ssah::kernels().read_blocks(reinterpret_cast<const void*>(address), begin, end);
        });
        return total.load();
      },
      pybind11::arg("address"), pybind11::arg("n_bytes"),
      "Reads n_bytes (in 64-byte blocks) and returns a sum of them: to measure read bandwidth.");
}
