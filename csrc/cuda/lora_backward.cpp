// Gradients of grouped_lora and routed_lora:
//
//   dS, H, dlogits in one pass over dy      dx = dS A + dlogits W
//   dB = H^T dy                             dA = dS^T x, dW = dlogits^T x
#include "linear.h"
#include "project.h"
#include "register.h"

namespace lora_moe::cuda {
namespace {

struct Needs {
  Ints frozen;
  bool x, w, a, b;  // w: the router's weight, or the caller's gate weights
};

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
      : device(x), a(as_dtype(lora_a, x.scalar_type())), b(as_dtype(lora_b, x.scalar_type())),
        g(x), ds(x), h(x), dweights(x), experts(offsets, shared_a, scaling, x, device.stream) {
    const Experts& e = experts.experts;
    const int64_t n = x.size(0), K = indices.size(1);
    shrink.tokens = middle.tokens = n, shrink.columns = dy.size(1), shrink.R = e.R;
    g = empty<float>(x, {n, e.R});
    ds = empty<T>(x, {n, e.W});
    h = empty<T>(x, {n, e.R});
    dweights = empty<float>(x, {n, K});
    shrink.x = rows<T>("dy", dy, x, n, shrink.columns);
    shrink.a = rows<T>("lora_B", b, x, e.R, shrink.columns);
    middle.g = shrink.s = mutable_data<float>(g);
    middle.router = router_of("softmax", false, e.E, K);
    middle.routing = routing_of(indices, weights, x);
    middle.experts = e;
    middle.s = contiguous<float>("S", s, x, {n, e.W});
    middle.ds = mutable_data<T>(ds), middle.h = mutable_data<T>(h);
    middle.dweights = mutable_data<float>(dweights);
  }

  // A frozen expert passes gradient on to x and the router; its own rows stay still.
  void zero_frozen(Tensor& grad, const Ints& frozen, const Ints& offsets) {
    char* data = static_cast<char*>(grad.mutable_data_ptr());
    const int64_t row = grad.size(1) * grad.element_size();
    for (int64_t e : frozen)
      require(cudaMemsetAsync(data + offsets[e] * row, 0, (offsets[e + 1] - offsets[e]) * row,
                              device.stream),
              "frozen experts");
  }

  // dA and dB, each in its parameter's dtype.
  std::tuple<Tensor, Tensor> parameters(const Tensor& dy, const Tensor& x, ScalarType a_dtype,
                                        ScalarType b_dtype, const Needs& needs,
                                        const Ints& offsets) {
    Tensor da = torch::stable::new_empty(x, {0}, a_dtype);
    Tensor db = torch::stable::new_empty(x, {0}, b_dtype);
    if (needs.a) da = gram_rows(ds, x, a_dtype, device.stream);
    if (needs.b) db = gram_rows(h, dy, b_dtype, device.stream);
    if (needs.a && !experts.experts.shared_a) zero_frozen(da, needs.frozen, offsets);
    if (needs.b) zero_frozen(db, needs.frozen, offsets);
    return {da, db};
  }
};

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Grads grouped_lora_backward(Tensor dy, Tensor x, Tensor a, Tensor b, Tensor s, Tensor indices,
                            Tensor weights, Tensor scaling, Ints offsets, bool shared_a,
                            Ints frozen, bool need_x, bool need_w, bool need_a, bool need_b,
                            std::string plan) {
  check_plan(plan);
  const Needs needs = {frozen, need_x, need_w, need_a, need_b};
  return dispatch(x, [&]<class T>() -> Grads {
    Backward<T> grad(dy, x, a, b, s, indices, weights, scaling, offsets, shared_a);
    project(grad.shrink, grad.middle, plan, x, grad.device.stream);
    Tensor dx = empty<T>(x, {0});
    if (need_x) dx = expand_rows(grad.ds, grad.a, {}, {}, {}, x.scalar_type());
    const auto [da, db] =
        grad.parameters(dy, x, a.scalar_type(), b.scalar_type(), needs, offsets);
    return {dx, need_w ? grad.dweights : empty<float>(x, {0}), da, db};
  });
}

Grads routed_lora_backward(Tensor dy, MaybeTensor dweights, MaybeTensor dlogits,
                           MaybeTensor dmean_prob, MaybeTensor dlse, Tensor x, Tensor w, Tensor a,
                           Tensor b, Tensor s, Tensor indices, Tensor weights, Tensor logits,
                           Tensor scaling, Ints offsets, bool shared_a, std::string gate,
                           bool renormalize, Ints frozen, bool need_x, bool need_w, bool need_a,
                           bool need_b, std::string plan) {
  check_plan(plan);
  const Needs needs = {frozen, need_x, need_w, need_a, need_b};
  return dispatch(x, [&]<class T>() -> Grads {
    Backward<T> grad(dy, x, a, b, s, indices, weights, scaling, offsets, shared_a);
    const int64_t n = x.size(0), E = scaling.size(0), K = indices.size(1);
    const RoutingGradTensors aux(dweights, dlogits, dmean_prob, dlse, logits, K);
    Tensor total = empty<float>(x, {n, E});
    grad.middle.router = router_of(gate, renormalize, E, K);
    grad.middle.aux = aux.grad;
    grad.middle.logits = contiguous<float>("logits", logits, x, {n, E});
    grad.middle.dlogits = mutable_data<float>(total);
    project(grad.shrink, grad.middle, plan, x, grad.device.stream);
    Tensor dx = empty<T>(x, {0});
    if (need_x) dx = expand_rows(grad.ds, grad.a, total, w, {}, x.scalar_type());
    Tensor dw = torch::stable::new_empty(x, {0}, w.scalar_type());
    if (need_w) dw = gram_rows(total, x, w.scalar_type(), grad.device.stream);
    const auto [da, db] =
        grad.parameters(dy, x, a.scalar_type(), b.scalar_type(), needs, offsets);
    return {dx, dw, da, db};
  });
}

}  // namespace

void register_backward(Library& library) {
  library.impl("grouped_lora_backward", TORCH_BOX(&grouped_lora_backward));
  library.impl("routed_lora_backward", TORCH_BOX(&routed_lora_backward));
}

}  // namespace lora_moe::cuda
