// The experts and the router of an operator call, checked and in the form that kernels take.
//
// Letters: T tokens, E experts, K slots per token, R rank rows of all experts.
#pragma once

#include <algorithm>

#include "tensors.h"

namespace lora_moe::cuda {

inline Router router_of(const std::string& gate, bool renormalize, int64_t E, int64_t K,
                        double top_p = 0, double threshold = 0) {
  check(gate == "softmax" || gate == "sigmoid", "gate: expected softmax or sigmoid, got ", gate);
  check(K >= 1, "top_k: expected an integer in [1, ", E, "], got ", K);
  Router router;
  router.E = E, router.K = K;
  router.sigmoid = gate == "sigmoid", router.renormalize = renormalize;
  router.top_p = top_p, router.threshold = threshold;
  return router;
}

inline void add_biases(Router& router, const MaybeTensor& bias, const MaybeTensor& router_bias,
                       const Tensor& x) {
  router.bias = contiguous<float>("bias", bias, x, {router.E});
  router.router_bias = contiguous<float>("router_bias", router_bias, x, {router.E});
}

// A router's outputs: indices, weights and lse per token; `finish` adds mean_prob and counts.
// The caller that computes the logits allocates them.
struct RouterResults {
  Tensor indices, weights, logits, mean_prob, lse, counts, prob_partial, count_partial;
  Routing routing;

  RouterResults(const Tensor& x, int64_t E, int64_t K) {
    const int64_t T = x.size(0), groups = ceil_div(T, kGroup);
    indices = empty<int32_t>(x, {T, K});
    weights = empty<float>(x, {T, K});
    mean_prob = empty<float>(x, {E});
    lse = empty<float>(x, {T});
    counts = empty<int64_t>(x, {E});
    prob_partial = empty<float>(x, {groups, E});
    count_partial = empty<int32_t>(x, {groups, E});
    routing = {mutable_data<int32_t>(indices), mutable_data<float>(weights),
               mutable_data<float>(lse), mutable_data<float>(prob_partial),
               mutable_data<int32_t>(count_partial)};
  }
  void finish(cudaStream_t stream) {
    router_totals(routing, lse.size(0), counts.size(0), mutable_data<float>(mean_prob),
                  mutable_data<int64_t>(counts), stream);
  }
};

// The router by itself: logits, decisions and totals.
RouterResults route(const Tensor& x, const Tensor& w, const MaybeTensor& bias,
                    const MaybeTensor& router_bias, const Router& router, cudaStream_t stream);

// A read-only routing of T tokens.
inline Routing routing_of(const Tensor& indices, const Tensor& weights, const Tensor& like,
                          int64_t tokens) {
  const Ints shape = {tokens, indices.size(1)};
  Routing routing;
  routing.indices = const_cast<int32_t*>(contiguous<int32_t>("indices", indices, like, shape));
  routing.weights = const_cast<float*>(contiguous<float>("weights", weights, like, shape));
  return routing;
}

inline Routing routing_of(const Tensor& indices, const Tensor& weights, const Tensor& like) {
  return routing_of(indices, weights, like, like.size(0));
}

// Gradients of the routing, made contiguous: PyTorch's are often a single expanded number.
struct RoutingGradTensors {
  MaybeTensor weights, logits, mean_prob, lse;
  RoutingGrad grad;

  RoutingGradTensors(const MaybeTensor& dweights, const MaybeTensor& dlogits,
                     const MaybeTensor& dmean_prob, const MaybeTensor& dlse, const Tensor& like,
                     int64_t K)
      : weights(dense(dweights)),
        logits(dense(dlogits)),
        mean_prob(dense(dmean_prob)),
        lse(dense(dlse)) {
    const int64_t T = like.size(0), E = like.size(1);
    grad.weights = contiguous<float>("dweights", weights, like, {T, K});
    grad.logits = contiguous<float>("dlogits", logits, like, {T, E});
    grad.mean_prob = contiguous<float>("dmean_prob", mean_prob, like, {E});
    grad.lse = contiguous<float>("dlse", lse, like, {T});
  }

 private:
  static MaybeTensor dense(const MaybeTensor& t) {
    return t ? MaybeTensor(torch::stable::contiguous(*t)) : t;
  }
};

// Experts with the table of their rows on the device; equal ranks need none.
struct ExpertRows {
  Experts experts;
  MaybeTensor table;
  int max_rank = 0;

  ExpertRows(const Ints& offsets, bool shared_a, const Tensor& scaling, const Tensor& x,
             cudaStream_t stream) {
    const int64_t E = int64_t(offsets.size()) - 1;
    check(E >= 1 && offsets[0] == 0, "offsets: expected one more than experts, 0 first");
    bool equal = true;
    for (int64_t e = 0; e < E; ++e) {
      const int64_t rank = offsets[e + 1] - offsets[e];
      check(rank > 0, "offsets: expected ascending rows, got rank ", rank, " at expert ", e);
      max_rank = std::max<int>(max_rank, rank);
      equal = equal && rank == offsets[1];
    }
    check(equal || !shared_a, "offsets: expected equal ranks with a shared A");
    experts.scaling = contiguous<float>("scaling", scaling, x, {E});
    experts.E = E, experts.R = offsets[E], experts.rank = max_rank;
    experts.shared_a = shared_a;
    experts.S_columns = shared_a ? max_rank : experts.R;
    if (equal) return;
    table = empty<int32_t>(x, {E + 1});
    write_table(offsets.data(), E + 1, mutable_data<int32_t>(*table), stream);
    experts.offsets = mutable_data<int32_t>(*table);
  }
};

}  // namespace lora_moe::cuda
