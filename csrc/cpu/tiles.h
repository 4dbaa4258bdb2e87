// The three products of LoRA-MoE over lists of rows, blocked for registers.
//
//   dot_rows     out[t][i]  = sum over d of x[t][d] a[i][d]         shrink, and G = dy B^T
//   expand_rows  acc[t][c] += sum over i of h[t][i] b[i][c]         expand, and dx
//   gram_rows    out[i][c]  = sum over t of h[t][i] x[t][c]         dA, dB, dW_router
//
// Rows of tokens are reached through pointers, so the tokens of one expert need not be gathered.
// A tile's remainder repeats its last row: every row of every tile goes through the same
// instructions in the same order, hence a token's bits never depend on its neighbours.
#pragma once

#include <algorithm>

#include "simd.h"

namespace lora_moe {

constexpr int kTileRows = 4;
constexpr int kTileVectors = 4;

// Columns of fp32 or fp64 accumulators kept in cache while experts add to them.
constexpr int64_t kChunk = 256;

// Long sums are taken in runs of this many terms, each from zero: fewer roundings at full size.
constexpr int64_t kRun = 64;

template <int M, int N, bool Tail, class X, class A, class C>
LORA_MOE_INLINE void dot_step(const X* const (&x)[M], const A* const (&a)[N], int64_t d,
                              int64_t left, Vec<C> (&acc)[M][N]) {
  Vec<C> av[N];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) av[n] = Tail ? load_tail(a[n] + d, left) : load(a[n] + d);
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    const Vec<C> xv = Tail ? load_tail(x[m] + d, left) : load(x[m] + d);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[m][n] = multiply_add(xv, av[n], acc[m][n]);
  }
}

template <int M, int N, class X, class A, class C>
inline void dot_tile(const X* const (&x)[M], const A* const (&a)[N], int64_t D, C (&out)[M][N]) {
  constexpr int64_t L = kLanes<C>;
  Vec<C> total[M][N] = {};
  for (int64_t d = 0; d < D;) {
    const int64_t end = std::min(D, d + kRun * L);
    Vec<C> acc[M][N] = {};
    for (; d + L <= end; d += L) dot_step<M, N, false, X, A, C>(x, a, d, 0, acc);
    if (d < end) dot_step<M, N, true, X, A, C>(x, a, d, end - d, acc), d = end;
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) total[m][n] += acc[m][n];
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) out[m][n] = sum_lanes(total[m][n]);
}

template <class C>
inline C dot(const C* x, const C* a, int64_t n) {
  C out[1][1];
  dot_tile<1, 1, C, C, C>({x}, {a}, n, out);
  return out[0][0];
}

template <int M, class X, class A, class C>
inline void dot_rows_tile(const X* const* x, C* const* out, int64_t rows, const A* a, int64_t lda,
                          int64_t R, int64_t D) {
  const X* xs[M];
  for (int m = 0; m < M; ++m) xs[m] = x[std::min<int64_t>(m, rows - 1)];
  for (int64_t i = 0; i < R; i += kTileRows) {
    const A* as[kTileRows];
    for (int n = 0; n < kTileRows; ++n) as[n] = a + std::min<int64_t>(i + n, R - 1) * lda;
    C tile[M][kTileRows];
    dot_tile(xs, as, D, tile);
    const int64_t columns = std::min<int64_t>(kTileRows, R - i);
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t n = 0; n < columns; ++n) out[m][i + n] = tile[m][n];
  }
}

// x: T pointers to rows of D; out: T pointers to rows of R.
template <class X, class A, class C>
inline void dot_rows(const X* const* x, C* const* out, int64_t T, const A* a, int64_t lda,
                     int64_t R, int64_t D) {
  for (int64_t t = 0; t < T; t += kTileRows) {
    const int64_t rows = std::min<int64_t>(kTileRows, T - t);
    if (rows == 1)
      dot_rows_tile<1>(x + t, out + t, rows, a, lda, R, D);
    else
      dot_rows_tile<kTileRows>(x + t, out + t, rows, a, lda, R, D);
  }
}

template <int M, int V, bool Tail, class B, class C>
inline void expand_tile(const C* const (&h)[M], int64_t R, const B* b, int64_t ldb,
                        C* const (&acc)[M], int64_t c, int64_t left) {
  Vec<C> sum[M][V] = {};
  for (int64_t i = 0; i < R; ++i) {
    Vec<C> bv[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const B* p = b + i * ldb + c + v * kLanes<C>;
      bv[v] = Tail ? load_tail(p, left) : load(p);
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const Vec<C> hv = broadcast(h[m][i]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[m][v] = multiply_add(hv, bv[v], sum[m][v]);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[m][v] += load(acc[m] + c + v * kLanes<C>);
  // All loads before any store: the repeated rows of a remainder must not add twice.
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(acc[m] + c + v * kLanes<C>, sum[m][v]);
}

template <int M, class B, class C>
inline void expand_run(const C* const (&hs)[M], C* const (&ys)[M], int64_t R, const B* b,
                       int64_t ldb, int64_t columns) {
  constexpr int64_t L = kLanes<C>;
  int64_t c = 0;
  for (; c + kTileVectors * L <= columns; c += kTileVectors * L)
    expand_tile<M, kTileVectors, false>(hs, R, b, ldb, ys, c, 0);
  for (; c + L <= columns; c += L) expand_tile<M, 1, false>(hs, R, b, ldb, ys, c, 0);
  if (c < columns) expand_tile<M, 1, true>(hs, R, b, ldb, ys, c, columns - c);
}

template <int M, class B, class C>
inline void expand_rows_tile(const C* const* h, C* const* acc, int64_t rows, int64_t R, const B* b,
                             int64_t ldb, int64_t columns) {
  const C* hs[M];
  C* ys[M];
  for (int m = 0; m < M; ++m) {
    hs[m] = h[std::min<int64_t>(m, rows - 1)];
    ys[m] = acc[std::min<int64_t>(m, rows - 1)];
  }
  for (; R > kRun; R -= kRun, b += kRun * ldb) {
    expand_run<M>(hs, ys, kRun, b, ldb, columns);
    for (int m = 0; m < M; ++m) hs[m] += kRun;
  }
  expand_run<M>(hs, ys, R, b, ldb, columns);
}

// h: T pointers to rows of R; acc: T pointers to rows of `columns`, padded to whole vectors.
template <class B, class C>
inline void expand_rows(const C* const* h, C* const* acc, int64_t T, int64_t R, const B* b,
                        int64_t ldb, int64_t columns) {
  for (int64_t t = 0, rows; t < T; t += rows) {
    // A token that took the expert twice stands twice in a row: never in the same tile.
    for (rows = 1; rows < kTileRows && t + rows < T && acc[t + rows] != acc[t + rows - 1];) ++rows;
    if (rows == 1)
      expand_rows_tile<1>(h + t, acc + t, rows, R, b, ldb, columns);
    else
      expand_rows_tile<kTileRows>(h + t, acc + t, rows, R, b, ldb, columns);
  }
}

template <int M, int V, bool Tail, bool First, class X, class C>
inline void gram_tile(const C* const* h, const X* const* x, int64_t T, int64_t i, int64_t c,
                      int64_t left, C* out, int64_t ldo) {
  Vec<C> sum[M][V] = {};
  for (int64_t t = 0; t < T; ++t) {
    Vec<C> xv[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const X* p = x[t] + c + v * kLanes<C>;
      xv[v] = Tail ? load_tail(p, left) : load(p);
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const Vec<C> hv = broadcast(h[t][i + m]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[m][v] = multiply_add(hv, xv[v], sum[m][v]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) {
      C* p = out + (i + m) * ldo + c + v * kLanes<C>;
      if (Tail)
        store_tail(p, First ? sum[m][v] : load_tail(p, left) + sum[m][v], left);
      else
        store(p, First ? sum[m][v] : load(p) + sum[m][v]);
    }
}

template <int M, bool First, class X, class C>
inline void gram_columns(const C* const* h, const X* const* x, int64_t T, int64_t i, int64_t begin,
                         int64_t end, C* out, int64_t ldo) {
  constexpr int64_t L = kLanes<C>;
  int64_t c = begin;
  for (; c + kTileVectors * L <= end; c += kTileVectors * L)
    gram_tile<M, kTileVectors, false, First>(h, x, T, i, c, 0, out, ldo);
  for (; c + L <= end; c += L) gram_tile<M, 1, false, First>(h, x, T, i, c, 0, out, ldo);
  if (c < end) gram_tile<M, 1, true, First>(h, x, T, i, c, end - c, out, ldo);
}

template <bool First, class X, class C>
inline void gram_run(const C* const* h, const X* const* x, int64_t T, int64_t R, int64_t begin,
                     int64_t end, C* out, int64_t ldo) {
  int64_t i = 0;
  for (; i + kTileRows <= R; i += kTileRows)
    gram_columns<kTileRows, First>(h, x, T, i, begin, end, out, ldo);
  for (; i < R; ++i) gram_columns<1, First>(h, x, T, i, begin, end, out, ldo);
}

// h: T pointers to rows of R; x: T pointers to rows; writes columns [begin, end) of out (R, ldo).
template <class X, class C>
inline void gram_rows(const C* const* h, const X* const* x, int64_t T, int64_t R, int64_t begin,
                      int64_t end, C* out, int64_t ldo) {
  gram_run<true>(h, x, std::min(T, kRun), R, begin, end, out, ldo);
  for (int64_t t = kRun; t < T; t += kRun)
    gram_run<false>(h + t, x + t, std::min(kRun, T - t), R, begin, end, out, ldo);
}

}  // namespace lora_moe
