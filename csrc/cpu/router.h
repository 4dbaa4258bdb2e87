// Router of one block of tokens, while its rows are in cache, and the outputs it fills.
#pragma once

#include "gating.h"
#include "tiles.h"

namespace lora_moe {

// The operands and results of a router over T tokens; mean_prob and counts come from `finish`.
template <class T, class W>
struct Router {
  using C = acc_t<T>;
  Gate gate;
  Rows<const T> x;
  Rows<const W> w;
  const C* bias;
  int64_t tokens, D, E, K;
  Tensor indices, weights, logits, lse, mean_prob, counts, partial_prob, partial_counts;

  Router(const Tensor& x_, const Tensor& w_, const MaybeTensor& bias_, int64_t top_k, Gate gate_)
      : gate(gate_), tokens(x_.size(0)), D(x_.size(1)), E(w_.size(0)), K(top_k) {
    x = rows<T>("x", x_, tokens, D);
    w = rows<W>("router_weight", w_, E, D);
    bias = contiguous<C>("bias", bias_, {E});
    check(K >= 1 && K <= E, "top_k: expected an integer in [1, ", E, "], got ", K);
    indices = empty<int32_t>(x_, {tokens, K});
    weights = empty<C>(x_, {tokens, K});
    logits = empty<C>(x_, {tokens, E});
    lse = empty<C>(x_, {tokens});
    mean_prob = empty<C>(x_, {E});
    counts = empty<int64_t>(x_, {E});
    partial_prob = empty<C>(x_, {count_blocks(tokens), E});
    partial_counts = empty<int64_t>(x_, {count_blocks(tokens), E});
  }

  // Routes tokens [begin, end): logits, ids, weights, lse, and this block's share of the sums.
  void block(int64_t number, int64_t begin, int64_t end) {
    std::vector<const T*> xs(end - begin);
    std::vector<C*> out(end - begin);
    for (int64_t t = begin; t < end; ++t) {
      xs[t - begin] = x.row(t);
      out[t - begin] = mutable_data<C>(logits) + t * E;
    }
    dot_rows(xs.data(), out.data(), end - begin, w.data, w.stride, E, D);
    decide(number, begin, end);
  }

  void finish() {
    C* mean = mutable_data<C>(mean_prob);
    int64_t* count = mutable_data<int64_t>(counts);
    std::fill_n(mean, E, C(0));
    std::fill_n(count, E, int64_t(0));
    for (int64_t n = 0; n < count_blocks(tokens); ++n)
      for (int64_t e = 0; e < E; ++e) {
        mean[e] += mutable_data<C>(partial_prob)[n * E + e];
        count[e] += mutable_data<int64_t>(partial_counts)[n * E + e];
      }
    for (int64_t e = 0; tokens > 0 && e < E; ++e) mean[e] /= C(tokens);
  }

 private:
  void decide(int64_t number, int64_t begin, int64_t end) {
    std::vector<C> scratch(2 * E);
    std::vector<char> taken(E);
    C *p = scratch.data(), *score = p + E;
    C* prob = mutable_data<C>(partial_prob) + number * E;
    int64_t* count = mutable_data<int64_t>(partial_counts) + number * E;
    std::fill_n(prob, E, C(0));
    std::fill_n(count, E, int64_t(0));
    for (int64_t t = begin; t < end; ++t) {
      int32_t* ids = mutable_data<int32_t>(indices) + t * K;
      C* weight = mutable_data<C>(weights) + t * K;
      mutable_data<C>(lse)[t] = gate.values(mutable_data<C>(logits) + t * E, E, p);
      gate.pick(p, bias, E, K, score, taken.data(), ids);
      gate.drop(p, K, ids);
      const C z = gate.normalizer(p, ids, K);
      for (int64_t j = 0; j < K; ++j) {
        weight[j] = ids[j] < 0 ? C(0) : p[ids[j]] / z;
        if (ids[j] >= 0) ++count[ids[j]];
      }
      for (int64_t e = 0; e < E; ++e) prob[e] += p[e];
    }
  }
};

// Gradients that reach the routing from outside the experts; null where there is none.
template <class C>
struct RoutingGrad {
  const C *weights, *logits, *mean_prob, *lse;

  RoutingGrad(const MaybeTensor& dweights, const MaybeTensor& dlogits,
              const MaybeTensor& dmean_prob, const MaybeTensor& dlse, int64_t T, int64_t E,
              int64_t K)
      : weights(contiguous<C>("dweights", dweights, {T, K})),
        logits(contiguous<C>("dlogits", dlogits, {T, E})),
        mean_prob(contiguous<C>("dmean_prob", dmean_prob, {E})),
        lse(contiguous<C>("dlse", dlse, {T})) {}
};

}  // namespace lora_moe
