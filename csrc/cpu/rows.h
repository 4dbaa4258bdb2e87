// Rows of the result, a chunk of columns at a time: sums stay in cache in fp32 (fp64) while expert
// after expert adds to them, and each number is rounded and written once.
#pragma once

#include "tensors.h"
#include "tiles.h"

namespace lora_moe {

template <class T>
LORA_MOE_INLINE void widen_row(const T* from, acc_t<T>* to, int64_t n) {
  constexpr int64_t L = kLanes<acc_t<T>>;
  int64_t c = 0;
  for (; c + L <= n; c += L) store(to + c, load(from + c));
  if (c < n) store(to + c, load_tail(from + c, n - c));  // `to` is padded to whole vectors
}

template <class T>
LORA_MOE_INLINE void narrow_row(const acc_t<T>* from, T* to, int64_t n) {
  constexpr int64_t L = kLanes<acc_t<T>>;
  int64_t c = 0;
  for (; c + L <= n; c += L) store(to + c, load(from + c));
  if (c < n) store_tail(to + c, load(from + c), n - c);
}

// y = round(base + what add(first column, columns) adds to the sums), for rows [begin, end).
// `acc` points at the sums of each row; it is filled here and stays the same for every chunk.
template <class T, class F>
inline void write_rows(int64_t begin, int64_t end, int64_t D, Rows<const T> base, T* y,
                       std::vector<acc_t<T>*>& acc, F add) {
  using C = acc_t<T>;
  const int64_t n = end - begin;
  std::vector<C> sums(n * kChunk);
  acc.resize(n);
  for (int64_t t = 0; t < n; ++t) acc[t] = sums.data() + t * kChunk;
  for (int64_t c = 0; c < D; c += kChunk) {
    const int64_t columns = std::min(kChunk, D - c);
    for (int64_t t = 0; t < n; ++t) {
      if (base)
        widen_row(base.row(begin + t) + c, acc[t], columns);
      else
        std::fill_n(acc[t], kChunk, C(0));
    }
    add(c, columns);
    for (int64_t t = 0; t < n; ++t) narrow_row(acc[t], y + (begin + t) * D + c, columns);
  }
}

// f(first column, one past the last), in parallel over ranges of columns: sums over all tokens then
// have one owner each, who adds in the tokens' order.
template <class C, class F>
inline void for_columns(int64_t D, F f) {
  constexpr int64_t size = kTileVectors * kLanes<C>;
  torch::stable::parallel_for(0, (D + size - 1) / size, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i * size, std::min(D, (i + 1) * size));
  });
}

// Pointers to rows [begin, end) of a matrix.
template <class C>
inline std::vector<C*> pointers(C* p, int64_t stride, int64_t begin, int64_t end) {
  std::vector<C*> out(end - begin);
  for (int64_t t = begin; t < end; ++t) out[t - begin] = p + t * stride;
  return out;
}

}  // namespace lora_moe
