// Chooses the instruction set: the widest that was built and that this processor has.
#include <cstdlib>
#include <cstring>
#include <string>

#include "host.h"

namespace ssah {
namespace baseline {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

std::vector<const Kernels*> built_kernels() {
#if defined(__x86_64__)
  return {&baseline::kernels, &avx2::kernels, &avx512::kernels};
#else
  return {&baseline::kernels};
#endif
}

namespace {

bool processor_has(const Kernels& table) {
#if defined(__x86_64__)
  if (&table == &avx512::kernels) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (&table == &avx2::kernels) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
#endif
  return true;
}

const Kernels& choose() {
  const char* wanted = std::getenv("SSAH_CPU_CAPABILITY");
  const Kernels* best = nullptr;
  std::string usable;
  for (const Kernels* table : built_kernels()) {
    if (!processor_has(*table)) continue;
    if (wanted != nullptr && std::strcmp(wanted, table->isa) == 0) return *table;
    usable += std::string(usable.empty() ? "" : ", ") + table->isa;
    best = table;
  }
  STD_TORCH_CHECK(wanted == nullptr, "SSAH_CPU_CAPABILITY is '", wanted == nullptr ? "" : wanted,
                  "'; on this machine it must be one of: ", usable);
  return *best;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace ssah
