// Weight gradients (wgrad):  H^T x
//
//   dA = dS^T x      dB = H^T dy      dW = dlogits^T x
//
// A block owns a tile of ranks and columns over a split of the tokens; the sums of the splits are
// then added in order, so the bits do not depend on the schedule.  An fp32 H keeps all of its bits.
// Reads T*D * ceil(R / BM) + T*R, writes 4*R*D bytes per split.
//
// Letters: T tokens, R rank rows, D columns of x.
#include <algorithm>

#include "kernels.h"
#include "launch.h"
#include "product.h"

namespace lora_moe::cuda {
namespace {

template <class H, class T>
constexpr int BM = std::is_same_v<H, T> ? 64 : 32;  // the router's rows are few
constexpr int BN = 128;
constexpr int kSumThreads = 256;

// Block (columns, ranks, split).
template <class H, class T>
__global__ void __launch_bounds__(kThreads, 2) wgrad_kernel(Wgrad<H, T> p) {
  if constexpr (!kServed<T>) return;
  using Dot = Product<H, T, false, false, BM<H, T>, BN>;
  __shared__ __align__(128) char shared[Dot::kBytes];
  const int64_t column = int64_t(blockIdx.x) * BN, rank = int64_t(blockIdx.y) * BM<H, T>;
  const int64_t begin = blockIdx.z * p.split_size, end = min(begin + p.split_size, p.tokens);
  Dot dot;
  dot.run(p.h, rank, p.R, p.x, column, p.columns, begin, end, shared,
          [](const H*, const T*, int64_t) {});
  float* out = p.partial + blockIdx.z * p.R * p.columns;
  dot.write([&](int64_t r) { return out + r * p.columns; }, rank, p.R, column, p.columns, shared);
}

template <class T>
__global__ void __launch_bounds__(kSumThreads)
    add_splits_kernel(const float* partial, int64_t count, int64_t n, T* out) {
  const int64_t i = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  if (i >= n) return;
  float sum = 0.f;
  for (int64_t split = 0; split < count; ++split) sum += partial[split * n + i];
  out[i] = narrow<T>(sum);
}

}  // namespace

// Tokens per block: about 256 blocks, each of at least 256 tokens.
int64_t wgrad_split_size(int64_t tokens, int64_t columns, int R) {
  const int64_t blocks = ceil_div(columns, BN) * ceil_div(R, 64);
  const int64_t splits = std::max<int64_t>(1, std::min(256 / blocks, tokens / 256));
  return ceil_div(ceil_div(tokens, splits), 32) * 32;
}

template <class H, class T>
void wgrad(const Wgrad<H, T>& p, cudaStream_t stream) {
  const dim3 grid(ceil_div(p.columns, BN), ceil_div(p.R, BM<H, T>),
                  ceil_div(p.tokens, p.split_size));
  launch("wgrad", wgrad_kernel<H, T>, grid, kThreads, stream, p);
}

template <class T>
void add_splits(const float* partial, int64_t count, int64_t n, T* out, cudaStream_t stream) {
  if (n > 0)
    launch("add_splits", add_splits_kernel<T>, ceil_div(n, kSumThreads), kSumThreads, stream,
           partial, count, n, out);
}

template void wgrad(const Wgrad<float, float>&, cudaStream_t);
template void wgrad(const Wgrad<float, f16>&, cudaStream_t);
template void wgrad(const Wgrad<float, bf16>&, cudaStream_t);
template void wgrad(const Wgrad<f16, f16>&, cudaStream_t);
template void wgrad(const Wgrad<bf16, bf16>&, cudaStream_t);
template void add_splits(const float*, int64_t, int64_t, float*, cudaStream_t);
template void add_splits(const float*, int64_t, int64_t, f16*, cudaStream_t);
template void add_splits(const float*, int64_t, int64_t, bf16*, cudaStream_t);

}  // namespace lora_moe::cuda
