// From S to H and back, in rank space, one token per warp:
//
//   H = S g s      dS = G g s      dw_j = s_e * sum over rows r of e of G_r S_r
//
// Only rows of picked experts are accessed; values of other experts, even NaN, have no effect.
#pragma once

#include "product.h"
#include "routing.h"

namespace lora_moe::cuda {

// The weight of expert ids[j] from all slots that name it; 0 rows if slot j is empty, invalid or
// not the first to name it.
struct Slot {
  int first = 0, ranks = 0, saved = 0;
  float gate = 0.f, scale = 0.f;

  __device__ Slot(const Experts& experts, const int32_t* ids, const float* weights, int K, int j) {
    const int e = ids[j];
    if (!is_expert(e, experts.E)) return;
#pragma unroll 1
    for (int i = 0; i < j; ++i)
      if (ids[i] == e) return;
#pragma unroll 1
    for (int i = j; i < K; ++i)
      if (ids[i] == e) gate += weights[i];
    scale = experts.scaling[e];
    gate *= scale;
    first = experts.first(e), ranks = experts.last(e) - first, saved = experts.saved(e);
  }
};

template <class T>
__device__ void fill_zero(T* row, int n, int lane) {
#pragma unroll 1
  for (int i = lane; i < n; i += 32) row[i] = narrow<T>(0.f);
}

template <class T>
__device__ void gate_token(const Middle<T>& m, int64_t t, int lane) {
  const int K = m.router.K;
  const float* s = m.s + t * m.experts.S_columns;
  T* h = m.h + t * m.experts.R;
  fill_zero(h, m.experts.R, lane);
  __syncwarp();  // zeros are written first, and so are the ids and weights
#pragma unroll 1
  for (int j = 0; j < K; ++j) {
    const Slot slot(m.experts, m.routing.indices + t * K, m.routing.weights + t * K, K, j);
#pragma unroll 1
    for (int i = lane; i < slot.ranks; i += 32)
      h[slot.first + i] = narrow<T>(s[slot.saved + i] * slot.gate);
  }
}

// dS and H of one token, and the gradient of each slot's weight.
template <class T>
__device__ void gate_gradient_token(const MiddleGrad<T>& m, int64_t t, int lane) {
  const Experts& experts = m.experts;
  const int K = m.router.K;
  const int32_t* ids = m.routing.indices + t * K;
  const float* weights = m.routing.weights + t * K;
  const float *g = m.g + t * experts.R, *s = m.s + t * experts.S_columns;
  T *ds = m.ds + t * experts.S_columns, *h = m.h + t * experts.R;
  float* dweights = m.dweights + t * K;
  fill_zero(h, experts.R, lane);
  fill_zero(ds, experts.S_columns, lane);
  __syncwarp();  // zeros are written first
#pragma unroll 1
  for (int j = 0; j < K; ++j) {
    const Slot slot(experts, ids, weights, K, j);
    float along = 0.f;
#pragma unroll 1
    for (int i = lane; i < slot.ranks; i += 32) {
      const float g_row = g[slot.first + i], s_row = s[slot.saved + i];
      along += g_row * s_row;
      h[slot.first + i] = narrow<T>(s_row * slot.gate);
      if (!experts.shared_a) ds[slot.saved + i] = narrow<T>(g_row * slot.gate);
    }
    along = warp_sum(along) * slot.scale;
#pragma unroll 1
    for (int i = lane; i < K; i += 32)
      if (slot.ranks > 0 ? ids[i] == ids[j] : i == j && !is_expert(ids[j], experts.E))
        dweights[i] = along;
  }
#pragma unroll 1
  for (int i = lane; experts.shared_a && i < experts.S_columns; i += 32) {
    float sum = 0.f;
#pragma unroll 1
    for (int j = 0; j < K; ++j) {
      const Slot slot(experts, ids, weights, K, j);
      if (slot.ranks > 0) sum += g[slot.first + i] * slot.gate;
    }
    ds[i] = narrow<T>(sum);
  }
}

// The middle of the forward, for the tokens of one group.
template <class T>
__device__ void middle(const Middle<T>& m, int64_t group, int lane) {
  const int E = m.router.E;
  for (int e = lane; m.logits && e < E; e += 32) {
    m.routing.prob_partial[group * E + e] = 0.f;
    m.routing.count_partial[group * E + e] = 0;
  }
#pragma unroll 1
  for (int64_t t = group * kGroup; t < (group + 1) * kGroup && t < m.tokens; ++t) {
    if (m.logits) route_token(m.logits + t * E, m.router, m.routing, t, group, lane);
    if (m.s) gate_token(m, t, lane);
  }
}

// From the gradient of one token's slots to that of its logits, unless the routing was given.
template <class T>
__device__ void route_back(const MiddleGrad<T>& m, int64_t t, int lane) {
  if (!m.logits) return;
  const int E = m.router.E, K = m.router.K;
  float* dweights = m.dweights + t * K;
#pragma unroll 1
  for (int j = lane; m.aux.weights && j < K; j += 32)  // the lane that wrote it
    dweights[j] += m.aux.weights[t * K + j];
  __syncwarp();  // every slot's gradient is complete
  router_gradient_token(m.logits + t * E, m.router, m.routing, dweights, m.aux, t, m.tokens,
                        m.dlogits + t * E, lane);
}

// The middle of the backward, likewise.
template <class T>
__device__ void middle(const MiddleGrad<T>& m, int64_t group, int lane) {
#pragma unroll 1
  for (int64_t t = group * kGroup; t < (group + 1) * kGroup && t < m.tokens; ++t) {
    gate_gradient_token(m, t, lane);
    route_back(m, t, lane);
  }
}

// Tokens first .. first + BM - 1, one group per warp at a time: every warp has one.
template <int BM, class M>
__device__ void middle_of_block(const M& m, int64_t first) {
  static_assert(BM % (kWarps * kGroup) == 0);
#pragma unroll 1
  for (int t = warp_id() * kGroup; t < BM; t += kWarps * kGroup)
    if (first + t < m.tokens) middle(m, (first + t) / kGroup, lane_id());
}

}  // namespace lora_moe::cuda
