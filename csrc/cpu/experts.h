// Who belongs to whom: the rows of each expert, and the slots of a range of tokens sorted by
// expert.
//
// Letters: T tokens, E experts, K slots a token, R rank rows, W columns of the saved S.
#pragma once

#include <algorithm>
#include <vector>

#include "tensors.h"
#include "tiles.h"

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
  // S keeps the rows of each slot, one slot after the other; a shared A has one row set for all.
  int64_t saved(int64_t K) const { return shared_a ? max_rank : K * max_rank; }
  int64_t column(int64_t slot) const { return shared_a ? 0 : slot * max_rank; }
};

// Slots of tokens [begin, end), as t * K + slot, in order of expert and then of token.
struct Grouping {
  Ints start;   // (E + 1)
  Ints slots;   // the n slots that are not empty
  Ints tokens;  // of each slot, counted from `begin`

  Grouping(const int32_t* indices, int64_t K, int64_t E, int64_t begin, int64_t end)
      : start(E + 1) {
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
  int64_t size() const { return int64_t(slots.size()); }
  int64_t count(int64_t e) const { return start[e + 1] - start[e]; }
};

// f(expert, first row, one past the last) for the rows of experts with slots: in parallel, two
// tiles' rows a task, or one after the other.
template <class F>
inline void for_rows(const Experts& experts, const Grouping& group, bool parallel, int64_t bytes,
                     F f) {
  Ints first;  // experts and rows by turns
  const int64_t step = parallel ? 2 * kTileColumns : experts.max_rank;
  for (int64_t e = 0; e < experts.E; ++e)
    for (int64_t i = 0; group.count(e) > 0 && i < experts.rank(e); i += step)
      first.push_back(e), first.push_back(i);
  for_tasks(int64_t(first.size()) / 2, parallel ? bytes : 0, [&](int64_t n) {
    const int64_t e = first[2 * n], i = first[2 * n + 1];
    f(e, i, std::min(experts.rank(e), i + step));
  });
}

}  // namespace lora_moe
