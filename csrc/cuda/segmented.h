// The segmented plan on tensors: the slots sorted by expert; S, H and their gradients, one slot
// after another.
//
// Letters: T tokens, E experts, K slots per token, R rank rows of all experts.
#pragma once

#include "experts.h"
#include "linear.h"

namespace lora_moe::cuda {

template <class T>
struct Segmented {
  cudaStream_t stream;
  RowsPerToken per;
  Tensor x, indices, weights, order, starts;
  ExpertRows experts;
  Segments segments;

  Segmented(const Tensor& x_, const Tensor& indices_, const Tensor& weights_, const Tensor& scaling,
            const Ints& offsets, bool shared_a, RowsPerToken per_token, cudaStream_t stream_)
      : stream(stream_),
        per(per_token),
        x(x_),
        indices(indices_),
        weights(weights_),
        order(empty<int32_t>(x, {indices.size(1), tokens()})),
        starts(empty<int32_t>(x, {indices.size(1), int64_t(offsets.size()) + 1})),
        experts(offsets, shared_a, scaling, x, stream) {
    segments.K = indices.size(1), segments.tokens = tokens();
    segments.max_rank = experts.max_rank;
    segments.experts = experts.experts;
    if (!shared_a) segments.experts.S_columns = segments.K * segments.max_rank;
    segments.order = mutable_data<int32_t>(order);
    segments.starts = mutable_data<int32_t>(starts);
    if (segments.K > 0) sort_slots(segments, routing().indices, stream);
  }

  int64_t tokens() const { return per.x == 1 ? x.size(0) : indices.size(0); }
  Routing routing() const { return routing_of(indices, weights, x, tokens()); }
  Ints slots() const { return {segments.tokens, int64_t(segments.K) * segments.max_rank}; }
  Ints saved() const { return {segments.tokens, segments.experts.S_columns}; }

  // One row per token, which all of its slots read, or one row per slot.
  Rows<T> rows_of(const char* name, const Tensor& v, int64_t per_token) const {
    Rows<T> out = rows<T>(name, v, x, segments.tokens * per_token, v.size(1));
    if (per_token != 1) out.slot = out.stride, out.stride *= per_token;
    return out;
  }

  // out (T, K max_rank) = v @ the rows of each slot's expert; zero in columns past its rank.
  Tensor shrink(const char* name, const Tensor& v, int64_t per_token, const Tensor& of_experts) {
    const int64_t columns = v.size(1);
    Tensor out = torch::stable::new_zeros(x, slots(), ScalarType::Float);
    if (segments.tokens * segments.K > 0)
      segmented_shrink(segments, rows_of(name, v, per_token),
                       rows<T>("experts", of_experts, x, segments.experts.R, columns), columns,
                       mutable_data<float>(out), stream);
    return out;
  }

  // y (T K, D) = base + h @ the rows of each slot's expert.
  Tensor expand_apart(Tensor& h, const Tensor& of_experts, const MaybeTensor& base) {
    const int64_t columns = of_experts.size(1);
    Tensor y = empty<T>(x, {segments.tokens * segments.K, columns});
    Rows<T> base_rows;
    const bool shared = base && base->size(0) == segments.tokens;
    if (base) base_rows = rows_of("base", *base, shared ? 1 : segments.K);
    if (segments.tokens > 0 && columns > 0)
      segmented_expand_apart(segments, mutable_data<T>(h),
                             rows<T>("experts", of_experts, x, segments.experts.R, columns),
                             base_rows, columns, mutable_data<T>(y), stream);
    return y;
  }

  // y = base + h @ the rows of each slot's expert; a `wide` base is fp32 and is overwritten.
  Tensor expand(Tensor& h, const Tensor& of_experts, const MaybeTensor& base, MaybeTensor wide) {
    const int64_t columns = of_experts.size(1);
    const bool add_wide = wide.has_value();
    Tensor y = empty<T>(x, {segments.tokens, columns});
    if (segments.K == 0) {
      if (!base) torch::stable::fill_(y, 0.0);
      if (base) torch::stable::copy_(y, *base);
      return y;
    }
    if (!wide && segments.K > 1) wide = empty<float>(x, {segments.tokens, columns});
    if (segments.tokens > 0 && columns > 0)
      segmented_expand(segments, mutable_data<T>(h),
                       rows<T>("experts", of_experts, x, segments.experts.R, columns),
                       rows<T>("base", base, x, segments.tokens, columns),
                       wide ? mutable_data<float>(*wide) : nullptr, add_wide, columns,
                       mutable_data<T>(y), stream);
    return y;
  }

  // H^T v (R, D), each expert over its own tokens.
  Tensor wgrad(Tensor& h, const Tensor& v, int64_t per_token, ScalarType dtype) {
    const int64_t columns = v.size(1);
    Tensor out = empty<float>(x, {segments.experts.R, columns});
    if (columns > 0)
      segmented_wgrad(segments, mutable_data<T>(h), rows_of("v", v, per_token), columns,
                      mutable_data<float>(out), stream);
    return as_dtype(out, dtype);
  }
};

}  // namespace lora_moe::cuda
