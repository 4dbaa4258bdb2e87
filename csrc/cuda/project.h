// S and what follows in rank space: all columns of x in one block or, for few tokens, in splits
// over several blocks, added in order.
#pragma once

#include "experts.h"

namespace lora_moe::cuda {

constexpr int64_t kSplitSize = 256;  // columns: sixteen blocks for D_in = 4096

inline void check_plan(const std::string& plan) {
  check(plan == "rank_dense" || plan == "segmented" || plan == "decode",
        "plan: expected 'rank_dense', 'segmented' or 'decode', got '", plan, "'");
}

// Only the segmented plan has one row per slot.
inline void check_plan_of_slots(const std::string& slots, const std::string& plan) {
  check(slots == "none" || plan == "segmented", "plan: expected 'segmented' with slots '", slots,
        "', got '", plan, "'");
}

template <class T, class M>
void project(Shrink<T> p, const M& middle, const std::string& plan, const Tensor& x,
             cudaStream_t stream) {
  p.split_size = plan == "decode" ? kSplitSize : p.columns;
  if (p.splits() == 1) return shrink(p, &middle, stream);
  const int64_t count = p.splits(), T_R = p.tokens * p.R, T_E = p.tokens * p.E;
  float *s = p.s, *logits = p.logits;
  Tensor s_partial = empty<float>(x, {count, T_R}), logits_partial = empty<float>(x, {count, T_E});
  p.s = mutable_data<float>(s_partial), p.logits = mutable_data<float>(logits_partial);
  shrink(p, static_cast<const M*>(nullptr), stream);
  add_splits(p.s, count, T_R, s, stream);
  add_splits(p.logits, count, T_E, logits, stream);
  gate_ranks(middle, stream);
}

}  // namespace lora_moe::cuda
