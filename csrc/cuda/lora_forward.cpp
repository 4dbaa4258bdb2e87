// y = base + gate(x A^T) B, with the routing given or decided from logits = x W^T.
#include "linear.h"
#include "project.h"
#include "register.h"
#include "segmented.h"

namespace lora_moe::cuda {
namespace {

// One forward over T tokens, up to H; the caller provides the routing or the router.
template <class T>
struct Forward {
  OnDevice device;
  Tensor a, s, h;
  ExpertRows experts;
  Shrink<T> shrink;
  Middle<T> middle;

  Forward(const Tensor& x, const Tensor& lora_a, const Tensor& scaling, const Ints& offsets,
          bool shared_a)
      : device(x),
        a(as_dtype(lora_a, x.scalar_type())),
        s(x),
        h(x),
        experts(offsets, shared_a, scaling, x, device.stream) {
    const Experts& e = experts.experts;
    shrink.tokens = middle.tokens = x.size(0), shrink.columns = x.size(1), shrink.R = e.S_columns;
    s = empty<float>(x, {shrink.tokens, e.S_columns});
    h = empty<T>(x, {shrink.tokens, e.R});
    shrink.x = rows<T>("x", x, x, shrink.tokens, shrink.columns);
    shrink.a = rows<T>("lora_A", a, x, e.S_columns, shrink.columns);
    middle.experts = e;
    middle.s = shrink.s = mutable_data<float>(s);
    middle.h = mutable_data<T>(h);
  }
};

// y and S of the segmented plan.
template <class T>
std::tuple<Tensor, Tensor> segmented_lora(const Tensor& x, const Tensor& a, const Tensor& b,
                                          const MaybeTensor& base, const Tensor& indices,
                                          const Tensor& weights, const Tensor& scaling,
                                          const Ints& offsets, bool shared_a, RowsPerToken per) {
  const OnDevice device(x);
  Segmented<T> plan(x, indices, weights, scaling, offsets, shared_a, per, device.stream);
  const Tensor a_rounded = as_dtype(a, x.scalar_type()), b_rounded = as_dtype(b, x.scalar_type());
  Tensor s =
      shared_a ? std::get<0>(shrink_rows(x, a_rounded, {})) : plan.shrink("x", x, per.x, a_rounded);
  Tensor h = empty<T>(x, plan.slots());
  Middle<T> middle;
  middle.routing = plan.routing();
  middle.s = mutable_data<float>(s), middle.h = mutable_data<T>(h);
  segmented_gate(middle, plan.segments, device.stream);
  if (per.y != 1) return {plan.expand_apart(h, b_rounded, base), s};
  return {plan.expand(h, b_rounded, base, {}), s};
}

std::tuple<Tensor, Tensor> grouped_lora(Tensor x, Tensor a, Tensor b, MaybeTensor base,
                                        Tensor indices, Tensor weights, Tensor scaling,
                                        Ints offsets, bool shared_a, std::string slots,
                                        std::string plan) {
  check_plan(plan);
  check_plan_of_slots(slots, plan);
  const RowsPerToken per(slots, indices.size(1), shared_a);
  return dispatch(x, [&]<class T>() -> std::tuple<Tensor, Tensor> {
    if (plan == "segmented")
      return segmented_lora<T>(x, a, b, base, indices, weights, scaling, offsets, shared_a, per);
    Forward<T> forward(x, a, scaling, offsets, shared_a);
    Middle<T>& middle = forward.middle;
    middle.router = router_of("softmax", false, scaling.size(0), indices.size(1));
    middle.routing = routing_of(indices, weights, x);
    project(forward.shrink, middle, plan, x, forward.device.stream);
    const Tensor b_rounded = as_dtype(b, x.scalar_type());
    return {expand_rows(forward.h, b_rounded, {}, {}, base, x.scalar_type()), forward.s};
  });
}

using Routed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Routed routed_lora(Tensor x, Tensor w, Tensor a, Tensor b, MaybeTensor base, MaybeTensor bias,
                   MaybeTensor router_bias, Tensor scaling, Ints offsets, bool shared_a,
                   int64_t top_k, std::string gate, bool renormalize, double top_p,
                   double threshold, std::string plan) {
  check_plan(plan);
  const int64_t E = scaling.size(0);
  const Router router = router_of(gate, renormalize, E, top_k, top_p, threshold);
  return dispatch(x, [&]<class T>() -> Routed {
    if (plan == "segmented") {
      const OnDevice device(x);
      const RouterResults out = route(x, w, bias, router_bias, router, device.stream);
      const auto [y, s] = segmented_lora<T>(x, a, b, base, out.indices, out.weights, scaling,
                                            offsets, shared_a, {});
      return {y, out.indices, out.weights, out.logits, out.mean_prob, out.lse, out.counts, s};
    }
    Forward<T> forward(x, a, scaling, offsets, shared_a);
    const Tensor wide_w = wide(w);
    RouterResults out(x, E, top_k);
    out.logits = empty<float>(x, {x.size(0), E});
    Shrink<T>& shrink = forward.shrink;
    Middle<T>& middle = forward.middle;
    middle.router = router;
    add_biases(middle.router, bias, router_bias, x);
    middle.routing = out.routing;
    shrink.E = E;
    shrink.w = rows<float>("router_weight", wide_w, x, E, shrink.columns);
    middle.logits = shrink.logits = mutable_data<float>(out.logits);
    project(shrink, middle, plan, x, forward.device.stream);
    out.finish(forward.device.stream);
    const Tensor b_rounded = as_dtype(b, x.scalar_type());
    Tensor y = expand_rows(forward.h, b_rounded, {}, {}, base, x.scalar_type());
    return {y, out.indices, out.weights, out.logits, out.mean_prob, out.lse, out.counts, forward.s};
  });
}

// Several layers that read the same x, one after another.
Tensor routed_lora_banks(Tensor x, std::vector<Tensor> w, std::vector<Tensor> a,
                         std::vector<Tensor> b, Tensor base, std::vector<MaybeTensor> bias,
                         std::vector<MaybeTensor> router_bias, std::vector<Tensor> scaling,
                         Ints offsets, bool shared_a, Ints starts, int64_t top_k, std::string gate,
                         bool renormalize, double top_p, double threshold, std::string plan) {
  Tensor y = torch::stable::new_empty(base, base.sizes());
  torch::stable::copy_(y, base);
  for (size_t i = 0; i < w.size(); ++i) {
    const int64_t width = b[i].size(1);
    Tensor before = torch::stable::narrow(base, 1, starts[i], width);
    Tensor into = torch::stable::narrow(y, 1, starts[i], width);
    const auto routed =
        routed_lora(x, w[i], a[i], b[i], before, bias[i], router_bias[i], scaling[i], offsets,
                    shared_a, top_k, gate, renormalize, top_p, threshold, plan);
    torch::stable::copy_(into, std::get<0>(routed));
  }
  return y;
}

}  // namespace

void register_forward(Library& library) {
  library.impl("routed_lora_banks", TORCH_BOX(&routed_lora_banks));
  library.impl("grouped_lora", TORCH_BOX(&grouped_lora));
  library.impl("routed_lora", TORCH_BOX(&routed_lora));
}

}  // namespace lora_moe::cuda
