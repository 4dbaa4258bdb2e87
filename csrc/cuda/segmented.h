// The segmented plan on tensors: the slots sorted by expert, S, H and their gradients a slot after
// the other.
//
// Letters: T tokens, E experts, K slots a token, R rank rows of all experts.
#pragma once

#include "experts.h"
#include "linear.h"

namespace lora_moe::cuda {

template <class T>
struct Segmented {
  cudaStream_t stream;
  Tensor x, indices, weights, order, starts;
  ExpertRows experts;
  Segments segments;

  Segmented(const Tensor& x_, const Tensor& indices_, const Tensor& weights_, const Tensor& scaling,
            const Ints& offsets, bool shared_a, cudaStream_t stream_)
      : stream(stream_),
        x(x_),
        indices(indices_),
        weights(weights_),
        order(empty<int32_t>(x, {indices.size(1), x.size(0)})),
        starts(empty<int32_t>(x, {indices.size(1), int64_t(offsets.size()) + 1})),
        experts(offsets, shared_a, scaling, x, stream) {
    segments.K = indices.size(1), segments.tokens = x.size(0);
    segments.max_rank = experts.max_rank;
    segments.experts = experts.experts;
    if (!shared_a) segments.experts.W = segments.K * segments.max_rank;
    segments.order = mutable_data<int32_t>(order);
    segments.starts = mutable_data<int32_t>(starts);
    sort_slots(segments, routing_of(indices, weights, x).indices, stream);
  }

  Ints slots() const { return {segments.tokens, int64_t(segments.K) * segments.max_rank}; }
  Ints saved() const { return {segments.tokens, segments.experts.W}; }

  // out (T, K max_rank) = v @ the rows of each slot's expert; what belongs to no rank is zero.
  Tensor shrink(const char* name, const Tensor& v, const Tensor& of_experts) {
    const int64_t columns = v.size(1);
    Tensor out = torch::stable::new_zeros(x, slots(), ScalarType::Float);
    if (segments.tokens > 0)
      segmented_shrink(segments, rows<T>(name, v, x, segments.tokens, columns),
                       rows<T>("experts", of_experts, x, segments.experts.R, columns), columns,
                       mutable_data<float>(out), stream);
    return out;
  }

  // y = base + h @ the rows of each slot's expert; a `wide` base is fp32, and overwritten.
  Tensor expand(Tensor& h, const Tensor& of_experts, const MaybeTensor& base, MaybeTensor wide) {
    const int64_t columns = of_experts.size(1);
    const bool add_wide = wide.has_value();
    Tensor y = empty<T>(x, {segments.tokens, columns});
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
  Tensor gram(Tensor& h, const Tensor& v, ScalarType dtype) {
    const int64_t columns = v.size(1);
    Tensor out = empty<float>(x, {segments.experts.R, columns});
    if (columns > 0)
      segmented_gram(segments, mutable_data<T>(h), rows<T>("v", v, x, segments.tokens, columns),
                     columns, mutable_data<float>(out), stream);
    return as_dtype(out, dtype);
  }
};

}  // namespace lora_moe::cuda
