// Conversions between types, strides and addresses.
#pragma once

#include <limits>

#include "truth.h"

using rada::Loops;
using rada::Type;

inline double from_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double size = exponent == 31 ? (fraction ? NAN : INFINITY)
                      : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                     : std::ldexp(fraction, -24);
  return bits & 0x8000 ? -size : size;
}

template <class To, class From>
std::vector<To> converted(const Loops& loops, const std::vector<From>& from, Type to_type, Type from_type) {
  const int64_t count = from.size();
  std::vector<To> to(count);
  loops.convert({to.data(), to_type, 1, count, count, 1}, {(void*)from.data(), from_type, 1, count, count, 1});
  return to;
}

// Every 16-bit number becomes the same float; a float becomes the nearest 16-bit number, of two the even one.
inline void test_values(const std::string& where, const Loops& loops, Judge& judge) {
  std::vector<uint16_t> all(1 << 16);
  for (size_t i = 0; i < all.size(); i++) all[i] = i;
  for (Type type : {Type::HALF, Type::BFLOAT16}) {
    const char* name = type == Type::HALF ? "float16" : "bfloat16";
    auto decode = [&](uint16_t bits) { return type == Type::HALF ? from_half(bits) : (double)from_bfloat16(bits); };
    const std::vector<float> floats = converted<float>(loops, all, Type::FLOAT, type);
    std::vector<float> between;
    std::vector<uint16_t> nearest;
    for (uint16_t bits : all) {
      const double value = decode(bits), up = decode(bits + 1);
      if (floats[bits] != (float)value && !(std::isnan(floats[bits]) && std::isnan(value)))
        return judge.fail(where + ": from " + name + " " + std::to_string(bits));
      if (!std::isfinite(value)) continue;
      // What lies between the largest number and infinity rounds as if one more number followed.
      const double next = std::isinf(up) ? 2 * value - decode(bits - 1) : up;
      const float middle = (value + next) / 2;
      for (auto [x, to] : {std::pair<float, int>{value, bits},
                           {middle, bits + (bits & 1)},
                           {std::nextafter(middle, 0.0f), bits},
                           {std::nextafter(middle, (float)next), bits + 1}})
        between.push_back(x), nearest.push_back(to);
    }
    for (int sign : {0, 1}) {
      const uint16_t infinite = (type == Type::HALF ? 0x7c00 : 0x7f80) | sign << 15;
      between.push_back(sign ? -INFINITY : INFINITY), nearest.push_back(infinite);
      between.push_back(std::copysign(std::numeric_limits<float>::max(), sign ? -1.0f : 1.0f)),
          nearest.push_back(infinite);
    }
    const std::vector<uint16_t> rounded = converted<uint16_t>(loops, between, type, Type::FLOAT);
    for (size_t i = 0; i < rounded.size(); i++)
      if (rounded[i] != nearest[i])
        return judge.fail(where + ": to " + name + ": " + std::to_string(between[i]) + " becomes " +
                          std::to_string(rounded[i]) + ", not " + std::to_string(nearest[i]));
    // A NaN whose payload lies in the bits that are cut off.
    for (uint16_t bits : converted<uint16_t>(loops, std::vector<uint32_t>{0x7f800001, 0xffffffff}, type, Type::FLOAT))
      if (!std::isnan(decode(bits))) return judge.fail(where + ": to " + name + ": a NaN becomes a number");
  }
}

// Between all types, strides and addresses; what lies between the elements stays as it is.
inline void test_layouts(const std::string& where, const Loops& loops, Judge& judge) {
  constexpr int64_t ROWS = 5, COLUMNS = 37, STRIDES[][2] = {{COLUMNS, 1}, {COLUMNS + 3, 1}, {1, ROWS}, {80, 2}};
  constexpr Type TYPES[] = {Type::FLOAT, Type::BFLOAT16, Type::HALF};
  auto bytes_of = [](Type type) { return type == Type::FLOAT ? 4 : 2; };
  auto bits_of = [](Type type, int value) -> uint32_t {
    uint32_t bits;
    const float x = value;
    std::memcpy(&bits, &x, 4);
    if (type == Type::FLOAT) return bits;
    if (type == Type::BFLOAT16) return bits >> 16;
    int exponent = 0;
    while (value >> exponent > 1) exponent++;
    return value ? (exponent + 15) << 10 | (value << (10 - exponent) & 1023) : 0;
  };
  for (Type from_type : TYPES)
    for (Type to_type : TYPES)
      for (const auto& from_stride : STRIDES)
        for (const auto& to_stride : STRIDES)
          for (int offset : {0, 1, 2}) {
            std::vector<char> from(2000, 'x'), to(2000, 'y'), expected(2000, 'y');
            for (int64_t r = 0; r < ROWS; r++)
              for (int64_t c = 0; c < COLUMNS; c++) {
                auto put = [&](std::vector<char>& bytes, Type type, const int64_t* stride) {
                  const uint32_t bits = bits_of(type, r * COLUMNS + c);  // below 256: the same in every type
                  std::memcpy(&bytes[offset + (r * stride[0] + c * stride[1]) * bytes_of(type)], &bits, bytes_of(type));
                };
                put(from, from_type, from_stride), put(expected, to_type, to_stride);
              }
            loops.convert({&to[offset], to_type, ROWS, COLUMNS, to_stride[0], to_stride[1]},
                          {&from[offset], from_type, ROWS, COLUMNS, from_stride[0], from_stride[1]});
            if (to != expected)
              return judge.fail(where + ": from type " + std::to_string((int)from_type) + " to " +
                                std::to_string((int)to_type) + " at an offset of " + std::to_string(offset) + " bytes");
          }
}
