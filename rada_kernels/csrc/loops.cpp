// The loops of one instruction set: compiled once for each, with RADA_ISA its name.
#include "backward.h"
#include "convert.h"
#include "forward.h"

namespace RADA_ISA {

template <class P>
rada::Loops loops_of() {
  return {
      [](const Call& call, const Pool& pool) { return Head<P>(call, pool).bytes(); },
      [](const Call& call, const Pool& pool, void* workspace) { Head<P>(call, pool, workspace).run(); },
      convert,
  };
}

#if !defined(RADA_TILES)  // these are for bfloat16 alone
rada::Loops float_loops() { return loops_of<Float>(); }
#endif
#if defined(RADA_BFLOAT16)
rada::Loops bfloat16_loops() { return loops_of<Bfloat16>(); }
#endif

}  // namespace RADA_ISA
