// Rows of the result, a chunk of columns at a time: sums stay in cache in fp32 (fp64) while expert
// after expert adds to them, and each number is rounded and written once.
#pragma once

#include "tensors.h"
#include "tiles.h"

namespace lora_moe {

constexpr int64_t kChunk = 256;            // columns
constexpr int64_t kFewChunk = 8 * kChunk;  // the most where rows are few

// Sums for rows of bf16 columns are kept split into even and odd ones.
template <class T>
constexpr bool kSplit = std::is_same_v<T, bf16>;

template <class C>
std::unique_ptr<C[]> uninitialized(int64_t n) {
  return std::unique_ptr<C[]>(new C[n]);
}

template <class C>
inline const C* zeros() {
  alignas(64) static const C row[kFewChunk] = {};
  return row;
}

// y = round(base + sum of products) for rows [begin, end) of y (T, D), which may be columns of a
// wider matrix: `add` notes a product,
// `write` computes them all, a chunk of columns after the other.  fp32 and fp64 add up in y itself.
// `sharing` rows of y, one after the other, add to the same row of base.
template <class T>
class Sums {
 public:
  using C = acc_t<T>;
  static constexpr bool kInPlace = std::is_same_v<T, C>;

  Sums(int64_t begin, int64_t end, int64_t D, Rows<const T> base, Rows<T> y, int64_t sharing = 1)
      : tokens_(end - begin),
        D_(D),
        sharing_(sharing),
        y_{y.row(begin), y.stride},
        base_(base),
        touched_(tokens_) {
    if (base_) base_.data = base_.row(begin / sharing);
  }

  // h[i] (R) times rows b (R, D) onto row which[i], or i; a row may stand twice, one after the
  // other.
  template <class B>
  void add(int64_t n, const int64_t* which, const C* const* h, int64_t R, const B* b, int64_t ldb) {
    if (R == 0) return;
    const int64_t most = tile_rows(n);
    for (int64_t i = 0, rows; i < n; i += rows) {
      const int64_t at = int64_t(slots_.size());
      for (rows = 0; rows < most && i + rows < n; ++rows) {
        const int64_t t = which ? which[i + rows] : i + rows;
        if (rows && t == slots_.back().row) break;  // twice: not in the same tile
        slots_.push_back({t, !touched_[t]});
        h_.push_back(h[i + rows]);
        touched_[t] = true;
      }
      steps_.push_back({at, rows, R, ldb, b, std::is_same_v<B, T>});
    }
  }

  void write() const { write(0, D_, kChunk, nullptr); }

  // The same for few rows, where reading the weights, so many bytes, takes the time: every thread
  // reads its own columns, as long a part of each row as can be.
  void write_few(int64_t bytes) const {
    const int64_t share = (D_ / torch::stable::get_num_threads() + 63) / 64 * 64;
    const int64_t chunk = std::clamp<int64_t>(share, 64, kFewChunk);
    for_tasks((D_ + chunk - 1) / chunk, bytes, [&](int64_t i) {
      Room<C> partial(std::min<int64_t>(kTileRows, tokens_) * chunk);
      write(i * chunk, std::min(D_, (i + 1) * chunk), chunk, partial.get());
    });
  }

 private:
  struct Slot {
    int64_t row;
    bool first;  // that adds to its row
  };
  struct Step {
    int64_t at, rows, R, ldb;  // slots [at, at + rows)
    const void* b;
    bool narrow;  // b: rows of T, or else of C
  };
  static constexpr int64_t L = kLanes<C>;

  // Columns [begin, end).  `partial`: see stream_rows, by which it is asked for.
  void write(int64_t begin, int64_t end, int64_t chunk, C* partial) const {
    Room<C> scratch(kInPlace ? 0 : tokens_ * chunk);
    std::vector<const C*> from(slots_.size());
    std::vector<C*> to(slots_.size());
    for (int64_t c = begin; c < end; c += chunk) {
      const int64_t columns = std::min(chunk, end - c);
      start(c, columns, chunk, scratch.get(), from.data(), to.data());
      for (const Step& p : steps_) {
        const auto run = [&](auto* b) {
          multiply(p, b + c, columns, from.data(), to.data(), partial, chunk);
        };
        p.narrow ? run(static_cast<const T*>(p.b)) : run(static_cast<const C*>(p.b));
        for (int64_t i = p.at; !partial && c + chunk < end && i < p.at + p.rows; ++i)
          if (slots_[i].first) prefetch<true>(y_.row(slots_[i].row) + c + chunk, columns);
      }
      finish(c, columns, chunk, scratch.get());
    }
  }

  const T* base_row(int64_t t) const { return base_.row(sharing_ == 1 ? t : t / sharing_); }

  void start(int64_t c, int64_t columns, int64_t chunk, C* scratch, const C** from, C** to) const {
    if constexpr (!kInPlace)
      for (int64_t t = 0; base_ && t < tokens_; ++t)
        widen(base_row(t) + c, columns, scratch + t * chunk);
    for (size_t i = 0; i < slots_.size(); ++i) {
      const auto [t, first] = slots_[i];
      if constexpr (kInPlace) {
        to[i] = y_.row(t) + c;
        from[i] = !first ? to[i] : base_ ? base_row(t) + c : zeros<C>();
      } else {
        to[i] = scratch + t * chunk;
        from[i] = first && !base_ ? zeros<C>() : to[i];
      }
    }
  }

  template <class B>
  void multiply(const Step& p, const B* b, int64_t columns, const C* const* from, C* const* to,
                C* partial, int64_t chunk) const {
    if (partial)
      stream_rows<kSplit<T>>(h_.data() + p.at, p.rows, p.R, b, p.ldb, columns, from + p.at,
                             to + p.at, partial, chunk);
    else
      add_rows<kSplit<T>>(h_.data() + p.at, p.rows, p.R, MatrixRows<B>{b, p.ldb}, columns,
                          from + p.at, to + p.at);
  }

  void finish(int64_t c, int64_t columns, int64_t chunk, const C* scratch) const {
    for (int64_t t = 0; t < tokens_; ++t) {
      T* y = y_.row(t) + c;
      if constexpr (!kInPlace)
        narrow(touched_[t] || base_ ? scratch + t * chunk : zeros<C>(), columns, y);
      else if (!touched_[t])
        std::copy_n(base_ ? base_row(t) + c : zeros<C>(), columns, y);
    }
  }

  static void widen(const T* from, int64_t columns, C* to) {
    for (int64_t c = 0; c < columns; c += 2 * L) {
      const int64_t left = std::min(2 * L, columns - c);
      store_pair<false>(to + c, load_pair_tail<kSplit<T>>(from + c, left));
    }
  }
  static void narrow(const C* from, int64_t columns, T* to) {
    int64_t c = 0;
    for (; c + 2 * L <= columns; c += 2 * L)
      store_pair<kSplit<T>>(to + c, load_pair<false>(from + c));
    if (c < columns) store_pair_tail<kSplit<T>>(to + c, load_pair<false>(from + c), columns - c);
  }

  int64_t tokens_, D_, sharing_;
  Rows<T> y_;
  Rows<const T> base_;
  std::vector<char> touched_;
  std::vector<Slot> slots_;
  std::vector<const C*> h_;  // of the slots
  std::vector<Step> steps_;
};

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
