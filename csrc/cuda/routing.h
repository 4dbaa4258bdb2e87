// The router's decisions and their gradient, one token per warp:
//
//   logits += router_bias      p = gate(logits)
//   ids = top-k of p + bias    weights = p[ids] (/ their sum)
//
// A lane has experts lane, lane + 32, ..; gates are recomputed from the logits whenever they are
// needed, so that the number of experts is not limited.
#pragma once

#include <cfloat>
#include <climits>

#include "kernels.h"

namespace lora_moe::cuda {

__device__ inline float warp_sum(float v) {
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
  return v;
}

__device__ inline float warp_max(float v) {
  for (int step = 16; step > 0; step /= 2) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, step));
  return v;
}

// Ids that name no expert are empty slots: -1, or an invalid id from the caller.
__device__ inline bool is_expert(int e, int E) { return e >= 0 && e < E; }

// Gates of one token.  As in PyTorch, a NaN among the logits, or an infinite maximum, makes every
// gate of a softmax NaN.
struct Gates {
  const float* logits;
  float shift, z, lse;
  bool sigmoid;

  __device__ Gates(const float* logits_, const Router& router, int lane)
      : logits(logits_), sigmoid(router.sigmoid) {
    float top = -INFINITY, sum = 0.f;
#pragma unroll 1
    for (int e = lane; e < router.E; e += 32) top = fmaxf(top, logits[e]);
    top = warp_max(top);
    shift = isinf(top) ? 0.f : top;
#pragma unroll 1
    for (int e = lane; e < router.E; e += 32) sum += expf(logits[e] - shift);
    sum = warp_sum(sum);
    lse = logf(sum) + shift;
    z = isinf(top) ? NAN : sum;
  }
  __device__ float softmax(int e) const { return expf(logits[e] - shift) / z; }
  __device__ float operator()(int e) const {
    return sigmoid ? 1.f / (1.f + expf(-logits[e])) : softmax(e);
  }
};

struct Candidate {
  float score;
  int id;
  // Ties go to the lower id.
  __device__ bool beats(Candidate other) const {
    return score > other.score || (score == other.score && id < other.id);
  }
};

// The best expert after `last` in picking order; NaN comes after every number.
__device__ inline Candidate next_best(const Gates& gates, const Router& router, Candidate last,
                                      int lane) {
  Candidate best = {-INFINITY, INT_MAX};
#pragma unroll 1
  for (int e = lane; e < router.E; e += 32) {
    const float score = router.bias ? gates(e) + router.bias[e] : gates(e);
    const Candidate here = {isnan(score) ? -INFINITY : score, e};
    if (last.beats(here) && here.beats(best)) best = here;
  }
  for (int step = 16; step > 0; step /= 2) {
    const Candidate other = {__shfl_xor_sync(kAllLanes, best.score, step),
                             __shfl_xor_sync(kAllLanes, best.id, step)};
    if (other.beats(best)) best = other;
  }
  return best;
}

__device__ inline float nonzero(float z) { return z == 0.f ? 1.f : z; }

// Decides for one token and adds to the partial sums of its `group` of tokens, this warp's own.
__device__ inline void route_token(float* logits, const Router& router, const Routing& routing,
                                   int64_t t, int64_t group, int lane) {
  for (int e = lane; router.router_bias && e < router.E; e += 32)
    logits[e] += router.router_bias[e];
  __syncwarp();  // other lanes read them
  const Gates gates(logits, router, lane);
  int32_t* ids = routing.indices + t * router.K;
  float* weights = routing.weights + t * router.K;
  Candidate last = {INFINITY, -1};
  float before = 0.f, kept = 0.f;
#pragma unroll 1
  for (int j = 0; j < router.K; ++j) {
    last = next_best(gates, router, last, lane);
    const float p = gates(last.id);
    const bool dropped = p < router.threshold || before >= router.top_p;
    before += p;
    if (!dropped) kept += p;
    if (lane == 0) {
      ids[j] = dropped ? -1 : last.id;
      weights[j] = dropped ? 0.f : p;
    }
  }
  __syncwarp();  // lane 0 has written
  for (int j = lane; router.renormalize && j < router.K; j += 32) weights[j] /= nonzero(kept);
  if (lane == 0) routing.lse[t] = gates.lse;
#pragma unroll 1
  for (int e = lane; e < router.E; e += 32) {
    routing.prob_partial[group * router.E + e] += gates(e);
    int count = 0;
#pragma unroll 1
    for (int j = 0; j < router.K; ++j) count += ids[j] == e;
    routing.count_partial[group * router.E + e] += count;
  }
}

// Gradient of one token's logits.  With w = p / z, z the sum of the kept gates:
//
//   dp_e = (dw_e - sum of dw w) / z      softmax: dlogits = p (dp - sum of p dp)
//                                        sigmoid: dlogits = p (1 - p) dp
__device__ inline void router_gradient_token(const float* logits, const Router& router,
                                             const Routing& routing, const float* dweights,
                                             const RoutingGrad& aux, int64_t t, int64_t tokens,
                                             float* dlogits, int lane) {
  const int32_t* ids = routing.indices + t * router.K;
  const float* weights = routing.weights + t * router.K;
  float z = 1.f, share = 0.f;
  const bool renormalized = dweights && router.renormalize;
#pragma unroll 1
  for (int j = 0; renormalized && j < router.K; ++j) share += dweights[j] * weights[j];
  const Gates gates(logits, router, lane);
  if (renormalized) {
    z = 0.f;
#pragma unroll 1
    for (int j = 0; j < router.K; ++j)
      if (ids[j] >= 0) z += gates(ids[j]);
    z = nonzero(z);
  }
  const auto dp = [&](int e) {
    float out = aux.mean_prob ? aux.mean_prob[e] / float(tokens) : 0.f;
#pragma unroll 1
    for (int j = 0; dweights && j < router.K; ++j)
      if (ids[j] == e) out += (dweights[j] - share) / z;
    return out;
  };
  float mean = 0.f;
  if (!router.sigmoid) {
#pragma unroll 1
    for (int e = lane; e < router.E; e += 32) mean += gates(e) * dp(e);
    mean = warp_sum(mean);
  }
#pragma unroll 1
  for (int e = lane; e < router.E; e += 32) {
    const float p = gates(e);
    float out = router.sigmoid ? p * (1.f - p) * dp(e) : p * (dp(e) - mean);
    if (aux.lse) out += gates.softmax(e) * aux.lse[t];
    if (aux.logits) out += aux.logits[t * router.E + e];
    dlogits[e] = out;
  }
}

}  // namespace lora_moe::cuda
