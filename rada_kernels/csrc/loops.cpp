// The loops of one instruction set: compiled once for each, with RADA_ISA its name.
#include "head.h"

namespace RADA_ISA {

rada::Loops float_loops() { return loops_of<Float>(); }
#if defined(RADA_BFLOAT16)
rada::Loops bfloat16_loops() { return loops_of<Bfloat16>(); }
#endif

}  // namespace RADA_ISA
