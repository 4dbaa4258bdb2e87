// Gradients of grouped_lora and routed_lora:
//
//   G = dy B^T            dweight of slot (t, e) = s_e sum over rows r of e of G_tr S_tr
//   dS = G w s            dlogits = router backward of dweights and of the auxiliary losses
//   dx = dS A + dlogits W
//   dB = H^T dy           dA, dW = [dS | dlogits]^T x       drouter_bias = dlogits^T 1
//
// With slots "apart", dy has one row per slot; with slots summed, x and dx do.
//
// First a pass over blocks of tokens (reads dy, writes dx), then one over chunks of columns of x
// and dy for the sums over tokens, each owned by one thread and added in the order of the tokens.
#include <functional>

#include "experts.h"
#include "register.h"
#include "router.h"
#include "rows.h"

namespace lora_moe {
namespace {

struct Needs {
  Ints frozen;
  bool x, router, a, b;  // router: its weight, or the caller's weights of the slots
  bool is_frozen(int64_t e) const {
    return std::find(frozen.begin(), frozen.end(), e) != frozen.end();
  }
};

template <class T, class RouterWeight>
struct Backward {
  using C = acc_t<T>;
  Experts experts;
  RowsPerToken per;
  Needs needs;
  int64_t tokens, D_in, D_out, K, S_columns;
  Rows<const T> dy, x;
  ExpertMatrix<T> a, b;
  Rows<const RouterWeight> w;
  const C *s, *weights, *scaling;
  const int32_t* ids;
  C *dweights = nullptr, *dlogits = nullptr;  // results of the first pass
  std::unique_ptr<C[]> ds;                    // (T, S_columns)
  // Factors of the sums over tokens: the numbers of one rank row are contiguous for all tokens.
  using H = factor_t<T>;
  std::unique_ptr<H[]> ds_columns, h_columns;
  std::unique_ptr<C[]> dlogits_columns;
  Ints place;  // position of a slot among those of its expert

  Backward(const Tensor& dy_, const Tensor& x_, const Tensor& a_, const Tensor& b_,
           const Tensor& s_, const Tensor& indices, const Tensor& weights_, const Tensor& scaling_,
           Ints offsets, bool shared_a, Needs needs_, RowsPerToken per_token = {})
      : experts(std::move(offsets), shared_a, scaling_.size(0)),
        per(per_token),
        needs(std::move(needs_)),
        tokens(indices.size(0)),
        D_in(x_.size(1)),
        D_out(b_.size(1)),
        K(indices.size(1)),
        S_columns(experts.saved(K)),
        a("lora_A", a_, experts.rows_a(), D_in, experts, Blocks(tokens).few()),
        b("lora_B", b_, experts.R, D_out, experts, Blocks(tokens).few()) {
    dy = rows<T>("dy", dy_, tokens * per.y, D_out);
    x = rows<T>("x", x_, tokens * per.x, D_in);
    s = contiguous<C>("S", s_, {tokens, S_columns});
    ids = contiguous<int32_t>("indices", indices, {tokens, K});
    weights = contiguous<C>("weights", weights_, {tokens, K});
    scaling = contiguous<C>("scaling", scaling_, {experts.E});
    check_ids(ids, tokens * K, experts.E);
    ds = uninitialized<C>(tokens * S_columns);
    ds_columns = uninitialized<H>(tokens * S_columns);
    h_columns = uninitialized<H>(tokens * K * experts.max_rank);
  }

  // The first pass: routing_gradient(begin, end) turns dweights of these tokens into dlogits.
  template <class F>
  Grouping tokens_pass(T* dx, F routing_gradient) {
    Grouping all(ids, K, experts.E, 0, tokens);
    place.resize(tokens * K);
    for (int64_t i = 0; i < all.size(); ++i) place[all.slots[i]] = i;
    const Blocks blocks(tokens, experts.E, K);
    blocks.run([&](int64_t begin, int64_t end) {
      const Grouping group(ids, K, experts.E, begin, end);
      rank_gradient(all, group, begin, end, blocks.few());
      routing_gradient(begin, end);
      if (dx) input_gradient(group, begin, end, blocks.few(), dx);
    });
    return all;
  }

  // The second: gradients of a (R or r, D_in), of w (E, D_in), of b (R, D_out) and, unless null, of
  // router_bias (E).
  void parameters_pass(const Grouping& all, GradientRows<T> da, GradientRows<T> dw,
                       GradientRows<T> db, C* drouter_bias) {
    const int64_t n = all.size();
    std::vector<const T*> xs(n), dys(n);
    for (int64_t i = 0; i < n; ++i)
      xs[i] = x.row(all.row(i, per.x)), dys[i] = dy.row(all.row(i, per.y));
    const auto all_x = pointers(x.data, x.stride, 0, tokens);
    std::vector<std::function<void()>> tasks;
    const auto add = [&](const GradientRows<T>& out, int64_t row, int64_t R, const auto* h,
                         int64_t count, const T* const* rows) {
      const int64_t span = gradient_span(R);
      for (int64_t c = 0; out && c < out.D; c += span)
        tasks.push_back([=] { out.sum(row, R, h, count, rows, c, std::min(span, out.D - c)); });
    };
    add(dw, 0, experts.E, dlogits_columns.get(), tokens, all_x.data());
    for (int64_t e = 0; drouter_bias && e < experts.E; ++e)
      tasks.push_back([=, this] { drouter_bias[e] = sum(dlogits_columns.get() + e * tokens); });
    if (experts.shared_a) add(da, 0, S_columns, ds_columns.get(), tokens, all_x.data());
    for (int64_t e = 0; e < experts.E; ++e) {
      // An expert that is frozen or has no tokens sums over no rows: its gradient is zero.
      const int64_t i = all.start[e], count = needs.is_frozen(e) ? 0 : all.count(e);
      const int64_t row = experts.offsets[e], rank = experts.rank(e), at = i * experts.max_rank;
      if (!experts.shared_a) add(da, row, rank, ds_columns.get() + at, count, xs.data() + i);
      add(db, row, rank, h_columns.get() + at, count, dys.data() + i);
    }
    const int64_t bytes = (tokens + experts.R) * (D_in + D_out) * int64_t(sizeof(T));
    for_tasks(int64_t(tasks.size()), bytes, [&](int64_t i) { tasks[i](); });
  }

 private:
  const C* row_ds(int64_t slot) const {
    return ds.get() + slot / K * S_columns + experts.column(slot % K);
  }

  // Over all tokens, in fp64: adding sequentially would lose bits that blocks keep.
  C sum(const C* column) const {
    double total = 0;
    for (int64_t t = 0; t < tokens; ++t) total += column[t];
    return C(total);
  }

  // dweights (T, K), dS and H of tokens [begin, end).
  void rank_gradient(const Grouping& all, const Grouping& group, int64_t begin, int64_t end,
                     bool few) {
    const int64_t r = experts.max_rank, n = group.size();
    const auto g = uninitialized<C>(n * r);
    std::fill_n(ds.get() + begin * S_columns, (end - begin) * S_columns, C(0));
    std::fill_n(dweights + begin * K, (end - begin) * K, C(0));
    const int64_t bytes = std::min(n, experts.E) * r * b.row_bytes();
    for_rows(experts, group, few, bytes, [&](int64_t e, int64_t first, int64_t last) {
      const int64_t i = group.start[e], count = group.count(e);
      std::vector<const T*> from;
      for (int64_t j = i; j < i + count; ++j) from.push_back(dy.row(group.row(j, per.y)));
      const auto to = pointers(g.get() + first, r, i, i + count);
      b.with_row(e, first, [&](auto* row, int64_t stride) {
        dot_rows(from.data(), to.data(), count, row, stride, last - first, D_out);
      });
    });
    for (int64_t e = 0; e < experts.E; ++e)
      for (int64_t i = group.start[e]; i < group.start[e + 1]; ++i)
        slot_gradient(all, group.slots[i], e, g.get() + i * r);
    if (experts.shared_a)
      for (int64_t t = begin; t < end; ++t)
        to_column(ds.get() + t * S_columns, S_columns, ds_columns.get() + t, tokens);
  }

  void slot_gradient(const Grouping& all, int64_t slot, int64_t e, const C* g) {
    const int64_t rank = experts.rank(e), count = all.count(e);
    const int64_t column = all.start[e] * experts.max_rank + place[slot] - all.start[e];
    const int64_t row = slot / K * S_columns + experts.column(slot % K);
    const C gate = weights[slot] * scaling[e];
    Room<C> memory(rank);
    C* h = memory.get();
    for (int64_t i = 0; i < rank; ++i) {
      ds[row + i] += g[i] * gate;
      h[i] = s[row + i] * gate;
    }
    if (!experts.shared_a) to_column(ds.get() + row, rank, ds_columns.get() + column, count);
    to_column(h, rank, h_columns.get() + column, count);
    dweights[slot] = dot(g, s + row, rank) * scaling[e];
  }

  static void to_column(const C* from, int64_t n, H* to, int64_t stride) {
    Room<H> memory(n);
    H* rounded = memory.get();
    round_row(from, n, rounded);
    for (int64_t i = 0; i < n; ++i) to[i * stride] = rounded[i];
  }

  // dx of tokens [begin, end).
  void input_gradient(const Grouping& group, int64_t begin, int64_t end, bool few, T* dx) {
    std::vector<const C*> rows;
    if (experts.shared_a)
      rows = pointers<const C>(ds.get(), S_columns, begin, end);
    else
      for (int64_t slot : group.slots) rows.push_back(row_ds(slot));
    const Factors<T> from(std::move(rows), experts.max_rank);
    const auto all_dlogits = pointers<const C>(dlogits, experts.E, begin, w ? end : begin);
    const Ints own = per.x == 1 ? Ints() : group.slots_from_first(K);
    const int64_t* to = (per.x == 1 ? group.tokens : own).data();
    Sums<T> sums(begin * per.x, end * per.x, D_in, {}, {dx, D_in});
    if (experts.shared_a)
      a.with_row(0, 0, [&](auto* row, int64_t stride) {
        sums.add(end - begin, nullptr, from.data(), S_columns, row, stride);
      });
    for (int64_t e = 0; !experts.shared_a && e < experts.E; ++e) {
      const int64_t i = group.start[e];
      a.with_row(e, 0, [&](auto* row, int64_t stride) {
        sums.add(group.count(e), to + i, from.data() + i, experts.rank(e), row, stride);
      });
    }
    if (w) sums.add(end - begin, nullptr, all_dlogits.data(), experts.E, w.data, w.stride);
    const int64_t picked = std::min(group.size(), experts.E) * experts.max_rank;
    few ? sums.write_few((experts.E + picked) * a.row_bytes()) : sums.write();
  }
};

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class T>
T* pointer(Tensor& t, bool needed) {
  return needed ? mutable_data<T>(t) : nullptr;
}

// The gradient of `parameter`, in its own dtype if the kernels can write it, else in that of the
// sums.
template <class T>
struct ParameterGradient {
  Tensor tensor;
  ScalarType dtype;
  GradientRows<T> rows;

  ParameterGradient(const Tensor& parameter, bool needed) : dtype(parameter.scalar_type()) {
    const bool wide = dtype != scalar_type_of<T>();
    const Ints shape = needed ? Ints{parameter.size(0), parameter.size(1)} : Ints{0};
    tensor = wide ? empty<acc_t<T>>(shape) : empty<T>(shape);
    if (needed) rows = {tensor.mutable_data_ptr(), wide, parameter.size(1)};
  }
  Tensor done() const { return as_dtype(tensor, dtype); }
};

Grads grouped_lora_backward(Tensor dy, Tensor x, Tensor a, Tensor b, Tensor s, Tensor indices,
                            Tensor weights, Tensor scaling, Ints offsets, bool shared_a,
                            std::string slots, Ints frozen, bool need_x, bool need_router,
                            bool need_a, bool need_b, std::string plan) {
  return dispatch(x, [&]<class T>() -> Grads {
    using C = acc_t<T>;
    Backward<T, T> backward(dy, x, a, b, s, indices, weights, scaling, std::move(offsets), shared_a,
                            {std::move(frozen), need_x, need_router, need_a, need_b},
                            RowsPerToken(slots, indices.size(1), shared_a));
    const int64_t n = backward.tokens;
    Tensor dx = empty<T>(need_x ? Ints{n * backward.per.x, backward.D_in} : Ints{0});
    Tensor dweights = empty<C>({n, backward.K});
    const ParameterGradient<T> da(a, need_a), db(b, need_b);
    backward.dweights = mutable_data<C>(dweights);
    const Grouping all = backward.tokens_pass(pointer<T>(dx, need_x), [](int64_t, int64_t) {});
    if (need_a || need_b) backward.parameters_pass(all, da.rows, {}, db.rows, nullptr);
    if (!need_router) dweights = empty<C>({0});
    return {dx, dweights, da.done(), db.done()};
  });
}

using RoutedGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

RoutedGrads routed_lora_backward(Tensor dy, MaybeTensor dweights, MaybeTensor dlogits,
                                 MaybeTensor dmean_prob, MaybeTensor dlse, Tensor x, Tensor w,
                                 Tensor a, Tensor b, Tensor s, Tensor indices, Tensor weights,
                                 Tensor logits, Tensor scaling, Ints offsets, bool shared_a,
                                 std::string gate_name, bool renormalize, Ints frozen, bool need_x,
                                 bool need_router, bool need_a, bool need_b, bool need_router_bias,
                                 std::string plan) {
  return dispatch(x, w, [&]<class T, class RouterWeight>() -> RoutedGrads {
    using C = acc_t<T>;
    const Gate gate(gate_name, renormalize);
    Backward<T, RouterWeight> backward(dy, x, a, b, s, indices, weights, scaling,
                                       std::move(offsets), shared_a,
                                       {std::move(frozen), need_x, need_router, need_a, need_b});
    const int64_t n = backward.tokens, E = backward.experts.E, K = backward.K;
    const RoutingGrad<C> grad(dweights, dlogits, dmean_prob, dlse, n, E, K);
    const C* logit = contiguous<C>("logits", logits, {n, E});
    backward.w = rows<RouterWeight>("router_weight", w, E, backward.D_in);
    const auto slot_grad = uninitialized<C>(n * K), logit_grad = uninitialized<C>(n * E);
    backward.dweights = slot_grad.get();
    backward.dlogits = logit_grad.get();
    backward.dlogits_columns = uninitialized<C>(E * n);
    Tensor dx = empty<T>(need_x ? Ints{n, backward.D_in} : Ints{0});
    const ParameterGradient<T> dw(w, need_router), da(a, need_a), db(b, need_b);
    Tensor drouter_bias = empty<C>({need_router_bias ? E : 0});
    const auto routing_gradient = [&](int64_t begin, int64_t end) {
      grad.back(gate, begin, end, logit, backward.ids, backward.weights, slot_grad.get(),
                logit_grad.get(), backward.dlogits_columns.get());
    };
    const Grouping all = backward.tokens_pass(pointer<T>(dx, need_x), routing_gradient);
    if (need_router || need_a || need_b || need_router_bias)
      backward.parameters_pass(all, da.rows, dw.rows, db.rows,
                               pointer<C>(drouter_bias, need_router_bias));
    return {dx, dw.done(), da.done(), db.done(), drouter_bias};
  });
}

}  // namespace

void register_backward(Library& library) {
  library.impl("grouped_lora_backward", TORCH_BOX(&grouped_lora_backward));
  library.impl("routed_lora_backward", TORCH_BOX(&routed_lora_backward));
}

}  // namespace lora_moe
