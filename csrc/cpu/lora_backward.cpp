// Gradients of grouped_lora and routed_lora:
//
//   G = dy B^T            dweight of slot (t, e) = s_e sum over rows r of e of G_tr S_tr
//   dS = G w s            dlogits = router backward of dweights and of the auxiliary losses
//   dx = dS A + dlogits W
//   dB = H^T dy           dA, dW = [dS | dlogits]^T x
//
// First a pass over blocks of tokens (dy is read, dx written), then one over columns of x and of dy
// for the sums over tokens, each owned by one thread and taken in the tokens' order.
#include "experts.h"
#include "router.h"
#include "rows.h"

namespace lora_moe {
namespace {

struct Needs {
  Ints frozen;
  bool x, w, a, b;  // w: the router's weight, or the caller's gate weights
  bool is_frozen(int64_t e) const {
    return std::find(frozen.begin(), frozen.end(), e) != frozen.end();
  }
};

template <class C>
std::unique_ptr<C[]> uninitialized(int64_t n) {
  return std::unique_ptr<C[]>(new C[n]);
}

template <class T, class RouterWeight>
struct Backward {
  using C = acc_t<T>;
  Experts experts;
  Needs needs;
  int64_t tokens, D_in, D_out, K, W;
  Rows<const T> dy, x, a, b;
  Rows<const RouterWeight> w;
  const C *s, *weights, *scaling;
  const int32_t* ids;
  C *dweights = nullptr, *dlogits = nullptr;  // results of the first pass
  std::unique_ptr<C[]> ds, h;                 // (T, W), (T, K, max_rank)

  Backward(const Tensor& dy_, const Tensor& x_, const Tensor& a_, const Tensor& b_,
           const Tensor& s_, const Tensor& indices, const Tensor& weights_, const Tensor& scaling_,
           Ints offsets, bool shared_a, Needs needs_)
      : experts(std::move(offsets), shared_a, scaling_.size(0)), needs(std::move(needs_)) {
    tokens = x_.size(0), D_in = x_.size(1), D_out = b_.size(1), K = indices.size(1);
    W = experts.saved(K);
    dy = rows<T>("dy", dy_, tokens, D_out);
    x = rows<T>("x", x_, tokens, D_in);
    a = rows<T>("lora_A", a_, experts.rows_a(), D_in);
    b = rows<T>("lora_B", b_, experts.R, D_out);
    s = contiguous<C>("S", s_, {tokens, W});
    ids = contiguous<int32_t>("indices", indices, {tokens, K});
    weights = contiguous<C>("weights", weights_, {tokens, K});
    scaling = contiguous<C>("scaling", scaling_, {experts.E});
    check_ids(ids, tokens * K, experts.E);
    ds = uninitialized<C>(tokens * W);
    h = uninitialized<C>(tokens * K * experts.max_rank);
  }

  // dweights (T, K), dS and H of tokens [begin, end).
  void rank_gradient(const Grouping& group, int64_t begin, int64_t end) {
    const int64_t r = experts.max_rank, n = group.slots.size();
    std::vector<C> g(n * r);
    std::vector<const T*> from(n);
    for (int64_t i = 0; i < n; ++i) from[i] = dy.row(group.slots[i] / K);
    const auto to = pointers(g.data(), r, 0, n);
    std::fill_n(ds.get() + begin * W, (end - begin) * W, C(0));
    std::fill_n(dweights + begin * K, (end - begin) * K, C(0));
    for (int64_t e = 0; e < experts.E; ++e) {
      const int64_t first = group.start[e], rank = experts.rank(e);
      dot_rows(from.data() + first, to.data() + first, group.start[e + 1] - first,
               b.row(experts.offsets[e]), b.stride, rank, D_out);
      for (int64_t i = first; i < group.start[e + 1]; ++i)
        slot_gradient(group.slots[i], to[i], rank, scaling[e]);
    }
  }

  // dx of tokens [begin, end).
  void input_gradient(const Grouping& group, int64_t begin, int64_t end, T* dx) {
    const int64_t n = group.slots.size();
    std::vector<C*> acc, to(n);
    std::vector<const C*> from(n);
    for (int64_t i = 0; i < n; ++i) from[i] = row_ds(group.slots[i]);
    const auto all_ds = pointers<const C>(ds.get(), W, begin, end);
    const auto all_dlogits = pointers<const C>(dlogits, experts.E, begin, end);
    write_rows<T>(begin, end, D_in, {}, dx, acc, [&](int64_t c, int64_t columns) {
      for (int64_t i = 0; i < n; ++i) to[i] = acc[group.slots[i] / K - begin];
      if (experts.shared_a)
        expand_rows(all_ds.data(), acc.data(), end - begin, W, a.data + c, a.stride, columns);
      for (int64_t e = 0; !experts.shared_a && e < experts.E; ++e)
        expand_rows(from.data() + group.start[e], to.data() + group.start[e],
                    group.start[e + 1] - group.start[e], experts.rank(e),
                    a.row(experts.offsets[e]) + c, a.stride, columns);
      if (w)
        expand_rows(all_dlogits.data(), acc.data(), end - begin, experts.E, w.data + c, w.stride,
                    columns);
    });
  }

  // da (R or r, D_in), dw (E, D_in) and db (R, D_out); null pointers are not needed.
  void parameter_gradients(C* da, C* dw, C* db) {
    Grouping group;
    group.sort(ids, K, experts.E, 0, tokens);
    const int64_t n = group.slots.size();
    std::vector<const T*> xs(n), dys(n);
    std::vector<const C*> dss(n), hs(n);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t slot = group.slots[i];
      xs[i] = x.row(slot / K);
      dys[i] = dy.row(slot / K);
      dss[i] = row_ds(slot);
      hs[i] = h.get() + slot * experts.max_rank;
    }
    const auto all_x = pointers(x.data, x.stride, 0, tokens);
    const auto all_ds = pointers<const C>(ds.get(), W, 0, tokens);
    const auto all_dlogits = pointers<const C>(dlogits, experts.E, 0, dw ? tokens : 0);
    if (da || dw)
      for_columns<C>(D_in, [&](int64_t begin, int64_t end) {
        if (dw)
          gram_rows(all_dlogits.data(), all_x.data(), tokens, experts.E, begin, end, dw, D_in);
        if (da && experts.shared_a)
          gram_rows(all_ds.data(), all_x.data(), tokens, W, begin, end, da, D_in);
        else if (da)
          expert_grams(group, dss, xs, begin, end, da, D_in);
      });
    if (db)
      for_columns<C>(D_out, [&](int64_t begin, int64_t end) {
        expert_grams(group, hs, dys, begin, end, db, D_out);
      });
  }

 private:
  const C* row_ds(int64_t slot) const { return ds.get() + slot / K * W + experts.column(slot % K); }

  void slot_gradient(int64_t slot, const C* g, int64_t rank, C scale) {
    const C* from = s + slot / K * W + experts.column(slot % K);
    C* to = ds.get() + slot / K * W + experts.column(slot % K);
    C* h_row = h.get() + slot * experts.max_rank;
    const C gate = weights[slot] * scale;
    for (int64_t i = 0; i < rank; ++i) {
      to[i] += g[i] * gate;
      h_row[i] = from[i] * gate;
    }
    dweights[slot] = dot(g, from, rank) * scale;
  }

  void expert_grams(const Grouping& group, const std::vector<const C*>& left,
                    const std::vector<const T*>& right, int64_t begin, int64_t end, C* out,
                    int64_t ldo) {
    for (int64_t e = 0; e < experts.E; ++e) {
      // An expert without tokens, or frozen, sums over no rows: its gradient is written as zeros.
      const int64_t i = group.start[e], n = needs.is_frozen(e) ? 0 : group.start[e + 1] - i;
      gram_rows(left.data() + i, right.data() + i, n, experts.rank(e), begin, end,
                out + experts.offsets[e] * ldo, ldo);
    }
  }
};

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class T>
Tensor result(const Tensor& like, bool needed, Ints shape) {
  return empty<T>(like, needed ? shape : Ints{0});
}

template <class T>
T* pointer(Tensor& t, bool needed) {
  return needed ? mutable_data<T>(t) : nullptr;
}

Grads grouped_lora_backward(Tensor dy, Tensor x, Tensor a, Tensor b, Tensor s, Tensor indices,
                            Tensor weights, Tensor scaling, Ints offsets, bool shared_a,
                            Ints frozen, bool need_x, bool need_w, bool need_a, bool need_b,
                            std::string plan) {
  const Tensor a_rounded = as_dtype(a, x.scalar_type()), b_rounded = as_dtype(b, x.scalar_type());
  return dispatch(x, [&]<class T>() -> Grads {
    using C = acc_t<T>;
    Backward<T, T> backward(dy, x, a_rounded, b_rounded, s, indices, weights, scaling,
                            std::move(offsets), shared_a,
                            {std::move(frozen), need_x, need_w, need_a, need_b});
    const int64_t n = backward.tokens;
    Tensor dx = result<T>(x, need_x, {n, backward.D_in});
    Tensor dweights = empty<C>(x, {n, backward.K});
    Tensor da = result<C>(x, need_a, {a.size(0), backward.D_in});
    Tensor db = result<C>(x, need_b, {b.size(0), backward.D_out});
    backward.dweights = mutable_data<C>(dweights);
    T* dx_data = pointer<T>(dx, need_x);
    for_blocks(n, [&](int64_t, int64_t begin, int64_t end) {
      Grouping group;
      group.sort(backward.ids, backward.K, backward.experts.E, begin, end);
      backward.rank_gradient(group, begin, end);
      if (need_x) backward.input_gradient(group, begin, end, dx_data);
    });
    backward.parameter_gradients(pointer<C>(da, need_a), nullptr, pointer<C>(db, need_b));
    if (!need_w) dweights = empty<C>(x, {0});
    return {dx, dweights, as_dtype(da, a.scalar_type()), as_dtype(db, b.scalar_type())};
  });
}

Grads routed_lora_backward(Tensor dy, MaybeTensor dweights, MaybeTensor dlogits,
                           MaybeTensor dmean_prob, MaybeTensor dlse, Tensor x, Tensor w, Tensor a,
                           Tensor b, Tensor s, Tensor indices, Tensor weights, Tensor logits,
                           Tensor scaling, Ints offsets, bool shared_a, std::string gate_name,
                           bool renormalize, Ints frozen, bool need_x, bool need_w, bool need_a,
                           bool need_b, std::string plan) {
  const Tensor a_rounded = as_dtype(a, x.scalar_type()), b_rounded = as_dtype(b, x.scalar_type());
  return dispatch(x, w, [&]<class T, class W>() -> Grads {
    using C = acc_t<T>;
    const Gate gate(gate_name, renormalize);
    Backward<T, W> backward(dy, x, a_rounded, b_rounded, s, indices, weights, scaling,
                            std::move(offsets), shared_a,
                            {std::move(frozen), need_x, need_w, need_a, need_b});
    const int64_t n = backward.tokens, E = backward.experts.E, K = backward.K;
    const RoutingGrad<C> grad(dweights, dlogits, dmean_prob, dlse, n, E, K);
    const C* logit = contiguous<C>("logits", logits, {n, E});
    backward.w = rows<W>("router_weight", w, E, backward.D_in);
    const auto slot_grad = uninitialized<C>(n * K), logit_grad = uninitialized<C>(n * E);
    backward.dweights = slot_grad.get();
    backward.dlogits = logit_grad.get();
    Tensor dx = result<T>(x, need_x, {n, backward.D_in});
    Tensor dw = result<C>(x, need_w, {E, backward.D_in});
    Tensor da = result<C>(x, need_a, {a.size(0), backward.D_in});
    Tensor db = result<C>(x, need_b, {b.size(0), backward.D_out});
    T* dx_data = pointer<T>(dx, need_x);
    for_blocks(n, [&](int64_t, int64_t begin, int64_t end) {
      Grouping group;
      group.sort(backward.ids, K, E, begin, end);
      backward.rank_gradient(group, begin, end);
      std::vector<C> scratch(2 * E);
      for (int64_t t = begin; t < end; ++t) {
        C* slot = slot_grad.get() + t * K;
        for (int64_t j = 0; grad.weights && j < K; ++j) slot[j] += grad.weights[t * K + j];
        gate.backward(logit + t * E, backward.ids + t * K, backward.weights + t * K, (const C*)slot,
                      grad.mean_prob, C(1) / C(n), grad.lse ? grad.lse + t : nullptr,
                      grad.logits ? grad.logits + t * E : nullptr, E, K, scratch.data(),
                      scratch.data() + E, logit_grad.get() + t * E);
      }
      if (need_x) backward.input_gradient(group, begin, end, dx_data);
    });
    backward.parameter_gradients(pointer<C>(da, need_a), pointer<C>(dw, need_w),
                                 pointer<C>(db, need_b));
    return {dx, as_dtype(dw, w.scalar_type()), as_dtype(da, a.scalar_type()),
            as_dtype(db, b.scalar_type())};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_moe, CPU, m) {
  m.impl("grouped_lora_backward", TORCH_BOX(&grouped_lora_backward));
  m.impl("routed_lora_backward", TORCH_BOX(&routed_lora_backward));
}

}  // namespace lora_moe
