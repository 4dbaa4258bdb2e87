// The rows of each expert, and the slots of a range of tokens sorted by expert.
//
// Letters: T tokens, E experts, K slots per token, R rank rows.
#pragma once

#include <algorithm>
#include <vector>

#include "dot.h"
#include "rows.h"
#include "tensors.h"

namespace lora_moe {

struct Experts {
  Ints offsets;   // (E + 1) rows of b
  bool shared_a;  // every expert reads rows 0 .. r-1 of a
  int64_t E, R, max_rank;

  Experts(Ints offsets_, bool shared, int64_t expected) : offsets(std::move(offsets_)) {
    shared_a = shared;
    E = int64_t(offsets.size()) - 1;
    check(E >= 1 && E == expected, "offsets: expected ", expected + 1, " entries, got ", E + 1);
    check(offsets[0] == 0, "offsets: expected 0 first, got ", offsets[0]);
    max_rank = 0;
    for (int64_t e = 0; e < E; ++e) {
      check(rank(e) > 0, "offsets: expected ascending rows, got rank ", rank(e), " at expert ", e);
      check(!shared_a || rank(e) == rank(0), "offsets: expected equal ranks with a shared A");
      max_rank = std::max(max_rank, rank(e));
    }
    R = offsets[E];
  }
  int64_t rank(int64_t e) const { return offsets[e + 1] - offsets[e]; }
  int64_t rows_a() const { return shared_a ? max_rank : R; }
  // S holds the rows of each slot, one slot after another; with a shared A, one set of rows for
  // all.
  int64_t saved(int64_t K) const { return shared_a ? max_rank : K * max_rank; }
  int64_t column(int64_t slot) const { return shared_a ? 0 : slot * max_rank; }
};

// Slots of tokens [begin, end), as t * K + slot, sorted by expert and then by token.
struct Grouping {
  int64_t first;  // token
  Ints start;     // (E + 1)
  Ints slots;     // the n slots that are not empty
  Ints tokens;    // of each slot, counted from `begin`

  Grouping(const int32_t* indices, int64_t K, int64_t E, int64_t begin, int64_t end)
      : first(begin), start(E + 1) {
    for (int64_t i = begin * K; i < end * K; ++i)
      if (indices[i] >= 0) ++start[indices[i] + 1];
    for (int64_t e = 0; e < E; ++e) start[e + 1] += start[e];
    slots.resize(start[E]);
    tokens.resize(start[E]);
    Ints cursor(start.begin(), start.end() - 1);
    for (int64_t t = begin; t < end; ++t)
      for (int64_t i = t * K; i < (t + 1) * K; ++i)
        if (indices[i] >= 0) {
          const int64_t at = cursor[indices[i]]++;
          slots[at] = i;
          tokens[at] = t - begin;
        }
  }
  // The row of slot i in a matrix with one row per token, or with K rows per token.
  int64_t row(int64_t i, int64_t per_token) const {
    return per_token == 1 ? first + tokens[i] : slots[i];
  }
  // The slots, counted from the first one of `begin`.
  Ints slots_from_first(int64_t K) const {
    Ints own(slots);
    for (int64_t& slot : own) slot -= first * K;
    return own;
  }
  int64_t size() const { return int64_t(slots.size()); }
  int64_t count(int64_t e) const { return start[e + 1] - start[e]; }
};

// f(expert, first row, one past the last) for the rows of experts with slots: in parallel, with two
// tiles' rows per task, or sequentially.
template <class F>
inline void for_rows(const Experts& experts, const Grouping& group, bool parallel, int64_t bytes,
                     F f) {
  Ints first;  // experts and rows, alternating
  const int64_t step = parallel ? 2 * kTileColumns : experts.max_rank;
  for (int64_t e = 0; e < experts.E; ++e)
    for (int64_t i = 0; group.count(e) > 0 && i < experts.rank(e); i += step)
      first.push_back(e), first.push_back(i);
  for_tasks(int64_t(first.size()) / 2, parallel ? bytes : 0, [&](int64_t n) {
    const int64_t e = first[2 * n], i = first[2 * n + 1];
    f(e, i, std::min(experts.rank(e), i + step));
  });
}

// Rows of the experts in a parameter, as T.  If the rows are fp32 and x is 16-bit, a call with few
// tokens rounds only those of picked experts, as it reads them: decoding must not read the others.
template <class T>
class ExpertMatrix {
 public:
  using C = acc_t<T>;

  ExpertMatrix(const char* name, const Tensor& t, int64_t n, int64_t D, const Experts& experts,
               bool few)
      : D_(D), first_(experts.offsets.data()) {
    if (few && !std::is_same_v<T, C> && t.scalar_type() == scalar_type_of<C>()) {
      wide_ = rows<C>(name, t, n, D);
    } else if (t.scalar_type() == scalar_type_of<C>() && !std::is_same_v<T, C>) {
      rows_ = round_all(rows<C>(name, t, n, D), n);
    } else {
      rows_ = rows<T>(name, whole_ = as_dtype(t, scalar_type_of<T>()), n, D);
    }
  }

  int64_t row_bytes() const { return D_ * int64_t(wide_ ? sizeof(C) : sizeof(T)); }

  // f(row i of an expert, the stride of rows)
  template <class F>
  void with_row(int64_t e, int64_t i, F f) const {
    if constexpr (!std::is_same_v<T, C>)
      if (wide_) {
        const C* row = wide_.row(first_[e] + i);
        return f(reinterpret_cast<const rounded_to<T>*>(row), wide_.stride);
      }
    f(rows_.row(first_[e] + i), rows_.stride);
  }

 private:
  Rows<const T> round_all(Rows<const C> from, int64_t n) {
    T* to = mutable_data<T>(whole_ = empty<T>({n, D_}));
    constexpr int64_t some = 16;  // rows per task
    for_tasks((n + some - 1) / some, n * row_bytes(), [&](int64_t i) {
      for (int64_t row = i * some; row < std::min(n, (i + 1) * some); ++row)
        round_row(from.row(row), D_, to + row * D_);
    });
    return {to, D_};
  }

  int64_t D_;
  Tensor whole_;
  Rows<const C> wide_;
  Rows<const T> rows_;
  const int64_t* first_;  // of each expert
};

}  // namespace lora_moe
