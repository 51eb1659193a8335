// The instruction sets that a build holds loops for, and which of them the machine at hand runs. No torch in sight.
#pragma once

#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "call.h"

#define RADA_DECLARE_LOOPS(isa) \
  namespace isa {               \
  rada::Loops float_loops();    \
  rada::Loops bfloat16_loops(); \
  }
RADA_DECLARE_LOOPS(generic)
RADA_DECLARE_LOOPS(avx2)
RADA_DECLARE_LOOPS(avx512)
RADA_DECLARE_LOOPS(avx512_bf16)
RADA_DECLARE_LOOPS(amx_bf16)
RADA_DECLARE_LOOPS(neon)
RADA_DECLARE_LOOPS(neon_bf16)

namespace rada {

struct InstructionSet {
  const char* name;
  std::string refused;  // why this machine does not run it; empty: it does
  Loops (*float_loops)();
  Loops (*bfloat16_loops)();  // null: no bfloat16 dot products

  bool usable() const { return refused.empty(); }
};

#if defined(__x86_64__)
// clang 14's __builtin_cpu_supports does not know it.
inline const char* why_no_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C ? "" : "the processor has no f16c";
}

// Tile registers are the operating system's to give, to the whole process.
inline std::string why_no_tiles() {
#if !defined(RADA_AMX)
  return "the compiler that built the library has no AMX";
#elif !defined(__linux__)
  return "this system gives no AMX tile registers";
#else
  constexpr unsigned BFLOAT16_TILES = 1u << 22, TILES = 1u << 24;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || ~d & (BFLOAT16_TILES | TILES)) return "the processor has no AMX";
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  if (syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0) return "";
  return std::string("the kernel gives no AMX tile registers: ") + std::strerror(errno);
#endif
}
#endif

#if defined(__aarch64__)
inline bool has_bfloat16_products() {
#if defined(__linux__)
  return getauxval(AT_HWCAP2) & HWCAP2_BF16;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has;
#else
  return false;
#endif
}
#endif

// The best one first; the last one runs wherever the build does. Asks for AMX's registers once.
inline const std::vector<InstructionSet>& instruction_sets() {
#define RADA_WITHOUT(feature) (__builtin_cpu_supports(feature) ? "" : "the processor has no " feature)
  static const std::vector<InstructionSet> all = [] {
#if defined(__x86_64__)
    auto first_of = [](std::initializer_list<std::string> reasons) {
      for (const std::string& reason : reasons)
        if (!reason.empty()) return reason;
      return std::string();
    };
    const std::string no_avx2 = first_of({RADA_WITHOUT("avx2"), RADA_WITHOUT("fma"), why_no_f16c()});
    const std::string no_avx512 = first_of(
        {RADA_WITHOUT("avx512f"), RADA_WITHOUT("avx512bw"), RADA_WITHOUT("avx512vl"), RADA_WITHOUT("avx512dq")});
    const std::string no_avx512_bf16 = first_of({no_avx512, RADA_WITHOUT("avx512bf16")});
    // Tiles are of 16-bit numbers: float32 runs in AVX-512.
    const std::string no_amx = no_avx512_bf16.empty() ? why_no_tiles() : no_avx512_bf16;
#endif
    return std::vector<InstructionSet>{
#if defined(__x86_64__)
#if defined(RADA_AMX)
        {"amx_bf16", no_amx, avx512_bf16::float_loops, amx_bf16::bfloat16_loops},
#else
        {"amx_bf16", no_amx, nullptr, nullptr},
#endif
        {"avx512_bf16", no_avx512_bf16, avx512_bf16::float_loops, avx512_bf16::bfloat16_loops},
        {"avx512", no_avx512, avx512::float_loops, nullptr},
        {"avx2", no_avx2, avx2::float_loops, nullptr},
#endif
#if defined(__aarch64__)
        {"neon_bf16", has_bfloat16_products() ? "" : "the processor has no bfloat16 dot products",
         neon_bf16::float_loops, neon_bf16::bfloat16_loops},
        {"neon", "", neon::float_loops, nullptr},
#else
        {"generic", "", generic::float_loops, nullptr},
#endif
    };
  }();
#undef RADA_WITHOUT
  return all;
}

}  // namespace rada
