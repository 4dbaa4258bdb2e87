// Rows of the result, one chunk of columns at a time: sums stay in cache in fp32 (fp64) while the
// experts add to them one after another, and each number is rounded and written once.
#pragma once

#include "add.h"
#include "dot.h"
#include "tensors.h"

namespace lora_moe {

constexpr int64_t kChunk = 256;            // columns
constexpr int64_t kFewChunk = 8 * kChunk;  // the most for few rows

// Sums for rows of bf16 are stored split into even and odd columns.
template <class T>
constexpr bool kSplit = std::is_same_v<T, bf16>;

template <class C>
std::unique_ptr<C[]> uninitialized(int64_t n) {
  return std::unique_ptr<C[]>(new C[n]);
}

template <class T>
inline const T* zeros() {
  alignas(64) static const T row[kFewChunk] = {};
  return row;
}

// Pointers to rows [begin, end) of a matrix.
template <class C>
inline std::vector<C*> pointers(C* p, int64_t stride, int64_t begin, int64_t end) {
  std::vector<C*> out(end - begin);
  for (int64_t t = begin; t < end; ++t) out[t - begin] = p + t * stride;
  return out;
}

template <class C, class H>
inline void round_row(const C* from, int64_t n, H* to) {
  int64_t i = 0;
  for (; i + kLanes<C> <= n; i += kLanes<C>) store(to + i, load(from + i));
  if (i < n) store_tail(to + i, load_tail(from + i, n - i), n - i);
}

// Rows of R numbers in the form that multiplies rows of T.
template <class T>
class Factors {
 public:
  using C = acc_t<T>;
  using H = factor_t<T>;

  Factors(std::vector<const C*> rows, int64_t R) {
    if constexpr (std::is_same_v<H, C>) {
      rows_ = std::move(rows);
    } else {
      const int64_t n = int64_t(rows.size());
      own_.reset(new H[n * R]);
      rows_ = pointers<const H>(own_.get(), R, 0, n);
      for (int64_t i = 0; i < n; ++i) round_row(rows[i], R, own_.get() + i * R);
    }
  }
  const H* const* data() const { return rows_.data(); }

 private:
  std::unique_ptr<H[]> own_;
  std::vector<const H*> rows_;
};

// y = round(base + sum of products) for rows [begin, end) of y (T, D), which may be columns of a
// wider matrix: `add` records a product, and `write` computes them all, one chunk of columns after
// another.  fp32 and fp64 accumulate in y itself.  `sharing` consecutive rows of y add to the same
// row of base.
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
        last_(tokens_, -1) {
    if (base_) base_.data = base_.row(begin / sharing);
  }

  // Adds h[i] (R) times rows b (R, D) to row which[i], or i; a row may occur twice in succession.
  // h are C and b rows of T or C; or h are factor_t<T> and b rows of T, or rounded to T.
  template <class H, class B>
  void add(int64_t n, const int64_t* which, const H* const* h, int64_t R, const B* b, int64_t ldb) {
    if (R == 0) return;
    auto& factors = factors_of<H>(*this);
    factors.resize(slots_.size());
    const int64_t most = tile_rows(n);
    for (int64_t i = 0, rows; i < n; i += rows) {
      const int64_t at = int64_t(slots_.size());
      for (rows = 0; rows < most && i + rows < n; ++rows) {
        const int64_t t = which ? which[i + rows] : i + rows;
        if (rows && t == slots_.back().row) break;  // twice: not in the same tile
        slots_.push_back({t, last_[t] < 0});
        factors.push_back(h[i + rows]);
        last_[t] = at + rows;
      }
      steps_.push_back({at, rows, R, ldb, b, &Sums::multiply<H, B>});
    }
  }

  void write() const { write(0, D_, kChunk, nullptr); }

  // The same for few rows, where reading the weights, `bytes` in all, dominates: every thread reads
  // its own columns, in parts of each row that are as long as possible.
  void write_few(int64_t bytes) const {
    const int64_t share = (D_ / torch::stable::get_num_threads() + 63) / 64 * 64;
    const int64_t chunk = std::clamp<int64_t>(share, 64, kFewChunk);
    for_tasks((D_ + chunk - 1) / chunk, bytes, [&](int64_t i) {
      Room<C> partial(std::min<int64_t>(kTileRows, tokens_) * chunk);
      write(i * chunk, std::min(D_, (i + 1) * chunk), chunk, partial.get());
    });
  }

  // These columns only, none of the next row.
  LORA_MOE_INLINE void ask_for(int64_t t, int64_t c, int64_t columns) const {
    const int64_t n = std::min(columns, D_ - c);
    prefetch<true>(y_.row(t) + c, n);
    if (base_) prefetch(base_row(t) + c, n);
  }

 private:
  struct Slot {
    int64_t row;
    bool first;  // whether it is the first to add to its row
  };
  using Row = std::conditional_t<kInPlace, SumRow<false, C>, RoundedRow<kSplit<T>, T>>;
  struct Step {
    int64_t at, rows, R, ldb;  // slots [at, at + rows)
    const void* b;
    void (Sums::*multiply)(const Step&, int64_t, int64_t, const Row*, C*, int64_t) const;
  };

  // Columns [begin, end).  `partial`: see stream_rows, which needs it.
  void write(int64_t begin, int64_t end, int64_t chunk, C* partial) const {
    Room<C> scratch(kInPlace ? 0 : tokens_ * chunk);
    std::vector<Row> out(slots_.size());
    for (int64_t c = begin; c < end; c += chunk) {
      const int64_t columns = std::min(chunk, end - c);
      for (size_t i = 0; i < slots_.size(); ++i) out[i] = row(i, c, scratch.get(), chunk);
      for (const Step& p : steps_) {
        (this->*p.multiply)(p, c, columns, out.data(), partial, chunk);
        for (int64_t i = p.at; !partial && c + chunk < end && i < p.at + p.rows; ++i)
          if (slots_[i].first) ask_for(slots_[i].row, c + chunk, columns);
      }
      for (int64_t t = 0; t < tokens_; ++t)
        if (last_[t] < 0) std::copy_n(base_row(t) + (base_ ? c : 0), columns, y_.row(t) + c);
    }
  }

  // Columns from c of the row of slot i.
  Row row(int64_t i, int64_t c, C* scratch, int64_t chunk) const {
    const auto [t, first] = slots_[i];
    const T* base = base_row(t) + (base_ ? c : 0);
    if constexpr (kInPlace)
      return {first ? base : y_.row(t) + c, y_.row(t) + c};
    else
      return {first ? base : nullptr, last_[t] == i ? y_.row(t) + c : nullptr, scratch + t * chunk};
  }

  const T* base_row(int64_t t) const {
    return base_ ? base_.row(sharing_ == 1 ? t : t / sharing_) : zeros<T>();
  }

  template <class H, class Self>
  static auto& factors_of(Self& self) {
    if constexpr (std::is_same_v<H, C>)
      return self.h_;
    else
      return self.rounded_;
  }

  template <class H, class B>
  void multiply(const Step& p, int64_t c, int64_t columns, const Row* out, C* partial,
                int64_t chunk) const {
    const H* const* h = factors_of<H>(*this).data() + p.at;
    const B* b = static_cast<const B*>(p.b) + c;
    if (partial)
      stream_rows<kSplit<T>>(h, p.rows, p.R, b, p.ldb, columns, out + p.at, partial, chunk);
    else
      add_rows<kSplit<T>>(h, p.rows, p.R, MatrixRows<B>{b, p.ldb}, columns, out + p.at);
  }

  int64_t tokens_, D_, sharing_;
  Rows<T> y_;
  Rows<const T> base_;
  Ints last_;  // slot of each row, or -1
  std::vector<Slot> slots_;
  std::vector<const C*> h_;  // of the slots
  std::vector<const factor_t<T>*> rounded_;
  std::vector<Step> steps_;
};

// Columns of a sum over tokens that one task owns: a page of each row, so that one address
// translation covers several chunks, and only as many sums as fit into the second-level cache.
inline int64_t gradient_span(int64_t R) {
  return std::clamp<int64_t>((1 << 15) / R / kChunk * kChunk, kChunk, 1024);
}

// A gradient that is a sum over tokens: rows of `out` in the parameter's dtype, T or that of sums.
template <class T>
struct GradientRows {
  using C = acc_t<T>;
  void* data = nullptr;
  bool wide = false;
  int64_t D = 0;
  explicit operator bool() const { return data != nullptr; }

  // out[row + i][c .. c + columns) = sum over s of h[i][s] x[s][c ..]   for i < R, s < n.
  // A tile of a run of tokens stays in cache for all i, while the next one is prefetched.
  template <class H>
  void sum(int64_t row, int64_t R, const H* h, int64_t n, const T* const* x, int64_t c,
           int64_t columns) const {
    const int64_t at = row * D + c;
    if (n == 0) return wide ? clear<C>(at, R, columns) : clear<T>(at, R, columns);
    // Sums in the result's dtype that are complete after one run need no separate memory.
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

  template <class H>
  static void add_runs(C* sums, int64_t stride, int64_t R, const H* h, int64_t n, const T* const* x,
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

  template <class H>
  static void add(C* sums, int64_t stride, int64_t R, const H* h, int64_t ldh, int64_t n,
                  ListedRows<T> rows, int64_t columns, bool first) {
    const H* hs[kTileRows];
    SumRow<kSplit<T>, C> out[kTileRows];
    const int64_t most = tile_rows(R);
    for (int64_t i = 0; i < R; i += most) {
      const int64_t count = std::min(most, R - i);
      for (int64_t m = 0; m < count; ++m) {
        C* to = sums + (i + m) * stride;
        hs[m] = h + (i + m) * ldh;
        out[m] = {first ? zeros<C>() : to, to};
      }
      // every pass over the tile prefetches its share of the next tile's columns
      constexpr int64_t line = 64 / sizeof(T);
      const int64_t begin = i * kTile / R / line, end = (i + count) * kTile / R / line;
      ListedRows<T> share = rows;
      share.next_column += begin * line;
      share.count = (end - begin) * line;
      add_rows<kSplit<T>>(hs, count, n, share, columns, out);
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
