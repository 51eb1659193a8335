// The instruction sets that a build holds loops for, and which of them the machine at hand runs. No torch in sight.
#pragma once

#include <vector>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
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
RADA_DECLARE_LOOPS(neon)
RADA_DECLARE_LOOPS(neon_bf16)

namespace rada {

struct InstructionSet {
  const char* name;
  bool usable;
  Loops (*float_loops)();
  Loops (*bfloat16_loops)();  // null: no bfloat16 dot products
};

// The best one first; the last one runs wherever the build does.
inline const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> all{
#if defined(__x86_64__)
      {"avx512_bf16",
       __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"),
       avx512_bf16::float_loops, avx512_bf16::bfloat16_loops},
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq"),
       avx512::float_loops, nullptr},
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), avx2::float_loops, nullptr},
#endif
#if defined(__aarch64__)
#if defined(__linux__)
      {"neon_bf16", (getauxval(AT_HWCAP2) & HWCAP2_BF16) != 0, neon_bf16::float_loops, neon_bf16::bfloat16_loops},
#endif
      {"neon", true, neon::float_loops, nullptr},
#else
      {"generic", true, generic::float_loops, nullptr},
#endif
  };
  return all;
}

}  // namespace rada
