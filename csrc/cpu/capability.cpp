// Chooses the instruction set: the widest that was built and that this processor has.
#include <cstdlib>
#include <cstring>
#include <string>

#include "host.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace ssah {
#if defined(__aarch64__)
namespace neon {
extern const Kernels kernels;
}
#else
namespace baseline {
extern const Kernels kernels;
}
#endif
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

std::vector<const Kernels*> built_kernels() {
#if defined(__aarch64__)
  return {&neon::kernels};
#elif defined(__x86_64__)
  return {&baseline::kernels, &avx2::kernels, &avx512::kernels};
#else
  return {&baseline::kernels};
#endif
}

namespace {

#if defined(__x86_64__)
// Not every compiler's __builtin_cpu_supports knows the name.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

// Whether this processor (and its operating system) has all that isa/<isa>.cpp is compiled for.
bool processor_has(const Kernels& table) {
#if defined(__x86_64__)
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (&table == &avx2::kernels) return has_avx2;
  if (&table == &avx512::kernels) {
    return has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return true;
}

const Kernels& choose() {
  const char* wanted = std::getenv("SSAH_CPU_CAPABILITY");
  if (wanted != nullptr && *wanted == '\0') wanted = nullptr;  // set to nothing: not set
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
