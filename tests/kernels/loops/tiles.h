// Products on tile registers against the definition of the instruction. tiles.cpp makes the products.
#pragma once

#include "truth.h"

// amx_model: AMX's loops on a plain C++ model of its tile registers.
#define RADA_DECLARE_TILES(isa)                                                                                       \
  namespace isa {                                                                                                     \
  void tile_product(bool row_major, int64_t m, int64_t n, int64_t k, const uint16_t* a, const uint16_t* b, float* c); \
  bool releases_tiles();                                                                                              \
  bool tiles_in_use();                                                                                                \
  }
RADA_DECLARE_TILES(amx_bf16)
RADA_DECLARE_TILES(amx_model)

// What Intel's manual gives for TDPBF16PS, in steps of 32 along k: even and odd products are added up apart, each with
// one rounding; the two sums are added, and the result to what was there. Numbers below the normal ones are zero.
inline float tile_definition(const uint16_t* a, const uint16_t* b, int64_t n, int64_t k) {
  auto normal = [](float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; };
  float sum = 0;
  for (int64_t first = 0; first < k; first += 32) {
    float parts[2] = {};
    for (int64_t i = first; i < std::min(first + 32, k); i++)
      parts[i % 2] = normal(std::fma(normal(from_bfloat16(a[i])), normal(from_bfloat16(b[i * n])), parts[i % 2]));
    sum = normal(sum + normal(parts[0] + parts[1]));
  }
  return sum;
}

struct Tiles {
  const char* name;
  decltype(&amx_model::tile_product) product;
  bool (*releases)();
  bool (*in_use)();
};

// Products of every remainder of rows, columns and steps, bit for bit. Memory ends where the operands do.
inline bool test_tiles(const Tiles& tiles) {
  std::mt19937 generator(1);
  int products = 0, failures = 0;
  enum { USUAL, TINY, WILD };
  auto draw = [&](int64_t count, int kind) {
    std::vector<uint16_t> out(count);
    for (uint16_t& x : out) {
      const unsigned bits = generator();
      unsigned exponent = (kind == TINY ? 52 : 110) + bits / 128 % 24;  // tiny: products about the smallest normal one
      if (kind == WILD && bits % 64 == 0) exponent = bits / 128 % 2 * 255;  // zero, below the normal ones, inf, NaN
      x = (bits >> 16 & 0x807f) | exponent << 7;
    }
    return out;
  };
  for (int64_t m : {1, 15, 16, 17, 32, 33, 127, 129, 200})
    for (int64_t n : {1, 16, 17, 40, 64})
      for (int64_t k : {2, 30, 32, 34, 64, 100, 256}) {
        const int kind = products++ % 3;
        const std::vector<uint16_t> a = draw(m * k, kind), b = draw(k * n, kind);
        std::vector<uint16_t> columns(m * k);
        for (int64_t i = 0; i < m; i++)
          for (int64_t j = 0; j < k; j++) columns[j / 2 * 2 * m + i * 2 + j % 2] = a[i * k + j];
        for (bool row_major : {true, false}) {
          std::vector<float> c(m * n, std::numeric_limits<float>::quiet_NaN());
          tiles.product(row_major, m, n, k, row_major ? a.data() : columns.data(), b.data(), c.data());
          int wrong = 0;
          for (int64_t i = 0; i < m * n; i++) {
            const float truth = tile_definition(&a[i / n * k], &b[i % n], n, k);
            wrong += !(std::memcmp(&truth, &c[i], sizeof truth) == 0 || (truth != truth && c[i] != c[i]));
          }
          if (wrong) {
            std::printf("FAILED %s %s product m=%d n=%d k=%d: other bits in %d elements\n", tiles.name,
                        row_major ? "row-major" : "column-major", (int)m, (int)n, (int)k, wrong);
            failures++;
          }
        }
      }
  const bool released = tiles.releases() && !tiles.in_use();
  if (!released) std::printf("FAILED %s: a task leaves its tile registers in use\n", tiles.name);
  std::printf("%-12s %-8s %d products, %d failures\n", tiles.name, "tiles", products, failures);
  return !failures && released;
}
