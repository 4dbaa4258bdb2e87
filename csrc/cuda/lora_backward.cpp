// Gradients of grouped_lora and routed_lora:
//
//   dS, H, dlogits in one pass over dy      dx = dS A + dlogits W
//   dB = H^T dy                             dA = dS^T x, dW = dlogits^T x
//                                           drouter_bias = dlogits^T 1
#include "linear.h"
#include "project.h"
#include "register.h"
#include "segmented.h"

namespace lora_moe::cuda {
namespace {

struct Needs {
  Ints frozen;
  bool x, router, a, b;  // router: its weight, or the caller's weights of the slots
};

// A frozen expert passes gradients to x and the router; its own rows do not change.
void zero_frozen(Tensor& grad, const Ints& frozen, const Ints& offsets, cudaStream_t stream) {
  char* data = static_cast<char*>(grad.mutable_data_ptr());
  const int64_t row = grad.size(1) * grad.element_size();
  for (int64_t e : frozen)
    require(
        cudaMemsetAsync(data + offsets[e] * row, 0, (offsets[e + 1] - offsets[e]) * row, stream),
        "frozen experts");
}

// dS, H, the gradient of each slot's weight and of the logits.
template <class T>
struct Backward {
  OnDevice device;
  Tensor a, b, g, ds, h, dweights;
  ExpertRows experts;
  Shrink<T> shrink;
  MiddleGrad<T> middle;

  Backward(const Tensor& dy, const Tensor& x, const Tensor& lora_a, const Tensor& lora_b,
           const Tensor& s, const Tensor& indices, const Tensor& weights, const Tensor& scaling,
           const Ints& offsets, bool shared_a)
      : device(x),
        a(as_dtype(lora_a, x.scalar_type())),
        b(as_dtype(lora_b, x.scalar_type())),
        g(x),
        ds(x),
        h(x),
        dweights(x),
        experts(offsets, shared_a, scaling, x, device.stream) {
    const Experts& e = experts.experts;
    const int64_t n = x.size(0), K = indices.size(1);
    shrink.tokens = middle.tokens = n, shrink.columns = dy.size(1), shrink.R = e.R;
    g = empty<float>(x, {n, e.R});
    ds = empty<T>(x, {n, e.S_columns});
    h = empty<T>(x, {n, e.R});
    dweights = empty<float>(x, {n, K});
    shrink.x = rows<T>("dy", dy, x, n, shrink.columns);
    shrink.a = rows<T>("lora_B", b, x, e.R, shrink.columns);
    middle.g = shrink.s = mutable_data<float>(g);
    middle.router = router_of("softmax", false, e.E, K);
    middle.routing = routing_of(indices, weights, x);
    middle.experts = e;
    middle.s = contiguous<float>("S", s, x, {n, e.S_columns});
    middle.ds = mutable_data<T>(ds), middle.h = mutable_data<T>(h);
    middle.dweights = mutable_data<float>(dweights);
  }

  // dA and dB, each in its parameter's dtype.
  std::tuple<Tensor, Tensor> parameters(const Tensor& dy, const Tensor& x, ScalarType a_dtype,
                                        ScalarType b_dtype, const Needs& needs,
                                        const Ints& offsets) {
    Tensor da = torch::stable::new_empty(x, {0}, a_dtype);
    Tensor db = torch::stable::new_empty(x, {0}, b_dtype);
    if (needs.a) da = wgrad_rows(ds, x, a_dtype, device.stream);
    if (needs.b) db = wgrad_rows(h, dy, b_dtype, device.stream);
    if (needs.a && !experts.experts.shared_a) zero_frozen(da, needs.frozen, offsets, device.stream);
    if (needs.b) zero_frozen(db, needs.frozen, offsets, device.stream);
    return {da, db};
  }
};

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using RoutedGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// dlogits^T 1, in the same order as all sums over tokens, or nothing if it is not needed.
Tensor router_bias_grad(const Tensor& dlogits, bool needed, cudaStream_t stream) {
  if (!needed) return empty<float>(dlogits, {0});
  Tensor ones = torch::stable::new_empty(dlogits, {dlogits.size(0), 1}, ScalarType::Half);
  torch::stable::fill_(ones, 1.0);
  return torch::stable::view(wgrad_rows(dlogits, ones, ScalarType::Float, stream),
                             {dlogits.size(1)});
}

// What the router adds to a segmented backward: its weight, its inputs and its incoming gradients.
struct RouterGradient {
  Router router;
  const Tensor& w;
  const Tensor& logits;
  const RoutingGrad& aux;
};

// dx, dweights or dw, da, db of the segmented plan, and, empty without a router, dlogits.
template <class T>
RoutedGrads segmented_backward(const Tensor& dy, const Tensor& x, const Tensor& a, const Tensor& b,
                               const Tensor& s, const Tensor& indices, const Tensor& weights,
                               const Tensor& scaling, const Ints& offsets, bool shared_a,
                               RowsPerToken per, const Needs& needs, const RouterGradient* routed) {
  const OnDevice device(x);
  Segmented<T> plan(x, indices, weights, scaling, offsets, shared_a, per, device.stream);
  const Tensor a_rounded = as_dtype(a, x.scalar_type()), b_rounded = as_dtype(b, x.scalar_type());
  const int64_t n = plan.tokens(), E = scaling.size(0);
  Tensor g = plan.shrink("dy", dy, per.y, b_rounded), h = empty<T>(x, plan.slots());
  Tensor ds = empty<T>(x, plan.saved()), dweights = empty<float>(x, {n, indices.size(1)});
  Tensor dlogits = empty<float>(x, {n, routed ? E : 0});
  MiddleGrad<T> middle;
  middle.router.K = indices.size(1), middle.router.E = E, middle.tokens = n;
  middle.routing = plan.routing();
  middle.g = mutable_data<float>(g), middle.s = contiguous<float>("S", s, x, plan.saved());
  middle.ds = mutable_data<T>(ds), middle.h = mutable_data<T>(h);
  middle.dweights = mutable_data<float>(dweights);
  if (routed) {
    middle.router = routed->router, middle.aux = routed->aux;
    middle.logits = contiguous<float>("logits", routed->logits, x, {n, E});
    middle.dlogits = mutable_data<float>(dlogits);
  }
  segmented_gate(middle, plan.segments, device.stream);

  const ScalarType dtype = x.scalar_type();
  Tensor dx = empty<T>(x, {0}), dw = dweights;
  const MaybeTensor router_grad = routed ? MaybeTensor(dlogits) : std::nullopt;
  const MaybeTensor router_weight = routed ? MaybeTensor(wide(routed->w)) : std::nullopt;
  if (needs.x && shared_a) {
    dx = expand_rows(ds, a_rounded, router_grad, router_weight, {}, dtype);
  } else if (needs.x && per.x != 1) {
    dx = plan.expand_apart(ds, a_rounded, {});
  } else if (needs.x) {
    MaybeTensor through_router;
    if (routed)
      through_router = expand_rows(dlogits, *router_weight, {}, {}, {}, ScalarType::Float);
    dx = plan.expand(ds, a_rounded, {}, through_router);
  }
  if (routed)
    dw = needs.router ? wgrad_rows(dlogits, x, routed->w.scalar_type(), device.stream)
                      : torch::stable::new_empty(x, {0}, routed->w.scalar_type());
  else if (!needs.router)
    dw = empty<float>(x, {0});
  Tensor da = torch::stable::new_empty(x, {0}, a.scalar_type());
  Tensor db = torch::stable::new_empty(x, {0}, b.scalar_type());
  if (needs.a && shared_a) da = wgrad_rows(ds, x, a.scalar_type(), device.stream);
  if (needs.a && !shared_a) {
    da = plan.wgrad(ds, x, per.x, a.scalar_type());
    zero_frozen(da, needs.frozen, offsets, device.stream);
  }
  if (needs.b) {
    db = plan.wgrad(h, dy, per.y, b.scalar_type());
    zero_frozen(db, needs.frozen, offsets, device.stream);
  }
  return {dx, dw, da, db, dlogits};
}

Grads grouped_lora_backward(Tensor dy, Tensor x, Tensor a, Tensor b, Tensor s, Tensor indices,
                            Tensor weights, Tensor scaling, Ints offsets, bool shared_a,
                            std::string slots, Ints frozen, bool need_x, bool need_router,
                            bool need_a, bool need_b, std::string plan) {
  check_plan(plan);
  check_plan_of_slots(slots, plan);
  const RowsPerToken per(slots, indices.size(1), shared_a);
  const Needs needs = {frozen, need_x, need_router, need_a, need_b};
  return dispatch(x, [&]<class T>() -> Grads {
    if (plan == "segmented") {
      const auto [dx, dweights, da, db, dlogits] = segmented_backward<T>(
          dy, x, a, b, s, indices, weights, scaling, offsets, shared_a, per, needs, nullptr);
      return {dx, dweights, da, db};
    }
    Backward<T> grad(dy, x, a, b, s, indices, weights, scaling, offsets, shared_a);
    project(grad.shrink, grad.middle, plan, x, grad.device.stream);
    Tensor dx = empty<T>(x, {0});
    if (need_x) dx = expand_rows(grad.ds, grad.a, {}, {}, {}, x.scalar_type());
    const auto [da, db] = grad.parameters(dy, x, a.scalar_type(), b.scalar_type(), needs, offsets);
    return {dx, need_router ? grad.dweights : empty<float>(x, {0}), da, db};
  });
}

RoutedGrads routed_lora_backward(Tensor dy, MaybeTensor dweights, MaybeTensor dlogits,
                                 MaybeTensor dmean_prob, MaybeTensor dlse, Tensor x, Tensor w,
                                 Tensor a, Tensor b, Tensor s, Tensor indices, Tensor weights,
                                 Tensor logits, Tensor scaling, Ints offsets, bool shared_a,
                                 std::string gate, bool renormalize, Ints frozen, bool need_x,
                                 bool need_router, bool need_a, bool need_b, bool need_router_bias,
                                 std::string plan) {
  check_plan(plan);
  const Needs needs = {frozen, need_x, need_router, need_a, need_b};
  const int64_t n = x.size(0), E = scaling.size(0), K = indices.size(1);
  const RoutingGradTensors aux(dweights, dlogits, dmean_prob, dlse, logits, K);
  const Router router = router_of(gate, renormalize, E, K);
  return dispatch(x, [&]<class T>() -> RoutedGrads {
    if (plan == "segmented") {
      const OnDevice device(x);
      const RouterGradient routed = {router, w, logits, aux.grad};
      auto grads = segmented_backward<T>(dy, x, a, b, s, indices, weights, scaling, offsets,
                                         shared_a, {}, needs, &routed);
      std::get<4>(grads) = router_bias_grad(std::get<4>(grads), need_router_bias, device.stream);
      return grads;
    }
    Backward<T> grad(dy, x, a, b, s, indices, weights, scaling, offsets, shared_a);
    Tensor total = empty<float>(x, {n, E});
    grad.middle.router = router;
    grad.middle.aux = aux.grad;
    grad.middle.logits = contiguous<float>("logits", logits, x, {n, E});
    grad.middle.dlogits = mutable_data<float>(total);
    project(grad.shrink, grad.middle, plan, x, grad.device.stream);
    Tensor dx = empty<T>(x, {0});
    if (need_x) dx = expand_rows(grad.ds, grad.a, total, w, {}, x.scalar_type());
    Tensor dw = torch::stable::new_empty(x, {0}, w.scalar_type());
    if (need_router) dw = wgrad_rows(total, x, w.scalar_type(), grad.device.stream);
    const auto [da, db] = grad.parameters(dy, x, a.scalar_type(), b.scalar_type(), needs, offsets);
    return {dx, dw, da, db, router_bias_grad(total, need_router_bias, grad.device.stream)};
  });
}

}  // namespace

void register_backward(Library& library) {
  library.impl("grouped_lora_backward", TORCH_BOX(&grouped_lora_backward));
  library.impl("routed_lora_backward", TORCH_BOX(&routed_lora_backward));
}

}  // namespace lora_moe::cuda
