// One kernel with two middles:
//
//   forward   [S | logits] = x @ [A | W]^T, then top-k and H = gate(S)
//   backward  G = dy B^T, then dS, H and dlogits
//
// If one block holds all columns of both products, it also does the rank-space work that follows,
// while they are in the nearest cache.  x is read once for router and experts together.
//
// Letters: T tokens, D columns of x, E experts, R rank rows of all experts.
#pragma once

#include <algorithm>

#include "gating.h"
#include "launch.h"
#include "product.h"

namespace lora_moe::cuda {

constexpr int kRouterColumns = 32;  // per block: a warp has experts warp, warp + 8, ..

// Logits of tokens lane and lane + 32 for each of a warp's experts, in fp32 multiply-adds.
template <class T, int BM>
struct RouterSums {
  static constexpr int kRows = BM / 32, kExperts = kRouterColumns / kWarps;
  float sums[kRows][kExperts];

  __device__ RouterSums() {
#pragma unroll
    for (int i = 0; i < kRows * kExperts; ++i) sums[i / kExperts][i % kExperts] = 0.f;
  }

  // One step, summed separately first: the tile's BK columns of x are columns k .. of w.
  template <class Tile, int BK>
  __device__ void add(const T* x, const Rows<float>& w, int first, int E, int64_t k, int64_t end) {
    RouterSums step;
#pragma unroll 1
    for (int c = 0; c < BK; c += 4) {
      Pack<T, 4> xs[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        xs[i] = *reinterpret_cast<const Pack<T, 4>*>(x + (lane_id() + 32 * i) * Tile::kStride + c);
#pragma unroll
      for (int j = 0; j < kExperts; ++j) {
        const int e = first + warp_id() + kWarps * j;
        if (e >= E) break;
        const Pack<float, 4> ws = load_pack<4>(w.row(e), k + c, end, w.aligned);
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
          for (int v = 0; v < 4; ++v)
            step.sums[i][j] = fmaf(widen(xs[i].v[v]), ws.v[v], step.sums[i][j]);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows * kExperts; ++i)
      sums[i / kExperts][i % kExperts] += step.sums[i / kExperts][i % kExperts];
  }

  // f(token, expert, sum)
  template <class F>
  __device__ void each(F f) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kExperts; ++j) f(lane_id() + 32 * i, warp_id() + kWarps * j, sums[i][j]);
  }
};

// The same on the tensor cores, 16 tokens and 16 experts per warp, the weight in three terms.  With
// 32 tokens, two warps compute the same sums.
template <class T, int BM>
struct RouterTerms {
  using Fragment = SplitSums<T, float, T, true, true>;
  Fragment sums;

  static __device__ int token() { return warp_id() / 2 * 16 % BM; }
  static __device__ int expert() { return warp_id() % 2 * 16; }

  __device__ RouterTerms() { sums.zero(); }

  template <class Tile, int BK>
  __device__ void add(const T* x, const Rows<float>& w, int first, int E, int64_t k, int64_t end) {
    if (first + expert() >= E) return;
#pragma unroll
    for (int c = 0; c < BK; c += Fragment::kStep) {
      typename Fragment::LeftFragment left;
      Fragment::load(left, x + token() * Tile::kStride + c, Tile::kStride);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int e = first + expert() + lane_id() / 4 + 8 * j;
        const int64_t column = k + c + lane_id() % 4 * 4;
        typename Fragment::Column right;
        right.split(load_pack<4>(w.row(e < E ? e : 0), column, end, w.aligned));
        sums.add(left, right, j);
      }
    }
  }

  template <class F>
  __device__ void each(F f) const {
    sums.each([&](int i, int j, float sum) { f(token() + i, expert() + j, sum); });
  }
};

// Two blocks share a multiprocessor's registers, unless one needs more than half of them.
template <class T, int BN>
constexpr int kBlocks = BN == 64 || (BN == 128 && kHalf<T>) ? 2 : 1;

// Block (tokens, columns, split).
template <class T, int BM, int BN, class M>
__global__ void __launch_bounds__(kThreads, kBlocks<T, BN>)
    shrink_kernel(Shrink<T> p, M m, bool with_middle) {
  if constexpr (!kServed<T>) return;
  using Dot = Product<T, T, true, true, BM, BN>;
  __shared__ __align__(128) char shared[Dot::kBytes];
  const int64_t first = int64_t(blockIdx.x) * BM;
  const int64_t column = int64_t(blockIdx.y) * BN;
  const int expert = blockIdx.y * kRouterColumns;
  const int64_t begin = blockIdx.z * p.split_size;
  const int64_t end = min(begin + p.split_size, p.columns);

  Dot dot;
  std::conditional_t<kHalf<T>, RouterTerms<T, BM>, RouterSums<T, BM>> router;
  dot.run(p.x, first, p.tokens, p.a, column, p.R, begin, end, shared,
          [&](const T* x, const T*, int64_t k) {
            if constexpr (M::kRouter)
              router.template add<typename Dot::LeftTile, Dot::BK>(x, p.w, expert, p.E, k, end);
          });
  float* s = p.s + blockIdx.z * p.tokens * p.R;
  if (column < p.R)
    dot.write([&](int64_t t) { return s + t * p.R; }, first, p.tokens, column, p.R, shared);
  if constexpr (M::kRouter)
    router.each([&](int i, int j, float sum) {
      const int64_t t = first + i;
      const int e = expert + j;
      if (t < p.tokens && e < p.E) p.logits[(blockIdx.z * p.tokens + t) * p.E + e] = sum;
    });
  if (!with_middle) return;
  __syncthreads();  // S and the logits of this block's tokens are written
  middle_of_block<BM>(m, first);
}

// The middle alone, if S and the logits come from several blocks.
template <class M>
__global__ void __launch_bounds__(kThreads, 4) middle_kernel(M m) {
  middle_of_block<kWarps * kGroup>(m, int64_t(blockIdx.x) * kWarps * kGroup);
}

template <class M>
void launch_middle(const M& m, cudaStream_t stream) {
  if (m.tokens > 0)
    launch("middle", middle_kernel<M>, ceil_div(m.tokens, kWarps * kGroup), kThreads, stream, m);
}

template <int BM, int BN, class T, class M>
void launch_tiles(const Shrink<T>& p, const M* m, cudaStream_t stream) {
  const int64_t across = std::max(ceil_div(p.R, BN), ceil_div(p.E, kRouterColumns));
  const bool fused = m && across == 1 && p.splits() == 1;
  const dim3 grid(ceil_div(p.tokens, BM), across, p.splits());
  launch("shrink", shrink_kernel<T, BM, BN, M>, grid, kThreads, stream, p, m ? *m : M(), fused);
  if (m && !fused) launch_middle(*m, stream);
}

// The narrowest block that holds all rank rows; if none does, they are split over several blocks.
template <class T, class M>
void launch_shrink(const Shrink<T>& p, const M* m, cudaStream_t stream) {
  if (p.tokens == 0) return;
  if (p.R <= 64) return launch_tiles<64, 64>(p, m, stream);
  if (p.R <= 128 || p.R > 256) return launch_tiles<64, 128>(p, m, stream);
  launch_tiles<32, 256>(p, m, stream);
}

}  // namespace lora_moe::cuda
