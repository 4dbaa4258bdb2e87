// The router's middle, one token at a time:  p = gate(logits),  ids = top-k of p + bias,
// weights = p[ids] (/ their sum),  and its gradient.  A picked expert may be dropped: its id is -1.
#pragma once

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

struct Gate {
  bool sigmoid;
  bool renormalize;
  double top_p, threshold;

  Gate(const std::string& name, bool renorm, double top = std::numeric_limits<double>::infinity(),
       double least = 0)
      : sigmoid(name == "sigmoid"), renormalize(renorm), top_p(top), threshold(least) {
    check(sigmoid || name == "softmax", "gate: expected softmax or sigmoid, got ", name);
  }

  // p (E,) of logits (E,); returns logsumexp of the logits.
  template <class C>
  C values(const C* logits, int64_t E, C* p) const {
    C top = -std::numeric_limits<C>::infinity(), sum = 0;
    for (int64_t e = 0; e < E; ++e) top = logits[e] > top ? logits[e] : top;
    for (int64_t e = 0; e < E; ++e) sum += p[e] = std::exp(logits[e] - top);
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
  // `score` (E,) is scratch.  Ids are distinct and in range whatever the values are.
  template <class C>
  void pick(const C* p, const C* bias, int64_t E, int64_t K, C* score, char* taken,
            int32_t* ids) const {
    for (int64_t e = 0; e < E; ++e) {
      score[e] = bias ? p[e] + bias[e] : p[e];
      if (std::isnan(score[e])) score[e] = -std::numeric_limits<C>::infinity();
      taken[e] = 0;
    }
    for (int64_t j = 0; j < K; ++j) {
      int64_t best = -1;
      for (int64_t e = 0; e < E; ++e)
        if (!taken[e] && (best < 0 || score[e] > score[best])) best = e;
      taken[best] = 1;
      ids[j] = int32_t(best);
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
  // null pointers are zeros.  `p` and `dp` (E,) are scratch, out (E,) may not alias them.
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
