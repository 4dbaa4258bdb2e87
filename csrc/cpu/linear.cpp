// The bare products:
//
//   shrink  S = x A^T, logits = x W^T      expand  y = base + H B + H2 B2      wgrad  H^T x
#include "register.h"
#include "rows.h"

namespace lora_moe {
namespace {

std::tuple<Tensor, Tensor> shrink(Tensor x, Tensor a, MaybeTensor w) {
  return dispatch(x, w ? *w : a, [&]<class T, class RouterWeight>() -> std::tuple<Tensor, Tensor> {
    using C = acc_t<T>;
    const int64_t n = x.size(0), D = x.size(1), R = a.size(0), E = w ? w->size(0) : 0;
    const auto x_rows = rows<T>("x", x, n, D);
    const auto a_rows = rows<T>("lora_A", a, R, D);
    const auto w_rows = rows<RouterWeight>("router_weight", w, E, D);
    Tensor s = empty<C>({n, R}), logits = empty<C>({n, E});
    C *s_data = mutable_data<C>(s), *logits_data = mutable_data<C>(logits);
    Blocks(n).run([&](int64_t begin, int64_t end) {
      const auto xs = pointers(x_rows.data, x_rows.stride, begin, end);
      const auto ss = pointers(s_data, R, begin, end);
      dot_rows(xs.data(), ss.data(), end - begin, a_rows.data, a_rows.stride, R, D);
      if (!w) return;
      const auto ls = pointers(logits_data, E, begin, end);
      dot_rows(xs.data(), ls.data(), end - begin, w_rows.data, w_rows.stride, E, D);
    });
    return {s, logits};
  });
}

// One product to add: H (T, R) of the accumulator's type, B (R, D) of the result's or of H's.
template <class T>
struct Term {
  using C = acc_t<T>;
  const C* h = nullptr;
  int64_t R = 0;
  Rows<const T> b;
  Rows<const C> wide_b;

  Term() = default;
  Term(const Tensor& h_, const Tensor& b_, int64_t D) : R(h_.size(1)) {
    h = contiguous<C>("H", h_, {h_.size(0), R});
    if (b_.scalar_type() == scalar_type_of<C>())
      wide_b = rows<C>("lora_B", b_, R, D);
    else
      b = rows<T>("lora_B", b_, R, D);
  }
  void add(Sums<T>& sums, int64_t begin, int64_t end) const {
    if (!h) return;
    const auto hs = pointers(h, R, begin, end);
    if (wide_b)
      sums.add(end - begin, nullptr, hs.data(), R, wide_b.data, wide_b.stride);
    else
      sums.add(end - begin, nullptr, hs.data(), R, b.data, b.stride);
  }
  int64_t bytes(int64_t D) const { return R * D * int64_t(wide_b ? sizeof(C) : sizeof(T)); }
};

template <class T>
Tensor expand_to(const Tensor& h, const Tensor& b, const MaybeTensor& h2, const MaybeTensor& b2,
                 const MaybeTensor& base) {
  const int64_t n = h.size(0), D = b.size(1);
  const Term<T> first(h, b, D);
  check(!h2 || (b2 && h2->size(0) == n), "expand: expected H2 and B2 together, of H's rows");
  const Term<T> second = h2 ? Term<T>(*h2, *b2, D) : Term<T>();
  const auto base_rows = rows<T>("base", base, n, D);
  Tensor y = empty<T>({n, D});
  T* y_data = mutable_data<T>(y);
  const Blocks blocks(n);
  blocks.run([&](int64_t begin, int64_t end) {
    Sums<T> sums(begin, end, D, base_rows, {y_data, D});
    first.add(sums, begin, end);
    second.add(sums, begin, end);
    blocks.few() ? sums.write_few(first.bytes(D) + second.bytes(D)) : sums.write();
  });
  return y;
}

Tensor expand(Tensor h, Tensor b, MaybeTensor h2, MaybeTensor b2, MaybeTensor base,
              ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return expand_to<float>(h, b, h2, b2, base);
    case ScalarType::BFloat16:
      return expand_to<bf16>(h, b, h2, b2, base);
    case ScalarType::Half:
      return expand_to<f16>(h, b, h2, b2, base);
    case ScalarType::Double:
      return expand_to<double>(h, b, h2, b2, base);
    default:
      refuse("dtype: expected float32, float64, bfloat16 or float16, got ", text(dtype));
  }
}

Tensor wgrad(Tensor h, Tensor x) {
  return dispatch(x, [&]<class T>() {
    using C = acc_t<T>;
    const int64_t n = x.size(0), D = x.size(1), R = h.size(1);
    const auto x_rows = rows<T>("x", x, n, D);
    const C* h_data = contiguous<C>("H", h, {n, R});
    Tensor out = empty<C>({R, D});
    const GradientRows<T> gradient{mutable_data<C>(out), true, D};
    const auto xs = pointers(x_rows.data, x_rows.stride, 0, n);
    const auto columns = uninitialized<C>(R * n);  // H^T
    for (int64_t t = 0; t < n; ++t)
      for (int64_t i = 0; i < R; ++i) columns[i * n + t] = h_data[t * R + i];
    for_tasks((D + kChunk - 1) / kChunk, kSerialBytes, [&](int64_t i) {
      const int64_t c = i * kChunk;
      gradient.sum(0, R, columns.get(), n, xs.data(), c, std::min(kChunk, D - c));
    });
    return out;
  });
}

}  // namespace

void register_linear(Library& library) {
  library.impl("shrink", TORCH_BOX(&shrink));
  library.impl("expand", TORCH_BOX(&expand));
  library.impl("wgrad", TORCH_BOX(&wgrad));
}

}  // namespace lora_moe
