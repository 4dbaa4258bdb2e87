// Rows of the result, a chunk of columns at a time: sums stay in cache in fp32 (fp64) while expert
// after expert adds to them, and each number is rounded and written once.
#pragma once

#include "tensors.h"
#include "tiles.h"

namespace lora_moe {

constexpr int64_t kChunk = 256;  // columns
constexpr int64_t kMaxChunk = 2048;

// Sums for rows of bf16 columns are kept split into even and odd ones.
template <class T>
constexpr bool kSplit = std::is_same_v<T, bf16>;

template <class C>
std::unique_ptr<C[]> uninitialized(int64_t n) {
  return std::unique_ptr<C[]>(new C[n]);
}

template <class C>
inline const C* zeros() {
  alignas(64) static const C row[kMaxChunk] = {};
  return row;
}

// y = round(base + sums) for rows [begin, end) and columns [c, c + columns).  fp32 and fp64 add up
// in y itself; 16-bit rows need `scratch` of (end - begin) kChunk numbers.
template <class T>
class Sums {
 public:
  using C = acc_t<T>;
  static constexpr bool kInPlace = std::is_same_v<T, C>;

  Sums(int64_t begin, int64_t end, int64_t c, int64_t columns, Rows<const T> base, T* y, int64_t D,
       C* scratch, int64_t chunk, C* partial = nullptr)
      : columns_(columns),
        y_(y + begin * D + c),
        D_(D),
        chunk_(chunk),
        partial_(partial),
        from_(end - begin),
        to_(end - begin) {
    for (size_t t = 0; t < to_.size(); ++t) {
      from_[t] = zeros<C>();
      if constexpr (kInPlace) {
        to_[t] = y_ + t * D;
        if (base) from_[t] = base.row(begin + t) + c;
      } else {
        to_[t] = scratch + t * chunk;
        if (base) widen(base.row(begin + t) + c, to_[t]), from_[t] = to_[t];
      }
    }
  }

  // Adds h[i] (R) times rows b (R, columns) to row which[i], or i: n different ones, a row that
  // stands twice one after the other excepted.
  template <class B>
  void add(int64_t n, const int64_t* which, const C* const* h, int64_t R, const B* b, int64_t ldb) {
    if (partial_) return stream(n, which, h, R, b, ldb);
    const C* from[kTileRows];
    C* to[kTileRows];
    const int64_t most = tile_rows(n);
    for (int64_t i = 0, rows; i < n; i += rows) {
      for (rows = 0; rows < most && i + rows < n; ++rows) {
        const int64_t t = which ? which[i + rows] : i + rows;
        if (rows && to_[t] == to[rows - 1]) break;  // twice: not in the same tile
        if (from_[t] != to_[t]) prefetch<true>(y_ + t * D_ + kChunk, columns_);
        from[rows] = from_[t];
        from_[t] = to[rows] = to_[t];
      }
      add_rows<kSplit<T>>(h + i, rows, R, MatrixRows<B>{b, ldb}, columns_, from, to);
    }
  }

  void write() {
    for (size_t t = 0; t < to_.size(); ++t) {
      if constexpr (!kInPlace)
        narrow(from_[t], y_ + t * D_);
      else if (from_[t] != to_[t])
        std::copy_n(from_[t], columns_, to_[t]);
    }
  }

 private:
  static constexpr int64_t L = kLanes<C>;

  template <class B>
  void stream(int64_t n, const int64_t* which, const C* const* h, int64_t R, const B* b,
              int64_t ldb) {
    const C* from[kTileRows];
    C* to[kTileRows];
    for (int64_t i = 0; i < n; i += kTileRows) {
      const int64_t rows = std::min<int64_t>(kTileRows, n - i);
      for (int64_t run = 0; run < R; run += kRun) {
        for (int64_t m = 0; m < rows; ++m) {
          const int64_t t = which ? which[i + m] : i + m;
          from[m] = from_[t];
          from_[t] = to[m] = to_[t];
        }
        add_streams<kSplit<T>>(h + i, rows, run, std::min(R, run + kRun), b, ldb, columns_, from,
                               to, partial_, chunk_);
      }
    }
  }

  void widen(const T* from, C* to) const {
    for (int64_t c = 0; c < columns_; c += 2 * L) {
      const int64_t left = std::min(2 * L, columns_ - c);
      store_pair<false>(to + c, load_pair_tail<kSplit<T>>(from + c, left));
    }
  }
  void narrow(const C* from, T* to) const {
    int64_t c = 0;
    for (; c + 2 * L <= columns_; c += 2 * L)
      store_pair<kSplit<T>>(to + c, load_pair<false>(from + c));
    if (c < columns_) store_pair_tail<kSplit<T>>(to + c, load_pair<false>(from + c), columns_ - c);
  }

  int64_t columns_;
  T* y_;
  int64_t D_, chunk_;
  C* partial_;
  std::vector<const C*> from_;
  std::vector<C*> to_;
};

// Rows [begin, end) of y (T, D): add(sums, first column) for one chunk after the other.
template <class T, class F>
inline void write_rows(int64_t begin, int64_t end, int64_t D, Rows<const T> base, T* y, F add) {
  const auto scratch = uninitialized<acc_t<T>>((end - begin) * kChunk);
  for (int64_t c = 0; c < D; c += kChunk) {
    Sums<T> sums(begin, end, c, std::min(kChunk, D - c), base, y, D, scratch.get(),
                 kChunk);
    add(sums, c);
    sums.write();
  }
}

// The same for few rows, the chunks in parallel.
template <class T, class F>
inline void write_few_rows(int64_t n, int64_t D, int64_t bytes, Rows<const T> base, T* y, F add) {
  const int64_t share = D / torch::stable::get_num_threads() + 63;
  const int64_t chunk = std::clamp<int64_t>(share / 64 * 64, kChunk, 2048);
  for_tasks((D + chunk - 1) / chunk, bytes, [&](int64_t i) {
    const auto scratch = uninitialized<acc_t<T>>(n * chunk), partial = uninitialized<acc_t<T>>(kTileRows * chunk);
    const int64_t c = i * chunk;
    Sums<T> sums(0, n, c, std::min(chunk, D - c), base, y, D, scratch.get(), chunk, partial.get());
    add(sums, c);
    sums.write();
  });
}

// Columns of a sum over tokens that one task owns: a page of each row, so that one address
// translation serves several chunks, and no more sums than the second-level cache keeps beside
// them.
inline int64_t gradient_span(int64_t R) {
  return std::clamp<int64_t>((1 << 15) / R / kChunk * kChunk, kChunk, 1024);
}

// Pointers to rows [begin, end) of a matrix.
template <class C>
inline std::vector<C*> pointers(C* p, int64_t stride, int64_t begin, int64_t end) {
  std::vector<C*> out(end - begin);
  for (int64_t t = begin; t < end; ++t) out[t - begin] = p + t * stride;
  return out;
}

// A gradient that is a sum over tokens: rows of `out` in the parameter's dtype, T or the sums' own.
template <class T>
struct GradientRows {
  using C = acc_t<T>;
  void* data = nullptr;
  bool wide = false;
  int64_t D = 0;
  explicit operator bool() const { return data != nullptr; }

  // out[row + i][c .. c + columns) = sum over s of h[i][s] x[s][c ..]   for i < R, s < n.
  // A tile of a run of tokens stays in cache for all i, and the next one is on its way meanwhile.
  void sum(int64_t row, int64_t R, const C* h, int64_t n, const T* const* x, int64_t c,
           int64_t columns) const {
    const int64_t at = row * D + c;
    if (n == 0) return wide ? clear<C>(at, R, columns) : clear<T>(at, R, columns);
    // Sums in the result's own form that are complete after one run need no memory of their own.
    if (n <= kRun && !kSplit<T> && (wide || std::is_same_v<T, C>))
      return add_runs(static_cast<C*>(data) + at, D, R, h, n, x, c, columns);
    const int64_t stride = (columns + kTile - 1) / kTile * kTile;
    const auto sums = uninitialized<C>(R * stride);
    add_runs(sums.get(), stride, R, h, n, x, c, columns);
    for (int64_t i = 0; i < R; ++i) {
      if (wide)
        write(sums.get() + i * stride, static_cast<C*>(data) + at + i * D, columns);
      else
        write(sums.get() + i * stride, static_cast<T*>(data) + at + i * D, columns);
    }
  }

 private:
  static constexpr int64_t kTile = kTileColumns * kLanes<C>;

  template <class P>
  void clear(int64_t at, int64_t R, int64_t columns) const {
    for (int64_t i = 0; i < R; ++i) std::fill_n(static_cast<P*>(data) + at + i * D, columns, P());
  }

  static void add_runs(C* sums, int64_t stride, int64_t R, const C* h, int64_t n, const T* const* x,
                       int64_t c, int64_t columns) {
    for (int64_t s = 0; s < n; s += kRun) {
      const int64_t run = std::min(kRun, n - s);
      for (int64_t d = 0; d < columns; d += kTile) {
        const int64_t width = std::min(kTile, columns - d);
        const bool more = d + kTile < columns;
        const T* const* next = x + (more || s + run + run > n ? s : s + run);
        add(sums + d, stride, R, h + s, n, run, {x + s, c + d, next, more ? c + d + kTile : c},
            width, s == 0);
      }
    }
  }

  static void add(C* sums, int64_t stride, int64_t R, const C* h, int64_t ldh, int64_t n,
                  ListedRows<T> rows, int64_t columns, bool first) {
    const C *hs[kTileRows], *from[kTileRows];
    C* to[kTileRows];
    const int64_t most = tile_rows(R);
    for (int64_t i = 0; i < R; i += most) {
      const int64_t count = std::min(most, R - i);
      for (int64_t m = 0; m < count; ++m) {
        hs[m] = h + (i + m) * ldh;
        to[m] = sums + (i + m) * stride;
        from[m] = first ? zeros<C>() : to[m];
      }
      // every pass over the tile asks for its share of the next one's columns
      constexpr int64_t line = 64 / sizeof(T);
      const int64_t begin = i * kTile / R / line, end = (i + count) * kTile / R / line;
      ListedRows<T> share = rows;
      share.next_column += begin * line;
      share.count = (end - begin) * line;
      add_rows<kSplit<T>>(hs, count, n, share, columns, from, to);
    }
  }

  template <class P>
  static void write(const C* from, P* to, int64_t columns) {
    constexpr int64_t step = 2 * kLanes<C>;
    for (int64_t c = 0; c < columns; c += step)
      store_pair_tail<kSplit<T>>(to + c, load_pair<false>(from + c), std::min(step, columns - c));
  }
};

}  // namespace lora_moe
