// CPU tensors as device memory: from gpusim_watch("libc10.so", 1) on, every block torch's CPU allocator hands out is known to
// the simulator, holds the pattern of fresh memory, and has a red zone behind it. Done by putting our functions into the
// library's table of imported functions (its global offset table); nothing else in the process changes.
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>

#include "../exec/memory.h"

namespace {

constexpr size_t kRedZone = 1024;
std::mutex mutex;
bool active = false;
int (*real_posix_memalign)(void**, size_t, size_t) = posix_memalign;
void (*real_free)(void*) = std::free;

int watched_posix_memalign(void** p, size_t alignment, size_t bytes) {
  if (!active) return real_posix_memalign(p, alignment, bytes);
  const int error = real_posix_memalign(p, alignment, bytes + kRedZone);
  if (error) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  gpusim::poison(*p, bytes + kRedZone);
  gpusim::Memory::get().add(*p, bytes, "tensor");
  return 0;
}
void watched_free(void* p) {
  {
    const std::lock_guard<std::mutex> lock(mutex);
    gpusim::Memory::get().remove(p);
  }
  real_free(p);
}

struct Wanted {
  const char* library;
  int replaced = 0;
};

void replace(uint64_t* place, void* function) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  void* begin = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(place) / page * page);
  if (mprotect(begin, page, PROT_READ | PROT_WRITE)) return;
  *place = reinterpret_cast<uint64_t>(function);
}

int visit(dl_phdr_info* info, size_t, void* data) {
  auto* wanted = static_cast<Wanted*>(data);
  if (!info->dlpi_name || !std::strstr(info->dlpi_name, wanted->library)) return 0;
  const ElfW(Dyn)* dynamic = nullptr;
  for (int k = 0; k < info->dlpi_phnum; ++k)
    if (info->dlpi_phdr[k].p_type == PT_DYNAMIC) dynamic = reinterpret_cast<const ElfW(Dyn)*>(info->dlpi_addr + info->dlpi_phdr[k].p_vaddr);
  const ElfW(Sym)* symbols = nullptr;
  const char* strings = nullptr;
  const ElfW(Rela) * tables[2] = {};
  size_t bytes[2] = {};
  for (; dynamic && dynamic->d_tag != DT_NULL; ++dynamic) {
    if (dynamic->d_tag == DT_SYMTAB) symbols = reinterpret_cast<const ElfW(Sym)*>(dynamic->d_un.d_ptr);
    if (dynamic->d_tag == DT_STRTAB) strings = reinterpret_cast<const char*>(dynamic->d_un.d_ptr);
    if (dynamic->d_tag == DT_JMPREL) tables[0] = reinterpret_cast<const ElfW(Rela)*>(dynamic->d_un.d_ptr);
    if (dynamic->d_tag == DT_PLTRELSZ) bytes[0] = dynamic->d_un.d_val;
    if (dynamic->d_tag == DT_RELA) tables[1] = reinterpret_cast<const ElfW(Rela)*>(dynamic->d_un.d_ptr);
    if (dynamic->d_tag == DT_RELASZ) bytes[1] = dynamic->d_un.d_val;
  }
  for (int t = 0; t < 2; ++t)
    for (size_t k = 0; tables[t] && k < bytes[t] / sizeof(ElfW(Rela)); ++k) {
      const ElfW(Rela) & r = tables[t][k];
      const uint64_t type = ELF64_R_TYPE(r.r_info), symbol = ELF64_R_SYM(r.r_info);
      if (!symbol || (type != R_X86_64_JUMP_SLOT && type != R_X86_64_GLOB_DAT)) continue;
      const char* name = strings + symbols[symbol].st_name;
      auto* place = reinterpret_cast<uint64_t*>(info->dlpi_addr + r.r_offset);
      if (!std::strcmp(name, "posix_memalign")) replace(place, reinterpret_cast<void*>(watched_posix_memalign)), ++wanted->replaced;
      if (!std::strcmp(name, "free")) replace(place, reinterpret_cast<void*>(watched_free)), ++wanted->replaced;
    }
  return 0;
}

}  // namespace

// Starts or pauses; the answer is how many imports are replaced: 0 means that the library is not loaded or allocates in another way.
extern "C" __attribute__((visibility("default"))) int gpusim_watch(const char* library, int on) {
  static Wanted wanted{library};
  if (!wanted.replaced) dl_iterate_phdr(visit, &wanted);
  active = on != 0;
  return wanted.replaced;
}
