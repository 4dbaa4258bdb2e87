// The products of the segmented plan: a tile of tokens that share an expert uses its rows only.
//
//   shrink  S_j = x A_e^T    expand  y = base + sum over slots j of H_j B_e    wgrad  dB_e = H^T x
//
// A tile's rows of x are gathered through `order`.  Tiles are located, not counted: list e starts
// at tile starts[e] / 64 + e, which leaves room for a partial tile after every list.  The slots of
// y run one after another with their sums in fp32, so a number is rounded once and the order is
// fixed.
//
// Letters: T tokens, E experts, K slots per token, R rank rows, D columns.
#include "gating.h"
#include "launch.h"
#include "product.h"

namespace lora_moe::cuda {
namespace {

// The tokens of one block: `count` of them, of expert e, or of none if e is E.
struct TileOfList {
  const int32_t* tokens;
  int e;
  int64_t count;

  __device__ TileOfList(const Segments& p, int64_t tile, int j) {
    const int32_t* starts = p.starts + int64_t(j) * (p.experts.E + 2);
    int low = 0, high = p.experts.E;  // the last list that starts at or before the tile
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (starts[middle] / kTileTokens + middle <= tile)
        low = middle;
      else
        high = middle - 1;
    }
    e = low;
    const int64_t skipped = (tile - starts[e] / kTileTokens - e) * kTileTokens;
    tokens = p.order + j * p.tokens + starts[e] + skipped;
    count = starts[e + 1] - starts[e] - skipped;
  }
};

int64_t tiles(const Segments& p) { return p.tokens / kTileTokens + p.experts.E + 1; }

template <class T>
__device__ Rows<T> rows_of(Rows<T> rows, const Segments& p, int e) {
  rows.data += p.experts.first(e) * rows.stride;
  return rows;
}

// Block (tile, ranks, slot).
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    segmented_shrink_kernel(Segments p, Rows<T> x, Rows<T> rows, int64_t columns, float* out) {
  if constexpr (!kServed<T>) return;
  using Dot = Product<T, T, true, true, kTileTokens, 64>;
  __shared__ __align__(128) char shared[Dot::kBytes];
  const int j = blockIdx.z;
  const TileOfList tile(p, blockIdx.x, j);
  if (tile.count <= 0 || tile.e >= p.experts.E) return;
  const int ranks = p.experts.last(tile.e) - p.experts.first(tile.e), rank = blockIdx.y * 64;
  if (rank >= ranks) return;
  x = x.of_slot(j);
  x.index = tile.tokens;
  Dot dot;
  dot.run(x, 0, tile.count, rows_of(rows, p, tile.e), rank, ranks, 0, columns, shared,
          [](const T*, const T*, int64_t) {});
  const auto row = [&](int64_t i) {
    return out + (tile.tokens[i] * int64_t(p.K) + j) * p.max_rank;
  };
  dot.write(row, 0, tile.count, rank, ranks, shared);
}

// Neighboring blocks share a tile; slot j adds to the result of the slots before it, or has its own
// rows of y.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    segmented_expand_kernel(Segments p, int j, Rows<T> h, Rows<T> rows, Rows<T> base,
                            const float* wide_in, float* wide_out, int64_t columns, T* y,
                            int64_t y_stride) {
  if constexpr (!kServed<T>) return;
  constexpr int BN = 64;
  using Dot = Product<T, T, true, false, kTileTokens, BN>;
  __shared__ __align__(128) char shared[Dot::kBytes];
  const int64_t across = ceil_div(columns, BN), column = blockIdx.x % across * BN;
  const TileOfList tile(p, blockIdx.x / across, j);
  if (tile.count <= 0) return;
  const bool none = tile.e >= p.experts.E;
  const int ranks = none ? 0 : p.experts.last(tile.e) - p.experts.first(tile.e);
  h.index = tile.tokens;
  Dot dot;
  if (!none)
    dot.run(h, 0, tile.count, rows_of(rows, p, tile.e), column, columns, 0, ranks, shared,
            [](const T*, const T*, int64_t) {});
  Dot::each_fragment([&](int i, int n, int r, int c) {
    const Pack<float, 8> sums = dot.take(i, n, shared);
    if (r >= tile.count) return;
    const int64_t t = tile.tokens[r];
#pragma unroll
    for (int v = 0; v < 8; ++v) {
      const int64_t d = column + c + v;
      if (d >= columns) return;
      float sum = sums.v[v];
      if (base) sum += widen(base.row(t)[d]);
      if (wide_in) sum += wide_in[t * columns + d];
      if (wide_out)
        wide_out[t * columns + d] = sum;
      else
        y[t * y_stride + d] = narrow<T>(sum);
    }
  });
}

// Block (columns, ranks, expert): the expert's tokens, one slot after another.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    segmented_wgrad_kernel(Segments p, Rows<T> h, Rows<T> x, int64_t columns, float* out) {
  if constexpr (!kServed<T>) return;
  constexpr int BM = 64, BN = 128;
  using Dot = Product<T, T, false, false, BM, BN>;
  __shared__ __align__(128) char shared[Dot::kBytes];
  const int e = blockIdx.z, first = p.experts.first(e), ranks = p.experts.last(e) - first;
  const int64_t column = int64_t(blockIdx.x) * BN, rank = int64_t(blockIdx.y) * BM;
  if (rank >= ranks) return;
  Dot dot;
  for (int j = 0; j < p.K; ++j) {
    const int32_t* starts = p.starts + int64_t(j) * (p.experts.E + 2);
    Rows<T> left = h.of_slot(j), right = x.of_slot(j);
    left.index = right.index = p.order + j * p.tokens + starts[e];
    dot.run(left, rank, ranks, right, column, columns, 0, starts[e + 1] - starts[e], shared,
            [](const T*, const T*, int64_t) {});
  }
  dot.write([&](int64_t r) { return out + (first + r) * columns; }, rank, ranks, column, columns,
            shared);
}

// H of one token, one slot after another.
template <class T>
__device__ void gate_slots(const Middle<T>& m, const Segments& p, int64_t t, int lane) {
  for (int j = 0; j < p.K; ++j) {
    const int e = m.routing.indices[t * p.K + j];
    if (!is_expert(e, p.experts.E)) continue;
    const float gate = m.routing.weights[t * p.K + j] * p.experts.scaling[e];
    const float* s = m.s + t * p.experts.S_columns + (p.experts.shared_a ? 0 : j * p.max_rank);
    T* h = m.h + (t * p.K + j) * p.max_rank;
    const int ranks = p.experts.last(e) - p.experts.first(e);
    for (int i = lane; i < ranks; i += 32) h[i] = narrow<T>(s[i] * gate);
  }
}

// H, dS and the gradient of each slot's weight; with a shared A, dS is summed over the slots.
template <class T>
__device__ void gate_slots(const MiddleGrad<T>& m, const Segments& p, int64_t t, int lane) {
  const bool shared_a = p.experts.shared_a;
  T* ds = m.ds + t * p.experts.S_columns;
  for (int j = 0; j < p.K; ++j) {
    const int64_t slot = t * p.K + j;
    const int e = m.routing.indices[slot];
    const bool none = !is_expert(e, p.experts.E);
    const float scale = none ? 0.f : p.experts.scaling[e], gate = m.routing.weights[slot] * scale;
    const int ranks = none ? 0 : p.experts.last(e) - p.experts.first(e);
    const float* s = m.s + t * p.experts.S_columns + (shared_a ? 0 : j * p.max_rank);
    float along = 0.f;
    for (int i = lane; i < ranks; i += 32) {
      const float g = m.g[slot * p.max_rank + i];
      along += g * s[i];
      m.h[slot * p.max_rank + i] = narrow<T>(s[i] * gate);
      if (!shared_a) ds[j * p.max_rank + i] = narrow<T>(g * gate);
    }
    along = warp_sum(along) * scale;
    if (lane == j % 32) m.dweights[slot] = along;
  }
  for (int i = lane; shared_a && i < p.experts.S_columns; i += 32) {
    float sum = 0.f;
    for (int j = 0; j < p.K; ++j) {
      const int64_t slot = t * p.K + j;
      const int e = m.routing.indices[slot];
      if (!is_expert(e, p.experts.E)) continue;
      sum += m.g[slot * p.max_rank + i] * m.routing.weights[slot] * p.experts.scaling[e];
    }
    ds[i] = narrow<T>(sum);
  }
}

// One token per warp.
template <class M>
__global__ void __launch_bounds__(kThreads, 4) segmented_gate_kernel(M m, Segments p) {
  const int64_t t = int64_t(blockIdx.x) * kWarps + warp_id();
  if (t >= p.tokens) return;
  gate_slots(m, p, t, lane_id());
  if constexpr (!M::kRouter) route_back(m, t, lane_id());
}

template <class M>
void launch_gate(const M& m, const Segments& p, cudaStream_t stream) {
  if (p.tokens > 0)
    launch("segmented_gate", segmented_gate_kernel<M>, ceil_div(p.tokens, kWarps), kThreads, stream,
           m, p);
}

}  // namespace

template <class T>
void segmented_shrink(const Segments& p, const Rows<T>& x, const Rows<T>& rows, int64_t columns,
                      float* out, cudaStream_t stream) {
  const dim3 grid(tiles(p), ceil_div(p.max_rank, 64), p.K);
  launch("segmented_shrink", segmented_shrink_kernel<T>, grid, kThreads, stream, p, x, rows,
         columns, out);
}

template <class T>
void segmented_gate(const Middle<T>& m, const Segments& p, cudaStream_t stream) {
  launch_gate(m, p, stream);
}

template <class T>
void segmented_gate(const MiddleGrad<T>& m, const Segments& p, cudaStream_t stream) {
  launch_gate(m, p, stream);
}

// One slot after another.
template <class T>
Rows<T> rank_rows(const Segments& p, const T* h) {
  Rows<T> rows(h, int64_t(p.K) * p.max_rank);
  rows.slot = p.max_rank;
  return rows;
}

template <class T>
void segmented_expand(const Segments& p, const T* h, const Rows<T>& rows, const Rows<T>& base,
                      float* wide, bool add_wide, int64_t columns, T* y, cudaStream_t stream) {
  for (int j = 0; j < p.K; ++j)
    launch("segmented_expand", segmented_expand_kernel<T>, tiles(p) * ceil_div(columns, 64),
           kThreads, stream, p, j, rank_rows(p, h).of_slot(j), rows, j == 0 ? base : Rows<T>(),
           j > 0 || add_wide ? wide : nullptr, j + 1 < p.K ? wide : nullptr, columns, y, columns);
}

template <class T>
void segmented_expand_apart(const Segments& p, const T* h, const Rows<T>& rows, const Rows<T>& base,
                            int64_t columns, T* y, cudaStream_t stream) {
  const float* none = nullptr;
  for (int j = 0; j < p.K; ++j)
    launch("segmented_expand", segmented_expand_kernel<T>, tiles(p) * ceil_div(columns, 64),
           kThreads, stream, p, j, rank_rows(p, h).of_slot(j), rows, base.of_slot(j), none, nullptr,
           columns, y + j * columns, p.K * columns);
}

template <class T>
void segmented_wgrad(const Segments& p, const T* h, const Rows<T>& x, int64_t columns, float* out,
                     cudaStream_t stream) {
  const dim3 grid(ceil_div(columns, 128), ceil_div(p.max_rank, 64), p.experts.E);
  launch("segmented_wgrad", segmented_wgrad_kernel<T>, grid, kThreads, stream, p, rank_rows(p, h),
         x, columns, out);
}

#define LORA_MOE_SEGMENTED(T)                                                                      \
  template void segmented_shrink(const Segments&, const Rows<T>&, const Rows<T>&, int64_t, float*, \
                                 cudaStream_t);                                                    \
  template void segmented_gate(const Middle<T>&, const Segments&, cudaStream_t);                   \
  template void segmented_gate(const MiddleGrad<T>&, const Segments&, cudaStream_t);               \
  template void segmented_expand(const Segments&, const T*, const Rows<T>&, const Rows<T>&,        \
                                 float*, bool, int64_t, T*, cudaStream_t);                         \
  template void segmented_expand_apart(const Segments&, const T*, const Rows<T>&, const Rows<T>&,  \
                                       int64_t, T*, cudaStream_t);                                 \
  template void segmented_wgrad(const Segments&, const T*, const Rows<T>&, int64_t, float*,        \
                                cudaStream_t);

LORA_MOE_SEGMENTED(float)
LORA_MOE_SEGMENTED(f16)
LORA_MOE_SEGMENTED(bf16)
#undef LORA_MOE_SEGMENTED

}  // namespace lora_moe::cuda
