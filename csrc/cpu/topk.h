// ids of the K largest of p + bias, largest first: ties to the lower id, NaN after everything else.
//
// Distinct and in range for any values.  For small K they are found one after another, for kLanes
// tokens at a time, in E K steps; otherwise each token's E are partitioned and its K sorted.
//
// Letters: E experts, K picked experts per token.
#pragma once

#include "gating.h"

namespace lora_moe {

constexpr int64_t kFewPicks = 32;

// `score` (E) is scratch: NaN once an expert has been picked.  `picked` (K) gets p of the ids.
template <class C>
inline void pick_few(const Vec<C>* p, int64_t E, int64_t K, Vec<C>* score, Vec<C>* ids,
                     Vec<C>* picked) {
  const Vec<C> least = broadcast(-std::numeric_limits<C>::infinity());
  const Vec<C> taken = broadcast(std::numeric_limits<C>::quiet_NaN());
  const Vec<C> none = broadcast(C(-1));
  for (int64_t j = 0; j < K; ++j) {
    Vec<C> best = least, id = none, value = {};
    for (int64_t e = 0; e < E; ++e) {
      const Vec<C> number = broadcast(C(e));
      if (j > 0) score[e] = ids[j - 1] == number ? taken : score[e];
      const auto better = (score[e] > best) | ((id < 0) & (score[e] == score[e]));
      best = better ? score[e] : best;
      id = better ? number : id;
      value = better ? p[e] : value;
    }
    ids[j] = id;
    picked[j] = value;
  }
}

template <class C>
inline void pick_many(Vec<C>* p, int64_t E, int64_t K, Vec<C>* score, Vec<C>* ids, Vec<C>* picked) {
  Room<int32_t> order(E);
  Room<C> scores(E);
  int32_t* const first = order.get();
  C* const s = scores.get();
  const auto before = [s](int32_t a, int32_t b) { return s[a] > s[b] || (s[a] == s[b] && a < b); };
  for (int64_t t = 0; t < kLanes<C>; ++t) {
    for (int64_t e = 0; e < E; ++e) first[e] = int32_t(e), s[e] = lane<C>(score, e, t);
    if (K < E) std::nth_element(first, first + K, first + E, before);
    std::sort(first, first + K, before);
    for (int64_t j = 0; j < K; ++j) {
      lane<C>(ids, j, t) = C(first[j]);
      lane<C>(picked, j, t) = lane<C>(p, first[j], t);
    }
  }
}

template <class C>
inline void pick(Vec<C>* p, const C* bias, int64_t E, int64_t K, Vec<C>* score, Vec<C>* ids,
                 Vec<C>* picked) {
  const Vec<C> least = broadcast(-std::numeric_limits<C>::infinity());
  for (int64_t e = 0; e < E; ++e) {
    const Vec<C> s = bias ? p[e] + broadcast(bias[e]) : p[e];
    score[e] = s == s ? s : least;
  }
  if (K <= kFewPicks)
    pick_few<C>(p, E, K, score, ids, picked);
  else
    pick_many<C>(p, E, K, score, ids, picked);
}

}  // namespace lora_moe
