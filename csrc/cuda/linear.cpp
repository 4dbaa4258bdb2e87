// The bare products:
//
//   shrink  S = x A^T, logits = x W^T      expand  y = base + H B + H2 B2      wgrad  H^T x
#include "linear.h"

#include "register.h"

namespace lora_moe::cuda {
namespace {

std::tuple<Tensor, Tensor> shrink_op(Tensor x, Tensor a, MaybeTensor w) {
  return shrink_rows(x, a, w);
}

Tensor wgrad_op(Tensor h, Tensor x) {
  const OnDevice device(x);
  return wgrad_rows(h, x, ScalarType::Float, device.stream);
}

Tensor expand_op(Tensor h, Tensor b, MaybeTensor h2, MaybeTensor b2, MaybeTensor base,
                 ScalarType dtype) {
  return expand_rows(h, b, h2, b2, base, dtype);
}

template <class T>
Tensor expand_to(const Tensor& h, const Tensor& b, const MaybeTensor& h2, const MaybeTensor& b2,
                 const MaybeTensor& base) {
  const OnDevice device(h);
  Tensor y = empty<T>(h, {h.size(0), b.size(1)});
  Expand<T> p;
  p.tokens = h.size(0), p.columns = b.size(1), p.R = b.size(0);
  p.h = rows<T>("H", h, h, p.tokens, p.R);
  p.b = rows<T>("lora_B", b, h, p.R, p.columns);
  p.R2 = b2 ? b2->size(0) : 0;
  p.h2 = rows<float>("H2", h2, h, p.tokens, p.R2);
  p.b2 = rows<float>("B2", b2, h, p.R2, p.columns);
  p.base = rows<T>("base", base, h, p.tokens, p.columns);
  p.y = mutable_data<T>(y);
  expand(p, device.stream);
  return y;
}

template <class H, class T>
Tensor wgrad_of(const Tensor& h, const Tensor& x, ScalarType dtype, cudaStream_t stream) {
  Wgrad<H, T> p;
  p.tokens = x.size(0), p.columns = x.size(1), p.R = h.size(1);
  if (p.tokens == 0 || p.columns == 0 || p.R == 0)
    return torch::stable::new_zeros(x, {p.R, p.columns}, dtype);
  p.h = rows<H>("H", h, x, p.tokens, p.R);
  p.x = rows<T>("x", x, x, p.tokens, p.columns);
  p.split_size = wgrad_split_size(p.tokens, p.columns, p.R);
  const int64_t count = ceil_div(p.tokens, p.split_size), n = p.R * p.columns;
  if (count == 1 && dtype == ScalarType::Float) {  // its sums are the result
    Tensor out = empty<float>(x, {p.R, p.columns});
    p.partial = mutable_data<float>(out);
    wgrad(p, stream);
    return out;
  }
  Tensor partial = empty<float>(x, {count, p.R, p.columns});
  Tensor out = torch::stable::new_empty(x, {p.R, p.columns}, dtype);
  p.partial = mutable_data<float>(partial);
  wgrad(p, stream);
  dispatch(out, [&]<class Out>() {
    add_splits<Out>(p.partial, count, n, mutable_data<Out>(out), stream);
  });
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor> shrink_rows(const Tensor& x, const Tensor& a, const MaybeTensor& w) {
  return dispatch(x, [&]<class T>() -> std::tuple<Tensor, Tensor> {
    const OnDevice device(x);
    const MaybeTensor wide_w = w ? MaybeTensor(wide(*w)) : w;
    Shrink<T> p;
    p.tokens = x.size(0), p.columns = p.split_size = x.size(1);
    p.R = a.size(0), p.E = w ? w->size(0) : 0;
    Tensor s = empty<float>(x, {p.tokens, p.R}), logits = empty<float>(x, {p.tokens, p.E});
    p.x = rows<T>("x", x, x, p.tokens, p.columns);
    p.a = rows<T>("lora_A", a, x, p.R, p.columns);
    p.w = rows<float>("router_weight", wide_w, x, p.E, p.columns);
    p.s = mutable_data<float>(s), p.logits = mutable_data<float>(logits);
    shrink(p, static_cast<const Middle<T>*>(nullptr), device.stream);
    return {s, logits};
  });
}

// Pairs of x's dtype use the tensor cores; fp32 pairs keep fp32 products for any x.
Tensor expand_rows(const Tensor& h, const Tensor& b, const MaybeTensor& h2, const MaybeTensor& b2,
                   const MaybeTensor& base, ScalarType dtype) {
  check(!h2 == !b2, "expand: expected H2 and B2 together");
  const bool exact = b.scalar_type() != dtype;
  check(!exact || !h2, "expand: expected B in the result's dtype with a second pair");
  const MaybeTensor wide_h = exact ? MaybeTensor(wide(h)) : h2 ? MaybeTensor(wide(*h2)) : h2;
  const MaybeTensor wide_b = exact ? MaybeTensor(wide(b)) : b2 ? MaybeTensor(wide(*b2)) : b2;
  Tensor none_h = torch::stable::new_empty(h, {h.size(0), 0}, dtype);
  Tensor none_b = torch::stable::new_empty(h, {0, b.size(1)}, dtype);
  const Tensor first_h = exact ? none_h : as_dtype(h, dtype), first_b = exact ? none_b : b;
  return dispatch(first_b,
                  [&]<class T>() { return expand_to<T>(first_h, first_b, wide_h, wide_b, base); });
}

Tensor wgrad_rows(const Tensor& h, const Tensor& x, ScalarType dtype, cudaStream_t stream) {
  if (dtype == ScalarType::Double)
    return as_dtype(wgrad_rows(h, x, ScalarType::Float, stream), dtype);
  return dispatch(x, [&]<class T>() {
    if constexpr (kHalf<T>)
      if (h.scalar_type() == scalar_type_of<T>()) return wgrad_of<T, T>(h, x, dtype, stream);
    return wgrad_of<float, T>(h, x, dtype, stream);
  });
}

void register_linear(Library& library) {
  library.impl("shrink", TORCH_BOX(&shrink_op));
  library.impl("expand", TORCH_BOX(&expand_op));
  library.impl("wgrad", TORCH_BOX(&wgrad_op));
}

}  // namespace lora_moe::cuda
