// out[t][i] = sum over d of x[t][d] a[i][d]  over lists of rows: shrink, and G = dy B^T.
//
// Rows of tokens are accessed through pointers, so the tokens of one expert need not be gathered.
// Every row of every tile uses the same additions in the same order, so a token's bits never depend
// on its neighbors.
#pragma once

#include "tiles.h"

namespace lora_moe {

// How two rows multiply: the part of each that fills a register, and what they add to a sum's
// lanes.
template <class X, class A>
struct Product {
  using C = acc_t<X>;
  using Register = Vec<C>;
  static constexpr int64_t step = kLanes<C>;
  template <class T>
  static LORA_MOE_INLINE Register load(const T* p) {
    return lora_moe::load(p);
  }
  template <class T>
  static LORA_MOE_INLINE Register load_tail(const T* p, int64_t n) {
    return lora_moe::load_tail(p, n);
  }
  static LORA_MOE_INLINE Vec<C> add(Register x, Register a, Vec<C> sum) {
    return multiply_add(x, a, sum);
  }
};

template <>
struct Product<bf16, bf16> {
  using Register = Word32;
  static constexpr int64_t step = 2 * kLanes<float>;
  static LORA_MOE_INLINE Register load(const bf16* p) {
    Register bits;
    std::memcpy(&bits, p, sizeof bits);
    return bits;
  }
  static LORA_MOE_INLINE Register load_tail(const bf16* p, int64_t n) {
    return load_bytes<Register>(p, n * sizeof(bf16));
  }
  static LORA_MOE_INLINE Vec<float> add(Register x, Register a, Vec<float> sum) {
#if defined(__AVX512BF16__)
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)a);
#else
    return multiply_add(odd(x), odd(a), multiply_add(even(x), even(a), sum));
#endif
  }
};

// Rows of fp32 numbers as if they had been rounded and stored.
template <class X>
struct Product<X, rounded_to<X>> : Product<X, X> {
  using Base = Product<X, X>;
  using Base::load, Base::load_tail, Base::step;
  using typename Base::Register;
  static LORA_MOE_INLINE Register load(const rounded_to<X>* p) { return load_tail(p, step); }
  static LORA_MOE_INLINE Register load_tail(const rounded_to<X>* p, int64_t n) {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<X, bf16>) return rounded_row(&p->wide, n);
#endif
    X rounded[2 * kLanes<acc_t<X>>];
    round_pair(p, n, rounded);
    return Base::load(rounded);
  }
};

template <int M, int N, bool Tail, class X, class A, class C>
LORA_MOE_INLINE void dot_step(const X* const (&x)[M], const A* const (&a)[N], int64_t d,
                              int64_t left, Vec<C> (&sum)[M][N]) {
  using P = Product<X, A>;
  typename P::Register as[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) as[n] = Tail ? P::load_tail(a[n] + d, left) : P::load(a[n] + d);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    const auto xs = Tail ? P::load_tail(x[m] + d, left) : P::load(x[m] + d);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum[m][n] = P::add(xs, as[n], sum[m][n]);
  }
}

// out[m * N + n] over D columns of a run, padded to whole vectors
template <int M, int N, class X, class A, class C>
inline void dot_tile(const X* const (&x)[M], const A* const (&a)[N], int64_t D, C* out) {
  constexpr int64_t L = kLanes<C>, step = Product<X, A>::step;
  Vec<C> sum[M][N] = {};
  int64_t d = 0;
  for (; d + step <= D; d += step) dot_step<M, N, false, X, A, C>(x, a, d, 0, sum);
  if (d < D) dot_step<M, N, true, X, A, C>(x, a, d, D - d, sum);
#pragma GCC unroll 8
  for (int i = 0; i < M * N; i += L) {
    Vec<C> group[L] = {};
#pragma GCC unroll 16
    for (int j = 0; j < L; ++j)
      if (i + j < M * N) group[j] = sum[(i + j) / N][(i + j) % N];
    store(out + i, sum_lanes<C>(group));
  }
}

// x: T pointers to rows of D; out: T pointers to rows of R.
template <class X, class A, class C>
inline void dot_rows(const X* const* x, C* const* out, int64_t T, const A* a, int64_t lda,
                     int64_t R, int64_t D) {
  constexpr int N = kTileColumns;
  constexpr int64_t run = kRun * Product<X, A>::step;
  const int64_t rows = tile_rows(T);
  for (int64_t t = 0; t < T; t += rows)
    with_rows(std::min(rows, T - t), [&]<int M>() {
      for (int64_t d = 0; d == 0 || d < D; d += run) {  // with no columns the sums are zeros
        const int64_t columns = std::min(run, D - d);
        const X* xs[M];
        for (int m = 0; m < M; ++m) xs[m] = x[t + m] + d;
        for (int64_t i = 0; i < R; i += N) {
          const A* as[N];  // a remainder repeats its last row
          for (int n = 0; n < N; ++n) as[n] = a + std::min(i + n, R - 1) * lda + d;
          C tile[M * N + kLanes<C>];
          dot_tile<M, N, X, A, C>(xs, as, columns, tile);
          for (int m = 0; m < M; ++m)
            for (int n = 0; n < std::min<int64_t>(N, R - i); ++n) {
              C& o = out[t + m][i + n];
              o = tile[m * N + n] + (d > 0 ? o : 0);
            }
        }
      }
    });
}

// For few rows, those of an expert's rank.
template <class C>
inline C dot(const C* x, const C* a, int64_t n) {
  C out;
  C* outs = &out;
  dot_rows<C, C, C>(&x, &outs, 1, a, n, 1, n);
  return out;
}

}  // namespace lora_moe
