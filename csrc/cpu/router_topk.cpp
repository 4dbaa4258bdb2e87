// The router:
//
//   logits = x W^T + router_bias, or given    p = gate(logits)
//   ids = top-k of p + bias                   weights = p[ids] (/ their sum)
#include "register.h"
#include "router.h"

namespace lora_moe {
namespace {

using Routing = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Routing router_topk(Tensor x, Tensor w, MaybeTensor bias, MaybeTensor router_bias, int64_t top_k,
                    std::string gate, bool renormalize, double top_p, double threshold) {
  return dispatch(x, w, [&]<class T, class RouterWeight>() -> Routing {
    Router<T, RouterWeight> router(x, w, bias, router_bias, top_k,
                                   Gate(gate, renormalize, top_p, threshold));
    if (router.blocks.few())
      router.few();
    else
      router.blocks.run([&](int64_t b, int64_t e) { router.block(b, e); });
    router.finish();
    return {router.indices,   router.weights, router.logits,
            router.mean_prob, router.lse,     router.counts};
  });
}

using Decided = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class C>
Decided decide(const Tensor& logits, const MaybeTensor& bias, int64_t top_k, Gate gate) {
  const int64_t T = logits.size(0), E = logits.size(1);
  const C* logit = contiguous<C>("logits", logits, {T, E});
  Decisions<C> out(T, E, bias, top_k, gate);
  out.blocks.run([&](int64_t begin, int64_t end) { out.decide(logit, begin, end); });
  out.finish();
  return {out.indices, out.weights, out.mean_prob, out.lse, out.counts};
}

Decided route_logits(Tensor logits, MaybeTensor bias, int64_t top_k, std::string gate,
                     bool renormalize, double top_p, double threshold) {
  const bool wide = logits.scalar_type() == ScalarType::Double;
  return (wide ? decide<double> : decide<float>)(logits, bias, top_k,
                                                 Gate(gate, renormalize, top_p, threshold));
}

template <class C>
Tensor backward(const MaybeTensor& dweights, const MaybeTensor& dlogits,
                const MaybeTensor& dmean_prob, const MaybeTensor& dlse, const Tensor& indices,
                const Tensor& weights, const Tensor& logits, Gate gate) {
  const int64_t T = logits.size(0), E = logits.size(1), K = indices.size(1);
  const RoutingGrad<C> grad(dweights, dlogits, dmean_prob, dlse, T, E, K);
  const int32_t* ids = contiguous<int32_t>("indices", indices, {T, K});
  const C* weight = contiguous<C>("weights", weights, {T, K});
  const C* logit = contiguous<C>("logits", logits, {T, E});
  check_ids(ids, T * K, E);
  Tensor out = empty<C>({T, E});
  Blocks(T).run([&](int64_t begin, int64_t end) {
    grad.back(gate, begin, end, logit, ids, weight, nullptr, mutable_data<C>(out), nullptr);
  });
  return out;
}

Tensor router_topk_backward(MaybeTensor dweights, MaybeTensor dlogits, MaybeTensor dmean_prob,
                            MaybeTensor dlse, Tensor indices, Tensor weights, Tensor logits,
                            std::string gate, bool renormalize) {
  const bool wide = logits.scalar_type() == ScalarType::Double;
  return (wide ? backward<double> : backward<float>)(dweights, dlogits, dmean_prob, dlse, indices,
                                                     weights, logits, Gate(gate, renormalize));
}

}  // namespace

void register_router(Library& library) {
  library.impl("router_topk", TORCH_BOX(&router_topk));
  library.impl("route_logits", TORCH_BOX(&route_logits));
  library.impl("router_topk_backward", TORCH_BOX(&router_topk_backward));
}

}  // namespace lora_moe
