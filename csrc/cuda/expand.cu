// Expand:  y = base + H @ B (+ H2 @ B2), summed in fp32 and rounded once.
//
// The second pair computes the gradient of x in one pass: dx = dS A + dlogits W; in the router's
// product both operands are fp32.  Reads T*D (base) + (R + R2)*D, writes T*D.
//
// Letters: T tokens, D columns of y, R and R2 rank rows.
#include "kernels.h"
#include "launch.h"
#include "product.h"

namespace lora_moe::cuda {
namespace {

constexpr int BM = 64, BN = 64;

// Neighboring blocks share rows of H, which then stay in the cache.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) expand_kernel(Expand<T> p) {
  if constexpr (!kServed<T>) return;
  using Dot = Product<T, T, true, false, BM, BN>;
  using Wide = Product<float, float, true, false, BM, BN, T>;
  constexpr int kBytes = Dot::kBytes > Wide::kBytes ? Dot::kBytes : Wide::kBytes;
  __shared__ __align__(128) char shared[kBytes];
  const int64_t across = ceil_div(p.columns, BN);
  const int64_t first = blockIdx.x / across * BM, column = blockIdx.x % across * BN;
  const auto nothing = [](const auto*, const auto*, int64_t) {};

  Dot dot;
  Wide wide;
  wide.run(p.h2, first, p.tokens, p.b2, column, p.columns, 0, p.R2, shared, nothing);
  dot.run(p.h, first, p.tokens, p.b, column, p.columns, 0, p.R, shared, nothing);

  const bool aligned = p.columns * sizeof(T) % 16 == 0;
  Dot::each_fragment([&](int i, int j, int r, int c) {
    Pack<float, 8> sums = dot.take(i, j, shared);
    Pack<float, 8> more = {};
    if (p.R2 > 0) more = wide.take(i, j, shared);
    const int64_t t = first + r, d = column + c;
    if (t >= p.tokens) return;
    constexpr int N = 16 / sizeof(T);
#pragma unroll
    for (int q = 0; q < 8; q += N) {
      Pack<T> out = {};
      if (p.base) out = load_pack<N>(p.base.row(t), d + q, p.columns, p.base.aligned);
#pragma unroll
      for (int v = 0; v < N; ++v) {
        const float base = p.base ? widen(out.v[v]) : 0.f;
        out.v[v] = narrow<T>(base + sums.v[q + v] + more.v[q + v]);
      }
      store_pack<N>(p.y + t * p.columns, d + q, p.columns, aligned, out);
    }
  });
}

}  // namespace

template <class T>
void expand(const Expand<T>& p, cudaStream_t stream) {
  if (p.tokens == 0 || p.columns == 0) return;
  launch("expand", expand_kernel<T>, ceil_div(p.columns, BN) * ceil_div(p.tokens, BM), kThreads,
         stream, p);
}

template void expand(const Expand<float>&, cudaStream_t);
template void expand(const Expand<f16>&, cudaStream_t);
template void expand(const Expand<bf16>&, cudaStream_t);

}  // namespace lora_moe::cuda
