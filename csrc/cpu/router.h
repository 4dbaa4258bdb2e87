// Router of one block of tokens, while its rows are in cache, and the outputs it fills.
#pragma once

#include "gating.h"
#include "rows.h"

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
  Blocks blocks;
  Tensor indices, weights, logits, lse, mean_prob, counts;
  int32_t* ids;  // (T, K), and so on: the memory of these
  C *weight, *logit, *log_sum, *mean;
  int64_t* count;
  std::unique_ptr<C[]> partial_prob;  // (blocks, E)
  std::unique_ptr<int64_t[]> partial_count;

  Router(const Tensor& x_, const Tensor& w_, const MaybeTensor& bias_, int64_t top_k, Gate gate_)
      : gate(gate_),
        tokens(x_.size(0)),
        D(x_.size(1)),
        E(w_.size(0)),
        K(top_k),
        blocks(tokens, E, K) {
    x = rows<T>("x", x_, tokens, D);
    w = rows<W>("router_weight", w_, E, D);
    bias = contiguous<C>("bias", bias_, {E});
    check(K >= 1 && K <= E, "top_k: expected an integer in [1, ", E, "], got ", K);
    ids = mutable_data<int32_t>(indices = empty<int32_t>({tokens, K}));
    weight = mutable_data<C>(weights = empty<C>({tokens, K}));
    logit = mutable_data<C>(logits = empty<C>({tokens, E}));
    log_sum = mutable_data<C>(lse = empty<C>({tokens}));
    mean = mutable_data<C>(mean_prob = empty<C>({E}));
    count = mutable_data<int64_t>(counts = empty<int64_t>({E}));
    partial_prob = uninitialized<C>(blocks.count() * E);
    partial_count = uninitialized<int64_t>(blocks.count() * E);
  }

  // Routes tokens [begin, end): logits, ids, weights, lse, and this block's share of the sums.
  void block(int64_t number, int64_t begin, int64_t end) {
    multiply(begin, end, 0, E);
    decide(number, begin, end);
  }

  // Routes all of a few tokens: every thread reads its own rows of w.
  void few() {
    for_tasks((E + kTileColumns - 1) / kTileColumns, E * D * sizeof(W), [&](int64_t i) {
      multiply(0, tokens, i * kTileColumns, std::min(E, (i + 1) * kTileColumns));
    });
    if (tokens > 0) decide(0, 0, tokens);
  }

  void finish() {
    std::fill_n(mean, E, C(0));
    std::fill_n(count, E, int64_t(0));
    for (int64_t n = 0; n < blocks.count(); ++n)
      for (int64_t e = 0; e < E; ++e) {
        mean[e] += partial_prob[n * E + e];
        count[e] += partial_count[n * E + e];
      }
    for (int64_t e = 0; tokens > 0 && e < E; ++e) mean[e] /= C(tokens);
  }

 private:
  // logits of tokens [begin, end) and experts [first, last)
  void multiply(int64_t begin, int64_t end, int64_t first, int64_t last) {
    const auto xs = pointers(x.data, x.stride, begin, end);
    const auto out = pointers(logit + first, E, begin, end);
    dot_rows(xs.data(), out.data(), end - begin, w.row(first), w.stride, last - first, D);
  }

  void decide(int64_t number, int64_t begin, int64_t end) {
    const auto scratch = uninitialized<C>(2 * padded<C>(E));
    C *p = scratch.get(), *score = p + padded<C>(E);
    C* prob = partial_prob.get() + number * E;
    int64_t* picked = partial_count.get() + number * E;
    std::fill_n(prob, E, C(0));
    std::fill_n(picked, E, int64_t(0));
    for (int64_t t = begin; t < end; ++t) {
      int32_t* id = ids + t * K;
      log_sum[t] = gate.values(logit + t * E, E, p);
      gate.pick(p, bias, E, K, score, id);
      gate.drop(p, K, id);
      const C z = gate.normalizer(p, id, K);
      for (int64_t j = 0; j < K; ++j) {
        weight[t * K + j] = id[j] < 0 ? C(0) : p[id[j]] / z;
        if (id[j] >= 0) ++picked[id[j]];
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
