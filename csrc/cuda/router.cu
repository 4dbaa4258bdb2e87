// The rest of the router: sums over all tokens, and the gradient of the logits on its own.
//
// Letters: T tokens, E experts, K slots per token.
#include "launch.h"
#include "routing.h"

namespace lora_moe::cuda {
namespace {

constexpr int kSumThreads = 256;
constexpr int kTable = 512;  // numbers passed in one launch's arguments

// mean_prob and counts of the block's expert, summed per thread and then over threads in fixed
// order.
__global__ void __launch_bounds__(kSumThreads)
    router_totals_kernel(Routing routing, int64_t tokens, int E, float* mean_prob,
                         int64_t* counts) {
  __shared__ float probs[kSumThreads];
  __shared__ int64_t numbers[kSumThreads];
  const int e = blockIdx.x, i = threadIdx.x;
  float prob = 0.f;
  int64_t number = 0;
  for (int64_t group = i; group < ceil_div(tokens, kGroup); group += kSumThreads) {
    prob += routing.prob_partial[group * E + e];
    number += routing.count_partial[group * E + e];
  }
  probs[i] = prob;
  numbers[i] = number;
  for (int step = kSumThreads / 2; step > 0; step /= 2) {
    __syncthreads();  // all sums of the previous level are written
    if (i >= step) continue;
    probs[i] += probs[i + step];
    numbers[i] += numbers[i + step];
  }
  if (i > 0) return;
  mean_prob[e] = tokens > 0 ? probs[0] / float(tokens) : 0.f;
  counts[e] = numbers[0];
}

// One token per warp.
__global__ void __launch_bounds__(kSumThreads)
    router_gradient_kernel(Router router, Routing routing, RoutingGrad aux, const float* logits,
                           int64_t tokens, float* dlogits) {
  const int64_t t = int64_t(blockIdx.x) * (kSumThreads / 32) + threadIdx.x / 32;
  if (t >= tokens) return;
  const float* dweights = aux.weights ? aux.weights + t * router.K : nullptr;
  router_gradient_token(logits + t * router.E, router, routing, dweights, aux, t, tokens,
                        dlogits + t * router.E, threadIdx.x % 32);
}

struct Values {
  int32_t v[kTable];
};

__global__ void write_table_kernel(Values values, int n, int32_t* table) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) table[i] = values.v[i];
}

}  // namespace

void router_totals(const Routing& routing, int64_t tokens, int E, float* mean_prob, int64_t* counts,
                   cudaStream_t stream) {
  launch("router_totals", router_totals_kernel, E, kSumThreads, stream, routing, tokens, E,
         mean_prob, counts);
}

void router_gradient(const Router& router, const Routing& routing, const RoutingGrad& aux,
                     const float* logits, int64_t tokens, float* dlogits, cudaStream_t stream) {
  if (tokens > 0)
    launch("router_gradient", router_gradient_kernel, ceil_div(tokens, kSumThreads / 32),
           kSumThreads, stream, router, routing, aux, logits, tokens, dlogits);
}

void write_table(const int64_t* values, int64_t n, int32_t* table, cudaStream_t stream) {
  for (int64_t i = 0; i < n; i += kTable) {
    const int some = n - i < kTable ? n - i : kTable;
    Values chunk = {};
    for (int j = 0; j < some; ++j) chunk.v[j] = values[i + j];
    launch("write_table", write_table_kernel, 1, kSumThreads, stream, chunk, some, table + i);
  }
}

}  // namespace lora_moe::cuda
