// y_t = base_t + sum over slots j of  w_tj s_e B_e A_e x_t,  e = ids_tj.
//
// A block of tokens passes through everything while its rows are in cache: router and top-k, slots
// sorted by expert, shrink by the picked experts only, gate, expand.  x is read from memory once,
// y written once, and no work is done for experts that were not picked.
#include "experts.h"
#include "router.h"
#include "rows.h"

namespace lora_moe {
namespace {

template <class T>
struct Forward {
  using C = acc_t<T>;
  Experts experts;
  Rows<const T> x, a, b, base;
  const C* scaling;
  int64_t D_in, D_out, K, W;
  Tensor a_rounded, b_rounded, y, s;

  Forward(const Tensor& x_, const Tensor& a_, const Tensor& b_, const MaybeTensor& base_,
          const Tensor& scaling_, Ints offsets, bool shared_a, int64_t top_k)
      : experts(std::move(offsets), shared_a, scaling_.size(0)),
        K(top_k),
        a_rounded(as_dtype(a_, x_.scalar_type())),
        b_rounded(as_dtype(b_, x_.scalar_type())) {
    D_in = x_.size(1);
    D_out = b_.size(1);
    W = experts.saved(K);
    x = rows<T>("x", x_, x_.size(0), D_in);
    a = rows<T>("lora_A", a_rounded, experts.rows_a(), D_in);
    b = rows<T>("lora_B", b_rounded, experts.R, D_out);
    base = rows<T>("base", base_, x_.size(0), D_out);
    scaling = contiguous<C>("scaling", scaling_, {experts.E});
    y = empty<T>(x_, {x_.size(0), D_out});
    s = empty<C>(x_, {x_.size(0), W});
  }

  void block(int64_t begin, int64_t end, const int32_t* ids, const C* weights) {
    Grouping group;
    group.sort(ids, K, experts.E, begin, end);
    shrink(group, begin, end);
    const std::vector<C> h = gated(group, begin, weights);
    expand(group, h, begin, end);
  }

 private:
  void shrink(const Grouping& group, int64_t begin, int64_t end) {
    C* s_data = mutable_data<C>(s);
    std::fill_n(s_data + begin * W, (end - begin) * W, C(0));
    std::vector<const T*> from;
    std::vector<C*> to;
    if (experts.shared_a) {
      from = pointers(x.data, x.stride, begin, end);
      to = pointers(s_data, W, begin, end);
      dot_rows(from.data(), to.data(), end - begin, a.data, a.stride, experts.max_rank, D_in);
      return;
    }
    for (int64_t slot : group.slots) {
      from.push_back(x.row(slot / K));
      to.push_back(s_data + slot / K * W + experts.column(slot % K));
    }
    for (int64_t e = 0; e < experts.E; ++e) {
      const int64_t i = group.start[e], n = group.start[e + 1] - i;
      dot_rows(from.data() + i, to.data() + i, n, a.row(experts.offsets[e]), a.stride,
               experts.rank(e), D_in);
    }
  }

  // H of each slot in the group's order: (slots, max_rank).
  std::vector<C> gated(const Grouping& group, int64_t begin, const C* weights) {
    const int64_t r = experts.max_rank;
    std::vector<C> h(group.slots.size() * r);
    for (int64_t e = 0; e < experts.E; ++e)
      for (int64_t i = group.start[e]; i < group.start[e + 1]; ++i) {
        const int64_t slot = group.slots[i];
        const C gate = weights[slot] * scaling[e];
        const C* from = mutable_data<C>(s) + slot / K * W + experts.column(slot % K);
        for (int64_t j = 0; j < experts.rank(e); ++j) h[i * r + j] = from[j] * gate;
      }
    return h;
  }

  void expand(const Grouping& group, const std::vector<C>& h, int64_t begin, int64_t end) {
    const int64_t n = group.slots.size();
    const auto from = pointers(h.data(), experts.max_rank, 0, n);
    std::vector<C*> acc, to(n);
    write_rows<T>(
        begin, end, D_out, base, mutable_data<T>(y), acc, [&](int64_t c, int64_t columns) {
          for (int64_t i = 0; i < n; ++i) to[i] = acc[group.slots[i] / K - begin];
          for (int64_t e = 0; e < experts.E; ++e) {
            const int64_t i = group.start[e];
            expand_rows(from.data() + i, to.data() + i, group.start[e + 1] - i, experts.rank(e),
                        b.row(experts.offsets[e]) + c, b.stride, columns);
          }
        });
  }
};

void check_plan(const std::string& plan) {
  check(plan == "segmented", "plan: the C++ backend runs 'segmented' only, got '", plan, "'");
}

std::tuple<Tensor, Tensor> grouped_lora(Tensor x, Tensor a, Tensor b, MaybeTensor base,
                                        Tensor indices, Tensor weights, Tensor scaling,
                                        Ints offsets, bool shared_a, std::string plan) {
  check_plan(plan);
  return dispatch(x, [&]<class T>() -> std::tuple<Tensor, Tensor> {
    using C = acc_t<T>;
    const int64_t n = x.size(0), K = indices.size(1);
    const int32_t* ids = contiguous<int32_t>("indices", indices, {n, K});
    const C* weight = contiguous<C>("weights", weights, {n, K});
    Forward<T> forward(x, a, b, base, scaling, std::move(offsets), shared_a, K);
    check_ids(ids, n * K, forward.experts.E);
    for_blocks(
        n, [&](int64_t, int64_t begin, int64_t end) { forward.block(begin, end, ids, weight); });
    return {forward.y, forward.s};
  });
}

using Routed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Routed routed_lora(Tensor x, Tensor w, Tensor a, Tensor b, MaybeTensor base, MaybeTensor bias,
                   Tensor scaling, Ints offsets, bool shared_a, int64_t top_k, std::string gate,
                   bool renormalize, double top_p, double threshold, std::string plan) {
  check_plan(plan);
  return dispatch(x, w, [&]<class T, class W>() -> Routed {
    Router<T, W> router(x, w, bias, top_k, Gate(gate, renormalize, top_p, threshold));
    Forward<T> forward(x, a, b, base, scaling, std::move(offsets), shared_a, top_k);
    check(router.E == forward.experts.E, "router_weight: expected ", forward.experts.E,
          " rows, one per expert, got ", router.E);
    const int32_t* ids = mutable_data<int32_t>(router.indices);
    const acc_t<T>* weights = mutable_data<acc_t<T>>(router.weights);
    for_blocks(router.tokens, [&](int64_t number, int64_t begin, int64_t end) {
      router.block(number, begin, end);
      forward.block(begin, end, ids, weights);
    });
    router.finish();
    return {forward.y,        router.indices, router.weights, router.logits,
            router.mean_prob, router.lse,     router.counts,  forward.s};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_moe, CPU, m) {
  m.impl("grouped_lora", TORCH_BOX(&grouped_lora));
  m.impl("routed_lora", TORCH_BOX(&routed_lora));
}

}  // namespace lora_moe
