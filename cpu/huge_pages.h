// Fewer page faults where a result is written to new memory.
#ifndef JAX_DWSCONV_CPU_HUGE_PAGES_H_
#define JAX_DWSCONV_CPU_HUGE_PAGES_H_

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace dwsconv::cpu {

// XLA allocates large results anew for every call, and then the page faults can take longer than the convolution.
inline void PreferHugePages(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr size_t kHugePage = 2 << 20;
  if (bytes < 2 * kHugePage) return;
  // All pages with a part of the result: where it has a mapping of its own, that is the whole mapping.
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = address / page * page;
  madvise(reinterpret_cast<void*>(begin), address + bytes - begin, MADV_HUGEPAGE);  // no harm where it fails
#endif
}

}  // namespace dwsconv::cpu

#endif  // JAX_DWSCONV_CPU_HUGE_PAGES_H_
