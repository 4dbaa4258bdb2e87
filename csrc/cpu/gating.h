// The router's middle, one token at a time:  p = gate(logits),  ids = top-k of p + bias,
// weights = p[ids] (/ their sum),  and its gradient.  A picked expert may be dropped: its id is -1.
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

// Numbers in whole vectors for E of them.
template <class C>
constexpr int64_t padded(int64_t E) {
  return (E + kLanes<C> - 1) / kLanes<C> * kLanes<C>;
}

// The largest of E scores, none of them +inf or all of them NaN; NaN is passed over.
template <class C>
inline C largest(const C* score, int64_t E) {
  Vec<C> top = broadcast(-std::numeric_limits<C>::infinity());
  for (int64_t e = 0; e < E; e += kLanes<C>) {
    const Vec<C> s = load(score + e);
    top = s > top ? s : top;
  }
  C best = top[0];
  for (int i = 1; i < kLanes<C>; ++i) best = std::max(best, top[i]);
  return best;
}

struct Gate {
  bool sigmoid;
  bool renormalize;
  double top_p, threshold;

  Gate(const std::string& name, bool renorm, double top = std::numeric_limits<double>::infinity(),
       double least = 0)
      : sigmoid(name == "sigmoid"), renormalize(renorm), top_p(top), threshold(least) {
    check(sigmoid || name == "softmax", "gate: expected softmax or sigmoid, got ", name);
  }

  // p (E,) of logits (E,), in memory of padded(E); returns logsumexp of the logits.
  template <class C>
  C values(const C* logits, int64_t E, C* p) const {
    C top = -std::numeric_limits<C>::infinity(), sum = 0;
    for (int64_t e = 0; e < E; ++e) top = logits[e] > top ? logits[e] : top;
    for (int64_t e = 0; e < E; e += kLanes<C>) {
      const Vec<C> l = load_tail(logits + e, std::min<int64_t>(kLanes<C>, E - e));
      store(p + e, exp_negative(l - broadcast(top)));
    }
    for (int64_t e = 0; e < E; ++e) sum += p[e];
    for (int64_t e = 0; e < E; ++e) p[e] = sigmoid ? 1 / (1 + std::exp(-logits[e])) : p[e] / sum;
    return top + std::log(sum);
  }

  // Gates that all underflowed stay zero instead of turning into 0 / 0.
  template <class C>
  C normalizer(const C* p, const int32_t* ids, int64_t K) const {
    if (!renormalize) return 1;
    C sum = 0;
    for (int64_t j = 0; j < K; ++j)
      if (ids[j] >= 0) sum += p[ids[j]];
    return sum == 0 ? 1 : sum;
  }

  // The K largest of p + bias, largest first: ties to the lower id, NaN after everything else.
  // `score`, in memory of padded(E), is scratch: NaN where an expert has been taken.
  // Ids are distinct and in range whatever the values are.
  template <class C>
  void pick(const C* p, const C* bias, int64_t E, int64_t K, C* score, int32_t* ids) const {
    constexpr C least = -std::numeric_limits<C>::infinity();
    constexpr C taken = std::numeric_limits<C>::quiet_NaN();
    for (int64_t e = 0; e < E; ++e) {
      score[e] = bias ? p[e] + bias[e] : p[e];
      if (std::isnan(score[e])) score[e] = least;
    }
    std::fill(score + E, score + padded<C>(E), taken);
    for (int64_t j = 0; j < K; ++j) {
      const C best = largest(score, E);
      const int64_t e = std::find(score, score + E, best) - score;
      score[e] = taken;
      ids[j] = int32_t(e);
    }
  }

  // Drops picked experts with p < threshold, and those before which p already sums to top_p.
  template <class C>
  void drop(const C* p, int64_t K, int32_t* ids) const {
    C before = 0;
    for (int64_t j = 0; j < K; ++j) {
      const C value = p[ids[j]];
      if (value < C(threshold) || before >= C(top_p)) ids[j] = -1;
      before += value;
    }
  }

  // Gradient of the logits from those of weights (K), p (E), lse and the logits themselves;
  // null pointers are zeros.  `p` and `dp`, in memory of padded(E), are scratch, not out (E,)
  // itself.
  template <class C>
  void backward(const C* logits, const int32_t* ids, const C* weights, const C* dweights,
                const C* dmean_prob, C per_token, const C* dlse, const C* dlogits, int64_t E,
                int64_t K, C* p, C* dp, C* out) const {
    const C lse = values(logits, E, p);
    for (int64_t e = 0; e < E; ++e) dp[e] = dmean_prob ? dmean_prob[e] * per_token : 0;
    if (dweights) {
      const C z = normalizer(p, ids, K);
      C along = 0;  // w = p / z: the part of its gradient along w itself cancels
      for (int64_t j = 0; renormalize && j < K; ++j) along += dweights[j] * weights[j];
      for (int64_t j = 0; j < K; ++j)
        if (ids[j] >= 0) dp[ids[j]] += (dweights[j] - along) / z;
    }
    C mean = 0;
    for (int64_t e = 0; !sigmoid && e < E; ++e) mean += p[e] * dp[e];
    for (int64_t e = 0; e < E; ++e) {
      out[e] = sigmoid ? dp[e] * p[e] * (1 - p[e]) : p[e] * (dp[e] - mean);
      if (dlse) out[e] += *dlse * std::exp(logits[e] - lse);
      if (dlogits) out[e] += dlogits[e];
    }
  }
};

}  // namespace lora_moe
