// The router's middle and its gradient, for kLanes tokens at a time, one per lane:
//
//   p = gate(logits)      ids = top-k of p + bias      weights = p[ids] (/ their sum)
//
// No operation crosses lanes, so a token's numbers do not depend on its neighbors.  topk.h picks
// the K experts; a picked expert may be dropped, with id -1.  Ids in lanes have the same type as
// the gates, exact far beyond any E.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "tensors.h"

namespace lora_moe {

inline void check_ids(const int32_t* indices, int64_t n, int64_t E) {
  for (int64_t i = 0; i < n; ++i)
    check(indices[i] >= -1 && indices[i] < E, "indices: expected expert ids in [-1, ", E, "), got ",
          indices[i]);
}

// The number of one token in a lane of its vector.
template <class C>
inline C& lane(Vec<C>* v, int64_t i, int64_t token) {
  return reinterpret_cast<C*>(v + i)[token];
}

// n <= kLanes rows of N numbers into lanes, zeros beyond n; and back.
template <class C, class T>
inline void to_lanes(const T* rows, int64_t n, int64_t N, Vec<C>* out) {
  if (n < kLanes<C>) std::fill_n(out, N, Vec<C>{});
  for (int64_t t = 0; t < n; ++t)
    for (int64_t i = 0; i < N; ++i) lane<C>(out, i, t) = C(rows[t * N + i]);
}

template <class C, class T>
inline void from_lanes(Vec<C>* in, int64_t n, int64_t N, T* rows) {
  for (int64_t t = 0; t < n; ++t)
    for (int64_t i = 0; i < N; ++i) rows[t * N + i] = T(lane<C>(in, i, t));
}

// A Kahan sum over experts or slots: its error is about one rounding for any number of terms.  The
// compiler must not reorder it: nothing is built with -ffast-math.
template <class V>
struct Sum {
  V value = {}, lost = {};
  void add(V v) {
    v -= lost;
    const V next = value + v;
    lost = (next - value) - v;
    value = next;
  }
};

struct Gate {
  bool sigmoid;
  bool renormalize;
  double top_p, threshold;

  Gate(const std::string& name, bool renorm, double top = 0, double least = 0)
      : sigmoid(name == "sigmoid"), renormalize(renorm), top_p(top), threshold(least) {
    check(sigmoid || name == "softmax", "gate: expected softmax or sigmoid, got ", name);
  }

  // p (E) of logits (E); returns logsumexp of the logits.
  template <class C>
  Vec<C> values(const Vec<C>* logits, int64_t E, Vec<C>* p) const {
    constexpr C infinity = std::numeric_limits<C>::infinity();
    Vec<C> top = broadcast(-infinity), nan = {};
    for (int64_t e = 0; e < E; ++e) {
      top = logits[e] > top ? logits[e] : top;
      nan = logits[e] == logits[e] ? nan : logits[e];
    }
    Sum<Vec<C>> total;
    for (int64_t e = 0; e < E; ++e) total.add(p[e] = exp_negative(logits[e] - top));
    Vec<C> sum = total.value;
    for (int64_t e = 0; e < E; ++e) p[e] = sigmoid ? logistic<C>(logits[e]) : p[e] / sum;
    for (int t = 0; t < kLanes<C>; ++t) sum[t] = std::log(sum[t]);
    return ((top == infinity) | (top == -infinity)) & (nan == nan) ? top : top + sum;
  }

  // The divisor of the weights.  Gates that all underflowed stay zero instead of 0 / 0.
  template <class C>
  Vec<C> normalizer(const Vec<C>* picked, int64_t K) const {
    const Vec<C> one = broadcast(C(1));
    if (!renormalize) return one;
    Sum<Vec<C>> sum;
    for (int64_t j = 0; j < K; ++j) sum.add(picked[j]);
    return sum.value == 0 ? one : sum.value;
  }

  // Drops picked experts with p < threshold, and those after the p have summed to top_p: id -1, p
  // zero.
  template <class C>
  void drop(int64_t K, Vec<C>* ids, Vec<C>* picked) const {
    Sum<Vec<C>> before;
    for (int64_t j = 0; j < K; ++j) {
      const Vec<C> value = picked[j];
      const auto out = (value < broadcast(C(threshold))) | (before.value >= broadcast(C(top_p)));
      ids[j] = out ? broadcast(C(-1)) : ids[j];
      picked[j] = out ? Vec<C>{} : value;
      before.add(value);
    }
  }

  // Gradient `out` (E) of the logits from those of weights (K), p (E) times per_token, and lse;
  // null pointers are zeros.  `p` (E) is scratch.
  template <class C>
  void backward(const Vec<C>* logits, Vec<C>* ids, Vec<C>* weights, Vec<C>* dweights,
                const C* dmean_prob, C per_token, const Vec<C>* dlse, int64_t E, int64_t K,
                Vec<C>* p, Vec<C>* out) const {
    const Vec<C> lse = values<C>(logits, E, p);
    for (int64_t e = 0; e < E; ++e)
      out[e] = dmean_prob ? broadcast(dmean_prob[e] * per_token) : Vec<C>{};
    for (int64_t t = 0; dweights && t < kLanes<C>; ++t) {
      Sum<C> sum, along;  // w = p / z: the part of its gradient along w itself cancels
      for (int64_t j = 0; renormalize && j < K; ++j) {
        along.add(lane<C>(dweights, j, t) * lane<C>(weights, j, t));
        const C id = lane<C>(ids, j, t);
        if (id >= 0) sum.add(lane<C>(p, int64_t(id), t));
      }
      const C z = sum.value == 0 ? 1 : sum.value;
      for (int64_t j = 0; j < K; ++j) {
        const C id = lane<C>(ids, j, t);
        if (id >= 0) lane<C>(out, int64_t(id), t) += (lane<C>(dweights, j, t) - along.value) / z;
      }
    }
    Sum<Vec<C>> mean;
    for (int64_t e = 0; !sigmoid && e < E; ++e) mean.add(p[e] * out[e]);
    for (int64_t e = 0; e < E; ++e) {
      out[e] = sigmoid ? out[e] * p[e] * (1 - p[e]) : p[e] * (out[e] - mean.value);
      if (dlse) out[e] += *dlse * exp_negative(logits[e] - lse);
    }
  }

 private:
  template <class C>
  static Vec<C> logistic(Vec<C> v) {
    const Vec<C> e = exp_negative(v < 0 ? v : -v), one = broadcast(C(1));
    return (v < 0 ? e : one) / (one + e);
  }
};

}  // namespace lora_moe
