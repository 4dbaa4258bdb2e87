// Sorts each slot's tokens by expert, without host synchronization:
//
//   order (K, T), starts (K, E + 2)
//
// A block owns one expert of one slot.  It counts the tokens of lower experts, which gives the
// start of its own, and then writes its own in ascending order.  Reads 8*T*K*(E + 1) bytes, nearly
// all from cache.
//
// Letters: T tokens, E experts, K slots per token.
#include "launch.h"
#include "routing.h"

namespace lora_moe::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// The expert of a slot, or E if it has none.
__device__ int expert_of(const int32_t* indices, int64_t t, int K, int j, int E) {
  const int e = indices[t * K + j];
  return is_expert(e, E) ? e : E;
}

// Sum over the block, the same in every thread; uses `shared` as scratch.
__device__ int block_sum(int v, int* shared) {
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();  // all warps have written
  int sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += shared[w];
  return sum;
}

__global__ void __launch_bounds__(kThreads) sort_slots_kernel(Segments p, const int32_t* indices) {
  __shared__ int counts[kWarps];
  const int e = blockIdx.x, j = blockIdx.y, E = p.experts.E;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t* order = p.order + j * p.tokens;
  int32_t* starts = p.starts + int64_t(j) * (E + 2);

  int lower = 0;
  for (int64_t t = threadIdx.x; t < p.tokens; t += kThreads)
    lower += expert_of(indices, t, p.K, j, E) < e;
  int64_t next = block_sum(lower, counts);
  if (threadIdx.x == 0) starts[e] = next;
  if (threadIdx.x == 0 && e == E) starts[E + 1] = p.tokens;

  for (int64_t first = 0; first < p.tokens; first += kThreads) {
    const int64_t t = first + threadIdx.x;
    const bool mine = t < p.tokens && expert_of(indices, t, p.K, j, E) == e;
    const unsigned lanes = __ballot_sync(kAllLanes, mine);
    __syncthreads();  // the previous counts have been read
    if (lane == 0) counts[warp] = __popc(lanes);
    __syncthreads();  // all warps have written
    int before = __popc(lanes & ((1u << lane) - 1)), all = 0;
    for (int w = 0; w < kWarps; ++w) {
      before += w < warp ? counts[w] : 0;
      all += counts[w];
    }
    if (mine) order[next + before] = t;
    next += all;
  }
}

}  // namespace

void sort_slots(const Segments& p, const int32_t* indices, cudaStream_t stream) {
  launch("sort_slots", sort_slots_kernel, dim3(p.experts.E + 1, p.K), kThreads, stream, p, indices);
}

}  // namespace lora_moe::cuda
