// out[t][c] += sum over i of h[t][i] b[i][c]  over lists of rows: expand, dx, dA, dB and dW.
//
// Every row of every tile uses the same additions in the same order, as in dot.h.
#pragma once

#include <vector>

#include "tiles.h"

namespace lora_moe {

// The rows to add: of a matrix, or from a list.  Rows from a list are in any order and pages apart,
// so the hardware cannot predict them; those of the next tile are prefetched meanwhile.
template <class T>
struct MatrixRows {
  const T* data;
  int64_t stride;
  const T* operator()(int64_t i) const { return data + i * stride; }
  MatrixRows after(int64_t i) const { return {data + i * stride, stride}; }
  LORA_MOE_INLINE void ahead(int64_t) const {}
};

template <class T>
struct ListedRows {
  const T* const* rows;
  int64_t column;
  const T* const* next;  // as many rows, from this column, this many columns
  int64_t next_column, count;
  const T* operator()(int64_t i) const { return rows[i] + column; }
  ListedRows after(int64_t i) const { return {rows + i, column, next + i, next_column, count}; }
  LORA_MOE_INLINE void ahead(int64_t i) const { prefetch(next[i] + next_column, count); }
};

// How numbers h multiply rows: one number and one row per step.
template <class H>
struct Scaled {
  static constexpr int64_t rows = 1;
  static LORA_MOE_INLINE Vec<H> factor(const H* h, bool) { return broadcast(*h); }
  template <bool Split, bool Tail, class B>
  static LORA_MOE_INLINE Pair<H> load(const B* p, const B*, int64_t left) {
    return Tail ? load_pair_tail<Split>(p, left) : load_pair<Split>(p);
  }
  static LORA_MOE_INLINE Vec<H> add(Vec<H> h, Vec<H> b, Vec<H> sum) {
    return multiply_add(h, b, sum);
  }
};

#if defined(__AVX512BF16__)
// Two of each per step, whose products the CPU adds in one instruction; an odd last one is padded
// with zeros.
template <>
struct Scaled<bf16> {
  static constexpr int64_t rows = 2;
  static LORA_MOE_INLINE Vec<float> factor(const bf16* h, bool both) {
    uint32_t bits = h->bits;
    if (both) std::memcpy(&bits, h, sizeof bits);
    return (Vec<float>)(bits - Word32{});
  }
  template <bool Split, bool Tail, class B>
  static LORA_MOE_INLINE Pair<float> load(const B* p, const B* q, int64_t left) {
    static_assert(Split, "bf16 columns come split");
    const Word32 a = columns<Tail>(p, left), b = q ? columns<Tail>(q, left) : Word32{};
    constexpr __mmask32 odd = 0xaaaaaaaa;
    const auto low = _mm512_mask_blend_epi16(odd, (__m512i)a, (__m512i)(b << 16));
    const auto high = _mm512_mask_blend_epi16(odd, (__m512i)(a >> 16), (__m512i)b);
    return {(Vec<float>)low, (Vec<float>)high};
  }
  static LORA_MOE_INLINE Vec<float> add(Vec<float> h, Vec<float> b, Vec<float> sum) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)h, (__m512bh)b);
  }

 private:
  template <bool Tail>
  static LORA_MOE_INLINE Word32 columns(const bf16* p, int64_t n) {
    return load_bytes<Word32>(p, Tail ? n * sizeof(bf16) : sizeof(Word32));
  }
  template <bool Tail>
  static LORA_MOE_INLINE Word32 columns(const rounded_to<bf16>* p, int64_t n) {
    return rounded_row(&p->wide, Tail ? n : 2 * kLanes<float>);
  }
};
#endif

// The type that multiplies rows of T: that of the sums, or bf16, rounded once, if the CPU adds
// products of bf16 pairs.
#if defined(__AVX512BF16__)
template <class T>
using factor_t = std::conditional_t<std::is_same_v<T, bf16>, bf16, acc_t<T>>;
#else
template <class T>
using factor_t = acc_t<T>;
#endif

// A row to which a product is added, read from one place and written to another.  Sums of split
// columns fill whole vectors; other sums may end with the row.
template <bool Split, class C>
struct SumRow {
  const C* from;
  C* to;
  SumRow run(bool first, bool) const { return {first ? from : to, to}; }
  template <bool Tail>
  LORA_MOE_INLINE Pair<C> load(int64_t c, int64_t left) const {
    return Tail && !Split ? load_pair_tail<false>(from + c, left) : load_pair<false>(from + c);
  }
  template <bool Tail>
  LORA_MOE_INLINE void store(int64_t c, Pair<C> v, int64_t left) const {
    store_pair_tail<false>(to + c, v, Tail && !Split ? left : 2 * kLanes<C>);
  }
};

// The same for rows of a 16-bit T: the first product is added to `base`, the last one is rounded
// into `y`, and in between the sums are kept in `sums`; the other pointers are null.
template <bool Split, class T>
struct RoundedRow {
  using C = acc_t<T>;
  const T* base;
  T* y;
  C* sums;
  RoundedRow run(bool first, bool last) const {
    return {first ? base : nullptr, last ? y : nullptr, sums};
  }
  template <bool Tail>
  LORA_MOE_INLINE Pair<C> load(int64_t c, int64_t left) const {
    if (base) return Tail ? load_pair_tail<Split>(base + c, left) : load_pair<Split>(base + c);
    return load_pair<false>(sums + c);
  }
  template <bool Tail>
  LORA_MOE_INLINE void store(int64_t c, Pair<C> v, int64_t left) const {
    if (y)
      store_pair_tail<Split>(y + c, v, Tail ? left : 2 * kLanes<C>);
    else
      store_pair<false>(sums + c, v);
  }
};

template <int M, int V, bool Split, bool Tail, class H, class Row, class Out>
LORA_MOE_INLINE void add_tile(const H* const (&h)[M], int64_t R, Row row, int64_t c, int64_t left,
                              const Out (&out)[M]) {
  using P = Scaled<H>;
  using C = acc_t<H>;
  Vec<C> sum[M][V] = {};
  for (int64_t i = 0; i < R; i += P::rows) {
    const bool both = P::rows == 2 && i + 1 < R;
    row.ahead(i);
    if (both) row.ahead(i + 1);
    Vec<C> bs[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v += 2) {
      const int64_t at = c + v * kLanes<C>;
      const auto* p = row(i) + at;
      const auto pair = P::template load<Split, Tail>(p, both ? row(i + 1) + at : nullptr, left);
      bs[v] = pair.first;
      bs[v + 1] = pair.second;
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec<C> hm = P::factor(h[m] + i, both);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[m][v] = P::add(hm, bs[v], sum[m][v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; v += 2) {
      const int64_t at = c + v * kLanes<C>;
      const Pair<C> before = out[m].template load<Tail>(at, left);
      out[m].template store<Tail>(at, {before.first + sum[m][v], before.second + sum[m][v + 1]},
                                  left);
    }
}

template <bool Split, int M, class H, class Row, class Out>
inline void add_run(const H* const (&h)[M], int64_t R, Row row, int64_t columns,
                    const Out (&out)[M]) {
  constexpr int V = kTileColumns;
  constexpr int64_t L = kLanes<acc_t<H>>;
  int64_t c = 0;
  for (; c + V * L <= columns; c += V * L) add_tile<M, V, Split, false>(h, R, row, c, 0, out);
  for (; c + 2 * L <= columns; c += 2 * L) add_tile<M, 2, Split, false>(h, R, row, c, 0, out);
  if (c < columns) add_tile<M, 2, Split, true>(h, R, row, c, columns - c, out);
}

// h: T <= kTileRows pointers to rows of R; `out`: as many different rows.
template <bool Split, class H, class Row, class Out>
inline void add_rows(const H* const* h, int64_t T, int64_t R, Row row, int64_t columns,
                     const Out* out) {
  with_rows(T, [&]<int M>() {
    const H* hs[M];
    std::copy_n(h, M, hs);
    for (int64_t i = 0; i < R; i += kRun) {
      Out outs[M];
      for (int m = 0; m < M; ++m) outs[m] = out[m].run(i == 0, i + kRun >= R);
      add_run<Split>(hs, std::min(kRun, R - i), row.after(i), columns, outs);
      for (int m = 0; m < M; ++m) hs[m] += kRun;
    }
  });
}

// The same if b comes from memory and reading it dominates, as with a few tokens: rows of b are
// read in groups, each row by a separate instruction, so that the hardware can predict the
// addresses.
constexpr int kStreams = kVectorBytes == 64 ? 8 : 4;

// `more` rows of the run follow the N at i.
template <bool Split, int N, bool Tail, class H, class B, class Out, class C>
LORA_MOE_INLINE void stream_tile(const H* const* h, int64_t i, int64_t T, const B* b, int64_t ldb,
                                 int64_t c, int64_t left, const Out* out, C* partial,
                                 int64_t stride, bool first, int64_t more) {
  using P = Scaled<H>;
  constexpr bool both = N > 1;
  Pair<C> bs[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    const B* p = b + n * ldb + c;
    if (n % P::rows == 0) bs[n] = P::template load<Split, Tail>(p, both ? p + ldb : nullptr, left);
    if (n < more) prefetch(p + N * ldb, 2 * kLanes<C>);
  }
  for (int64_t t = 0; t < T; ++t) {
    C* between = partial + t * stride + c;
    Pair<C> sum = first ? Pair<C>{} : load_pair<false>(between);
#pragma GCC unroll 8
    for (int n = 0; n < N; n += P::rows) {
      const Vec<C> ht = P::factor(h[t] + i + n, both);
      sum.first = P::add(ht, bs[n].first, sum.first);
      sum.second = P::add(ht, bs[n].second, sum.second);
    }
    if (more > 0) {
      store_pair<false>(between, sum);
      continue;
    }
    const Pair<C> before = out[t].template load<Tail>(c, left);
    out[t].template store<Tail>(c, {before.first + sum.first, before.second + sum.second}, left);
  }
}

// Rows [i, end) of a run of at most kRun.
template <bool Split, int N = kStreams, class H, class B, class Out, class C>
inline void stream_run(const H* const* h, int64_t i, int64_t end, int64_t T, const B* b,
                       int64_t ldb, int64_t columns, const Out* out, C* partial, int64_t stride,
                       bool first = true) {
  constexpr int64_t step = 2 * kLanes<C>;
  for (; i + N <= end; i += N, first = false) {
    const B* rows = b + i * ldb;
    const int64_t more = end - i - N;
    int64_t c = 0;
    for (; c + step <= columns; c += step)
      stream_tile<Split, N, false>(h, i, T, rows, ldb, c, 0, out, partial, stride, first, more);
    if (c < columns)
      stream_tile<Split, N, true>(h, i, T, rows, ldb, c, columns - c, out, partial, stride, first,
                                  more);
  }
  if constexpr (N > 1)
    if (i < end)
      stream_run<Split, N / 2>(h, i, end, T, b, ldb, columns, out, partial, stride, first);
}

// `partial`: memory for T rows of `stride` >= columns numbers, whole pairs of vectors.
template <bool Split, class H, class B, class Out, class C>
inline void stream_rows(const H* const* h, int64_t T, int64_t R, const B* b, int64_t ldb,
                        int64_t columns, const Out* out, C* partial, int64_t stride) {
  std::vector<Out> outs(T);
  for (int64_t i = 0; i < R; i += kRun) {
    for (int64_t t = 0; t < T; ++t) outs[t] = out[t].run(i == 0, i + kRun >= R);
    stream_run<Split>(h, i, std::min(R, i + kRun), T, b, ldb, columns, outs.data(), partial,
                      stride);
  }
}

}  // namespace lora_moe
