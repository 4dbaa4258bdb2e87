// Two vectors of one row: split into even and odd columns, rounded, summed.
#pragma once

#include "simd.h"

namespace lora_moe {

// A pair covers 2 kLanes columns of a row.  bf16 needs no unpacking if the first vector holds the
// even columns and the second the odd ones: `Split` says that a computation stores its sums this
// way.
template <class C>
struct Pair {
  Vec<C> first, second;
};

LORA_MOE_INLINE Vec<float> even(Word32 columns) { return (Vec<float>)(columns << 16); }
LORA_MOE_INLINE Vec<float> odd(Word32 columns) { return (Vec<float>)(columns & 0xffff0000); }

template <int first, int step, class V, size_t... I>
LORA_MOE_INLINE V pick_lanes(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (first + step * I)...);
}
template <class V>
using LanesOf = std::make_index_sequence<sizeof(V) / sizeof(V{}[0])>;

// The even lanes and the odd lanes of the concatenation of a and b.
template <class V>
LORA_MOE_INLINE V even_lanes(V a, V b) {
  return pick_lanes<0, 2>(a, b, LanesOf<V>{});
}
template <class V>
LORA_MOE_INLINE V odd_lanes(V a, V b) {
  return pick_lanes<1, 2>(a, b, LanesOf<V>{});
}

// The inverse: lanes of a and b alternating, from lane `first` of each.
template <int first, class V, size_t... I>
LORA_MOE_INLINE V interleave(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (first + I / 2 + I % 2 * sizeof...(I))...);
}

// Lanes of the first and the second half of v, alternating.
template <class V, size_t... I>
LORA_MOE_INLINE V interleave_halves(V v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, (I / 2 + I % 2 * sizeof...(I) / 2)...);
}

template <bool Split, class T>
LORA_MOE_INLINE Pair<acc_t<T>> as_pair(Vec<acc_t<T>> a, Vec<acc_t<T>> b) {
  if constexpr (Split) return {even_lanes(a, b), odd_lanes(a, b)};
  return {a, b};
}

template <bool Split, class T>
LORA_MOE_INLINE Pair<acc_t<T>> load_pair(const T* p) {
  if constexpr (std::is_same_v<T, bf16>) {
    static_assert(Split, "bf16 columns come split");
    Word32 columns;
    std::memcpy(&columns, p, sizeof columns);
    return {even(columns), odd(columns)};
  } else {
    return as_pair<Split, T>(load(p), load(p + kLanes<acc_t<T>>));
  }
}

// The first n < 2 kLanes columns.
template <bool Split, class T>
LORA_MOE_INLINE Pair<acc_t<T>> load_pair_tail(const T* p, int64_t n) {
  if constexpr (std::is_same_v<T, bf16>) {
    const Word32 columns = load_bytes<Word32>(p, n * sizeof(T));
    return {even(columns), odd(columns)};
  } else {
    constexpr int64_t L = kLanes<acc_t<T>>;
    const int64_t second = n > L ? n - L : 0;
    return as_pair<Split, T>(load_tail(p, n - second), load_tail(p + L, second));
  }
}

LORA_MOE_INLINE Word32 rounded_bits(Vec<float> v) {  // bf16 in the upper half, noise below
  const Word32 bits = (Word32)v;
  const Mask32 is_nan = v != v;
  return is_nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);
}

LORA_MOE_INLINE Word32 rounded_columns(Vec<float> even, Vec<float> odd) {
#if defined(__AVX512BF16__)
  // The CPU's own rounding flushes numbers below 2^-126 to zero.
  const __m512i exponent = _mm512_set1_epi32(0x7f800000);
  const __mmask16 tiny = _mm512_testn_epi32_mask((__m512i)even, exponent) |
                         _mm512_testn_epi32_mask((__m512i)odd, exponent);
  if (__builtin_expect(tiny == 0, 1)) {
    const auto halves = (Vec<uint16_t>)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    return (Word32)interleave_halves(halves, LanesOf<Vec<uint16_t>>{});
  }
#endif
  return rounded_bits(even) >> 16 | (rounded_bits(odd) & 0xffff0000);
}

#if defined(__AVX512BF16__)
// The first n <= 2 kLanes columns of a row for products of bf16 pairs, which flush numbers below
// 2^-126 to zero, as this rounding does.
LORA_MOE_INLINE Word32 rounded_row(const float* p, int64_t n) {
  constexpr int64_t L = kLanes<float>;
  const int64_t second = n > L ? n - L : 0;
  return (Word32)_mm512_cvtne2ps_pbh((__m512)load_tail(p + L, second),
                                     (__m512)load_tail(p, n - second));
}
#endif

template <bool Split, class T>
LORA_MOE_INLINE void store_pair_tail(T* p, Pair<acc_t<T>> v, int64_t n) {
  using V = Vec<acc_t<T>>;
  constexpr int64_t L = kLanes<acc_t<T>>;
  if constexpr (std::is_same_v<T, bf16> && Split) {
    store_bytes(p, rounded_columns(v.first, v.second), n * sizeof(T));
  } else if constexpr (Split) {
    store_pair_tail<false>(p,
                           Pair<acc_t<T>>{interleave<0>(v.first, v.second, LanesOf<V>{}),
                                          interleave<L / 2>(v.first, v.second, LanesOf<V>{})},
                           n);
  } else {
    const int64_t second = n > L ? n - L : 0;
    store_tail(p, v.first, n - second);
    store_tail(p + L, v.second, second);
  }
}

// The first n <= 2 kLanes columns, rounded: what `load_pair` would load after storing them.
template <class T>
LORA_MOE_INLINE void round_pair(const rounded_to<T>* p, int64_t n, T* to) {
  constexpr int64_t L = kLanes<acc_t<T>>;
  const auto* wide = &p->wide;
  const int64_t second = n > L ? n - L : 0;
  store(to, load_tail(wide, n - second));
  store(to + L, load_tail(wide + L, second));
}
template <bool Split, class T>
LORA_MOE_INLINE Pair<acc_t<T>> load_pair_tail(const rounded_to<T>* p, int64_t n) {
  T rounded[2 * kLanes<acc_t<T>>];
  round_pair(p, n, rounded);
  return load_pair<Split>(rounded);
}
template <bool Split, class T>
LORA_MOE_INLINE Pair<acc_t<T>> load_pair(const rounded_to<T>* p) {
  return load_pair_tail<Split>(p, 2 * kLanes<acc_t<T>>);
}

template <bool Split, class T>
LORA_MOE_INLINE void store_pair(T* p, Pair<acc_t<T>> v) {
  store_pair_tail<Split>(p, v, 2 * kLanes<acc_t<T>>);
}

// --- sums of lanes -------------------------------------------------------------------------------

// out[i] = sum of the lanes of v[i], for kLanes vectors, in a fixed tree of neighbors.  Takes two
// shuffles and one addition per two vectors instead of per vector.
template <class C>
LORA_MOE_INLINE Vec<C> sum_lanes(Vec<C> (&v)[kLanes<C>]) {
#pragma GCC unroll 5
  for (int n = kLanes<C> / 2; n > 0; n /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i)
      v[i] = even_lanes(v[2 * i], v[2 * i + 1]) + odd_lanes(v[2 * i], v[2 * i + 1]);
  return v[0];
}

}  // namespace lora_moe
