// The router for one block of tokens, while its rows are in cache, and the outputs that it fills.
//
// Letters: T tokens, E experts, K picked experts per token.
#pragma once

#include "gating.h"
#include "rows.h"
#include "topk.h"

namespace lora_moe {

// A router's decisions for T tokens from their logits; `finish` adds mean_prob and counts.
template <class C>
struct Decisions {
  Gate gate;
  int64_t tokens, E, K;
  Blocks blocks;
  const C* bias;
  Tensor indices, weights, lse, mean_prob, counts;
  int32_t* ids;  // (T, K), and so on: the memory of the tensors above
  C *weight, *log_sum, *mean;
  int64_t* count;
  std::unique_ptr<C[]> partial_prob;  // (groups, E)
  std::unique_ptr<int64_t[]> partial_count;

  Decisions(int64_t T, int64_t E_, const MaybeTensor& bias_, int64_t top_k, Gate gate_)
      : gate(gate_), tokens(T), E(E_), K(top_k), blocks(tokens, E, K) {
    bias = contiguous<C>("bias", bias_, {E});
    check(K >= 1 && K <= E, "top_k: expected an integer in [1, ", E, "], got ", K);
    ids = mutable_data<int32_t>(indices = empty<int32_t>({tokens, K}));
    weight = mutable_data<C>(weights = empty<C>({tokens, K}));
    log_sum = mutable_data<C>(lse = empty<C>({tokens}));
    mean = mutable_data<C>(mean_prob = empty<C>({E}));
    count = mutable_data<int64_t>(counts = empty<int64_t>({E}));
    partial_prob = uninitialized<C>(groups(tokens) * E);
    partial_count = uninitialized<int64_t>(groups(tokens) * E);
  }

  // ids, weights, lse of tokens [begin, end) from `logit` (T, E), and their terms of the sums; a
  // group starts at `begin`.
  void decide(const C* logit, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t += kGroup) decide_group(logit, t, std::min(end, t + kGroup));
  }

  void finish() {
    std::fill_n(mean, E, C(0));
    std::fill_n(count, E, int64_t(0));
    for (int64_t n = 0; n < groups(tokens); ++n)
      for (int64_t e = 0; e < E; ++e) {
        mean[e] += partial_prob[n * E + e];
        count[e] += partial_count[n * E + e];
      }
    for (int64_t e = 0; tokens > 0 && e < E; ++e) mean[e] /= C(tokens);
  }

 private:
  void decide_group(const C* logit, int64_t begin, int64_t end) {
    constexpr int64_t L = kLanes<C>;
    Room<Vec<C>> memory(4 * E + 2 * K);
    Vec<C>*logits = memory.get(), *p = logits + E, *score = p + E, *sums = score + E;
    Vec<C>*id = sums + E, *picked = id + K;
    C* prob = partial_prob.get() + begin / kGroup * E;
    int64_t* chosen = partial_count.get() + begin / kGroup * E;
    std::fill_n(sums, E, Vec<C>{});
    std::fill_n(chosen, E, int64_t(0));
    for (int64_t t = begin; t < end; t += L) {
      const int64_t n = std::min(L, end - t);
      to_lanes<C>(logit + t * E, n, E, logits);
      const Vec<C> lse = gate.values<C>(logits, E, p);
      store_tail(log_sum + t, lse, n);
      pick<C>(p, bias, E, K, score, id, picked);
      gate.drop<C>(K, id, picked);
      const Vec<C> z = gate.normalizer<C>(picked, K);
      for (int64_t j = 0; j < K; ++j) picked[j] /= z;
      from_lanes<C>(id, n, K, ids + t * K);
      from_lanes<C>(picked, n, K, weight + t * K);
      for (int64_t i = t * K; i < (t + n) * K; ++i)
        if (ids[i] >= 0) ++chosen[ids[i]];
      for (int64_t e = 0; e < E; ++e)
        sums[e] += n == L ? p[e] : load_bytes<Vec<C>>(p + e, n * sizeof(C));
    }
    std::fill_n(prob, E, C(0));
    for (int64_t e = 0; e < E; ++e)
      for (int64_t i = 0; i < L; ++i) prob[e] += lane<C>(sums, e, i);
  }
};

// The same, computing the logits here:  x W^T + router_bias.
template <class T, class RouterWeight>
struct Router : Decisions<acc_t<T>> {
  using C = acc_t<T>;
  using Base = Decisions<C>;
  using Base::E, Base::tokens;
  Rows<const T> x;
  Rows<const RouterWeight> w;
  const C* router_bias;
  int64_t D;
  Tensor logits;
  C* logit;  // (T, E)

  Router(const Tensor& x_, const Tensor& w_, const MaybeTensor& bias,
         const MaybeTensor& router_bias_, int64_t top_k, Gate gate)
      : Base(x_.size(0), w_.size(0), bias, top_k, gate), D(x_.size(1)) {
    x = rows<T>("x", x_, tokens, D);
    w = rows<RouterWeight>("router_weight", w_, E, D);
    router_bias = contiguous<C>("router_bias", router_bias_, {E});
    logit = mutable_data<C>(logits = empty<C>({tokens, E}));
  }

  // Routes tokens [begin, end), a block at the start of a group.
  void block(int64_t begin, int64_t end) {
    multiply(begin, end, 0, E);
    this->decide(logit, begin, end);
  }

  // Routes a few tokens at once: every thread reads its own rows of w.
  void few() {
    static_assert(kFewTokens <= kGroup && kGroup % kLanes<C> == 0);
    for_tasks((E + kTileColumns - 1) / kTileColumns, E * D * sizeof(RouterWeight), [&](int64_t i) {
      multiply(0, tokens, i * kTileColumns, std::min(E, (i + 1) * kTileColumns));
    });
    this->decide(logit, 0, tokens);
  }

 private:
  // logits of tokens [begin, end) and experts [first, last)
  void multiply(int64_t begin, int64_t end, int64_t first, int64_t last) {
    const auto xs = pointers(x.data, x.stride, begin, end);
    const auto out = pointers(logit + first, E, begin, end);
    dot_rows(xs.data(), out.data(), end - begin, w.row(first), w.stride, last - first, D);
    if (!router_bias) return;
    for (C* row : out)
      for (int64_t e = first; e < last; ++e) row[e - first] += router_bias[e];
  }
};

// Gradients that reach the routing from outside the experts; null if there is none.
template <class C>
struct RoutingGrad {
  const C *weights, *logits, *mean_prob, *lse;
  int64_t T, E, K;

  RoutingGrad(const MaybeTensor& dweights, const MaybeTensor& dlogits,
              const MaybeTensor& dmean_prob, const MaybeTensor& dlse, int64_t T_, int64_t E_,
              int64_t K_)
      : weights(contiguous<C>("dweights", dweights, {T_, K_})),
        logits(contiguous<C>("dlogits", dlogits, {T_, E_})),
        mean_prob(contiguous<C>("dmean_prob", dmean_prob, {E_})),
        lse(contiguous<C>("dlse", dlse, {T_})),
        T(T_),
        E(E_),
        K(K_) {}

  // The gradient of the logits of tokens [begin, end) into `out` (T, E), and into `columns` (E, T)
  // if given.  `inner` (T, K), if given, is the experts' part of the gradient of the weights.
  void back(const Gate& gate, int64_t begin, int64_t end, const C* logit, const int32_t* ids,
            const C* weight, const C* inner, C* out, C* columns) const {
    constexpr int64_t L = kLanes<C>;
    Room<Vec<C>> memory(4 * E + 4 * K);
    Vec<C>*l = memory.get(), *p = l + E, *dl = p + E, *outer = dl + E;
    Vec<C>*id = outer + E, *w = id + K, *dw = w + K, *more = dw + K;
    for (int64_t t = begin; t < end; t += L) {
      const int64_t n = std::min(L, end - t);
      to_lanes<C>(logit + t * E, n, E, l);
      to_lanes<C>(ids + t * K, n, K, id);
      to_lanes<C>(weight + t * K, n, K, w);
      std::fill_n(dw, K, Vec<C>{});
      for (const C* from : {weights, inner})
        if (from) {
          to_lanes<C>(from + t * K, n, K, more);
          for (int64_t j = 0; j < K; ++j) dw[j] += more[j];
        }
      const Vec<C> along = lse ? load_tail(lse + t, n) : Vec<C>{};
      gate.backward<C>(l, id, w, weights || inner ? dw : nullptr, mean_prob, C(1) / C(T),
                       lse ? &along : nullptr, E, K, p, dl);
      if (logits) {
        to_lanes<C>(logits + t * E, n, E, outer);
        for (int64_t e = 0; e < E; ++e) dl[e] += outer[e];
      }
      from_lanes<C>(dl, n, E, out + t * E);
      for (int64_t e = 0; columns && e < E; ++e) store_tail(columns + e * T + t, dl[e], n);
    }
  }
};

}  // namespace lora_moe
