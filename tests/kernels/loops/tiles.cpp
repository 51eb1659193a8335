// Products on tile registers by themselves, so that main.cpp can hold them against the definition of the instruction.
#include <vector>

#include "../../../rada_kernels/csrc/gemm.h"

namespace RADA_ISA {

// c [m, n] = a b: bfloat16 a [m, k], or by columns as words [k / 2, m]; b [k, n]. k is even.
void tile_product(bool row_major, int64_t m, int64_t n, int64_t k, const uint16_t* a, const uint16_t* b, float* c) {
  const TaskScope scope;
  const Panels panels(n);
  std::vector<float> packed(k / 2 * panels.padded());
  pack_rows<Bfloat16>(packed.data(), b, n, k, n);
  auto put = [&](int64_t row, int64_t column, const auto& tile) {
    tile.each([&](int r, int v, vec x) {
      const int64_t at = column + v * W;
      store_first(c + (row + r) * n + at, x, n - at);
    });
  };
  if (row_major)
    multiply<Bfloat16, true>(m, k / 2, (const word*)a, k / 2, packed.data(), panels, put);
  else
    multiply<Bfloat16, false>(m, k / 2, (const word*)a, m, packed.data(), panels, put);
}

// Whether this thread's tile registers hold a shape.
bool tiles_in_use() {
#if defined(RADA_TILE_MODEL)
  return tile_model.shapes.rows[0];
#else
  TileShapes shapes;
  asm volatile("sttilecfg %0" : "=m"(shapes));
  return shapes.palette;
#endif
}

// A shape is set, and released when the task ends.
bool releases_tiles() {
  {
    const TaskScope scope;
    shape_tiles(TILE_ROWS);
    if (!tiles_in_use()) return false;
  }
  return !tiles_in_use();
}

}  // namespace RADA_ISA
