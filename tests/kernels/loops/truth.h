// Inputs of a call, and what it must give in plain double precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../../rada_kernels/csrc/call.h"

using rada::Penalty;
typedef std::vector<double> Doubles;

struct Judge {
  double worst = 0;
  int failures = 0;

  void fail(const std::string& message) {
    std::printf("FAILED %s\n", message.c_str());
    failures++;
  }
};

// ---- inputs

enum Query { IMAGE = 1, TEXT = 2, RATIONAL = 4 };

struct Case {
  int64_t images, classes, width, heads;
  int queries;
  Penalty penalty;
  bool saved;
  bool streams, layers, features;  // scores stream; whose gradients are wanted
  bool normalize, bfloat16;
};

inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline float from_bfloat16(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

struct Inputs {
  Doubles image, text, weight[rada::LAYERS], bias[rada::LAYERS], grad_sums, grad_deviation;
  double scale, factor;
};

inline Inputs random_inputs(const Case& c) {
  std::mt19937 generator(1);
  std::normal_distribution<double> normal;
  auto draw = [&](int64_t count, double size, bool bfloat16) {
    Doubles out(count);
    for (double& x : out) {
      x = (float)(size * normal(generator));
      if (bfloat16) x = from_bfloat16(to_bfloat16(x));
    }
    return out;
  };
  Inputs in;
  in.scale = (float)(0.7 * c.width);
  in.factor = 1 / std::sqrt((double)c.width / c.heads);
  in.image = draw(c.images * c.width, (c.normalize ? 3 : 1) / std::sqrt((double)c.width), c.bfloat16);
  in.text = draw(c.classes * c.width, (c.normalize ? 3 : 1) / std::sqrt((double)c.width), c.bfloat16);
  for (int l = 0; l < rada::LAYERS; l++) {
    // The output layer keeps every mask element off the kinks: in 16 bits gradients would jump there.
    in.weight[l] = draw(c.width * c.width, (l == rada::OUT ? 0.1 : 1) / std::sqrt((double)c.width), c.bfloat16);
    in.bias[l] = draw(c.width, 1, c.bfloat16);
    if (l == rada::OUT)
      for (double& x : in.bias[l]) x = x > -0.5 ? 1 : -3;
  }
  in.grad_sums = draw(c.images * c.classes, 1, false);
  in.grad_deviation = draw(c.images, 3, false);
  return in;
}

// ---- double precision, word for word

struct Results {
  Doubles sums, deviation, grad_weight[rada::LAYERS], grad_bias[rada::LAYERS], grad_image, grad_text;
};

// c[m, n] += Σ_k a[m, k] b[n, k], or b[k, n] where `by_rows`, or a[k, m] where `by_columns`.
inline void add_product(double* c, const double* a, const double* b, int64_t m, int64_t n, int64_t k, bool by_columns,
                        bool by_rows) {
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++)
      for (int64_t l = 0; l < k; l++)
        c[i * n + j] += a[by_columns ? l * m + i : i * k + l] * b[by_rows ? l * n + j : j * k + l];
}

inline Results compute_truth(const Case& c, const Inputs& in) {
  const int64_t B = c.images, K = c.classes, D = c.width, E = D / c.heads;
  Results out;
  out.sums.assign(B * K, 0), out.deviation.assign(B, 0);
  for (int l = 0; l < rada::LAYERS; l++) out.grad_weight[l].assign(D * D, 0), out.grad_bias[l].assign(D, 0);
  auto norm_of = [&](const Doubles& rows, int64_t row) {
    double square = 0;
    for (int64_t d = 0; d < D; d++) square += rows[row * D + d] * rows[row * D + d];
    return c.normalize ? std::sqrt(square) : 1;
  };
  auto unit_rows = [&](Doubles rows) {
    for (int64_t row = 0; row < (int64_t)rows.size() / D; row++) {
      const double norm = norm_of(rows, row);
      for (int64_t d = 0; d < D; d++) rows[row * D + d] /= norm;
    }
    return rows;
  };
  const Doubles f = unit_rows(in.image), h = unit_rows(in.text);
  auto apply = [&](int l, const Doubles& rows) {
    Doubles to(rows.size());
    for (size_t i = 0; i < to.size(); i++) to[i] = in.bias[l][i % D];
    add_product(to.data(), rows.data(), in.weight[l].data(), rows.size() / D, D, D, false, false);
    return to;
  };
  auto scaled = [&](Doubles rows) {
    for (double& x : rows) x *= std::sqrt(in.scale);
    return rows;
  };
  const Doubles image_query = apply(rada::QUERY_IMAGE, scaled(f)), text_query = apply(rada::QUERY_TEXT, scaled(h));
  Doubles grad_f(B * D), grad_h(K * D), grad_image_query(B * D), grad_text_query(K * D);
  auto add_layer = [&](int l, const Doubles& grad_rows, const Doubles& rows, Doubles& grad_input) {
    const int64_t count = rows.size() / D;
    add_product(out.grad_weight[l].data(), grad_rows.data(), rows.data(), D, D, count, true, true);
    for (int64_t i = 0; i < count * D; i++) out.grad_bias[l][i % D] += grad_rows[i];
    add_product(grad_input.data(), grad_rows.data(), in.weight[l].data(), count, D, D, false, true);
  };
  const double kinds = !!(c.queries & IMAGE) + !!(c.queries & TEXT) + !!(c.queries & RATIONAL);
  for (int64_t b = 0; b < B; b++) {
    Doubles R(K * D), X(K * D), projected[3], O(K * D), M(K * D), change(K * D);
    for (int64_t i = 0; i < K * D; i++) R[i] = f[b * D + i % D] * h[i], X[i] = in.scale * R[i];
    for (int n = 0; n < 3; n++) projected[n] = apply(rada::QUERY_RATIONAL + n, X);
    const Doubles &rational = projected[0], &key = projected[1], &value = projected[2];
    auto query_of = [&](int kind, int64_t i, int64_t d) {
      return kind == IMAGE ? image_query[b * D + d] : kind == TEXT ? text_query[i * D + d] : rational[i * D + d];
    };
    // A[kind][head, i, j]: K times the softmax over all pairs.
    Doubles A[RATIONAL + 1];
    for (int kind : {IMAGE, TEXT, RATIONAL}) {
      if (!(c.queries & kind)) continue;
      A[kind].resize(c.heads * K * K);
      for (int64_t n = 0; n < c.heads; n++) {
        double* a = &A[kind][n * K * K];
        for (int64_t i = 0; i < K; i++)
          for (int64_t j = 0; j < K; j++) {
            double dot = 0;
            for (int64_t d = n * E; d < (n + 1) * E; d++) dot += query_of(kind, i, d) * key[j * D + d];
            a[i * K + j] = dot * in.factor;
          }
        const double top = *std::max_element(a, a + K * K);
        double total = 0;
        for (int64_t i = 0; i < K * K; i++) total += a[i] = std::exp(a[i] - top);
        for (int64_t i = 0; i < K * K; i++) a[i] *= K / total;
        for (int64_t i = 0; i < K; i++)
          for (int64_t j = 0; j < K; j++)
            for (int64_t d = n * E; d < (n + 1) * E; d++) O[i * D + d] += a[i * K + j] / kinds * value[j * D + d];
      }
    }
    const Doubles reduced = apply(rada::OUT, O);
    double* sums = &out.sums[b * K];
    int64_t peak = 0;
    for (int64_t i = 0; i < K * D; i++) {
      change[i] = std::max(reduced[i], -1.0), M[i] = 1 + change[i];
      sums[i / D] += M[i] * R[i];
      const double size = std::abs(change[i]);
      if (c.penalty == Penalty::LINF)
        out.deviation[b] = std::max(out.deviation[b], size);
      else
        out.deviation[b] += (c.penalty == Penalty::L1 ? size : size * size) / (K * D);
      if (size > std::abs(change[peak])) peak = i;
    }

    const double *grad_sums = &in.grad_sums[b * K], grad_deviation = in.grad_deviation[b];
    Doubles grad(K * D), grad_O(K * D), grad_projected[3], grad_X(K * D);
    for (int64_t i = 0; i < K * D; i++) {
      grad[i] = grad_sums[i / D] * R[i];
      const double sign = change[i] > 0 ? 1 : -1;
      if (c.penalty == Penalty::LINF)
        grad[i] += i == peak ? sign * grad_deviation : 0;
      else
        grad[i] += grad_deviation / (K * D) * (c.penalty == Penalty::L1 ? sign : 2 * change[i]);
      if (M[i] == 0) grad[i] = 0;
    }
    add_layer(rada::OUT, grad, O, grad_O);
    for (Doubles& rows : grad_projected) rows.assign(K * D, 0);
    for (int kind : {IMAGE, TEXT, RATIONAL}) {
      if (!(c.queries & kind)) continue;
      for (int64_t n = 0; n < c.heads; n++) {
        const double* a = &A[kind][n * K * K];
        Doubles grad_A(K * K);
        double delta = 0;
        for (int64_t i = 0; i < K; i++)
          for (int64_t j = 0; j < K; j++) {
            for (int64_t d = n * E; d < (n + 1) * E; d++) {
              grad_A[i * K + j] += grad_O[i * D + d] * value[j * D + d] / kinds;
              grad_projected[2][j * D + d] += a[i * K + j] / kinds * grad_O[i * D + d];
            }
            delta += a[i * K + j] * grad_A[i * K + j] / K;
          }
        for (int64_t i = 0; i < K; i++)
          for (int64_t j = 0; j < K; j++) {
            const double grad_score = in.factor * a[i * K + j] * (grad_A[i * K + j] - delta);
            for (int64_t d = n * E; d < (n + 1) * E; d++) {
              double& grad_query = kind == IMAGE  ? grad_image_query[b * D + d]
                                   : kind == TEXT ? grad_text_query[i * D + d]
                                                  : grad_projected[0][i * D + d];
              grad_query += grad_score * key[j * D + d];
              grad_projected[1][j * D + d] += grad_score * query_of(kind, i, d);
            }
          }
      }
    }
    for (int n = 0; n < 3; n++) add_layer(rada::QUERY_RATIONAL + n, grad_projected[n], X, grad_X);
    for (int64_t i = 0; i < K * D; i++) {
      const double grad_R = in.scale * grad_X[i] + grad_sums[i / D] * M[i];
      grad_f[b * D + i % D] += grad_R * h[i];
      grad_h[i] += grad_R * f[b * D + i % D];
    }
  }
  auto through_query = [&](int l, const Doubles& grad_query, const Doubles& unit, Doubles& grad_unit) {
    Doubles grad_rows(unit.size());
    add_layer(l, grad_query, scaled(unit), grad_rows);
    for (size_t i = 0; i < unit.size(); i++) grad_unit[i] += std::sqrt(in.scale) * grad_rows[i];
  };
  through_query(rada::QUERY_IMAGE, grad_image_query, f, grad_f);
  through_query(rada::QUERY_TEXT, grad_text_query, h, grad_h);
  auto through_norm = [&](const Doubles& rows, const Doubles& unit, Doubles grad_unit) {
    for (int64_t row = 0; row < (int64_t)rows.size() / D && c.normalize; row++) {
      double along = 0;
      for (int64_t d = row * D; d < (row + 1) * D; d++) along += grad_unit[d] * unit[d];
      for (int64_t d = row * D; d < (row + 1) * D; d++)
        grad_unit[d] = (grad_unit[d] - along * unit[d]) / norm_of(rows, row);
    }
    return grad_unit;
  };
  out.grad_image = through_norm(in.image, f, grad_f), out.grad_text = through_norm(in.text, h, grad_h);
  return out;
}
