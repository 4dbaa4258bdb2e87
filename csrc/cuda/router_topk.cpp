// The router:
//
//   logits = x W^T + router_bias, or given    p = gate(logits)
//   ids = top-k of p + bias                   weights = p[ids] (/ their sum)
#include "experts.h"
#include "register.h"

namespace lora_moe::cuda {
namespace {

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results router_topk(Tensor x, Tensor w, MaybeTensor bias, MaybeTensor router_bias, int64_t top_k,
                    std::string gate, bool renormalize, double top_p, double threshold) {
  const OnDevice device(x);
  const Router router = router_of(gate, renormalize, w.size(0), top_k, top_p, threshold);
  const RouterResults out = route(x, w, bias, router_bias, router, device.stream);
  return {out.indices, out.weights, out.logits, out.mean_prob, out.lse, out.counts};
}

// Only the decisions, from logits that are not changed.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> route_logits(Tensor logits, MaybeTensor bias,
                                                                int64_t top_k, std::string gate,
                                                                bool renormalize, double top_p,
                                                                double threshold) {
  const OnDevice device(logits);
  const int64_t T = logits.size(0), E = logits.size(1);
  Middle<float> middle;
  middle.router = router_of(gate, renormalize, E, top_k, top_p, threshold);
  add_biases(middle.router, bias, {}, logits);
  RouterResults out(logits, E, top_k);
  middle.routing = out.routing;
  middle.tokens = T;
  middle.logits = const_cast<float*>(contiguous<float>("logits", logits, logits, {T, E}));
  gate_ranks(middle, device.stream);
  out.finish(device.stream);
  return {out.indices, out.weights, out.mean_prob, out.lse, out.counts};
}

Tensor router_topk_backward(MaybeTensor dweights, MaybeTensor dlogits, MaybeTensor dmean_prob,
                            MaybeTensor dlse, Tensor indices, Tensor weights, Tensor logits,
                            std::string gate, bool renormalize) {
  const OnDevice device(logits);
  const int64_t T = logits.size(0), E = logits.size(1), K = indices.size(1);
  const RoutingGradTensors aux(dweights, dlogits, dmean_prob, dlse, logits, K);
  Tensor out = empty<float>(logits, {T, E});
  router_gradient(router_of(gate, renormalize, E, K), routing_of(indices, weights, logits),
                  aux.grad, contiguous<float>("logits", logits, logits, {T, E}), T,
                  mutable_data<float>(out), device.stream);
  return out;
}

}  // namespace

RouterResults route(const Tensor& x, const Tensor& w, const MaybeTensor& bias,
                    const MaybeTensor& router_bias, const Router& router, cudaStream_t stream) {
  const Tensor wide_w = wide(w);
  RouterResults out(x, router.E, router.K);
  out.logits = empty<float>(x, {x.size(0), router.E});
  dispatch(x, [&]<class T>() {
    Shrink<T> p;
    p.tokens = x.size(0), p.columns = p.split_size = x.size(1), p.E = router.E;
    p.x = rows<T>("x", x, x, p.tokens, p.columns);
    p.w = rows<float>("router_weight", wide_w, x, p.E, p.columns);
    p.logits = mutable_data<float>(out.logits);
    Middle<T> middle;
    middle.router = router, middle.routing = out.routing;
    add_biases(middle.router, bias, router_bias, x);
    middle.tokens = p.tokens, middle.logits = p.logits;
    shrink(p, &middle, stream);
  });
  out.finish(stream);
  return out;
}

void register_router(Library& library) {
  library.impl("router_topk", TORCH_BOX(&router_topk));
  library.impl("route_logits", TORCH_BOX(&route_logits));
  library.impl("router_topk_backward", TORCH_BOX(&router_topk_backward));
}

}  // namespace lora_moe::cuda
