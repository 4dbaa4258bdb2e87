// y_t = base_t + sum over slots j of  w_tj s_e B_e A_e x_t,  e = ids_tj;
// or with one y_tj per slot ("apart"), or one x_tj per slot ("sum").
//
// A block of tokens goes through all steps while its rows are in cache: router and top-k, sorting
// slots by expert, shrink by the picked experts only, gate, expand.  x is read from memory once, y
// is written once, and no work is done for experts that were not picked.
#include "experts.h"
#include "register.h"
#include "router.h"
#include "rows.h"

namespace lora_moe {
namespace {

template <class T>
struct Forward {
  using C = acc_t<T>;
  Experts experts;
  RowsPerToken per;
  Rows<const T> x, base;
  Rows<T> out;
  const C* scaling;
  int64_t tokens, D_in, D_out, K, S_columns, sharing;
  ExpertMatrix<T> a, b;
  Tensor y, s;
  C* s_data;

  Forward(const Tensor& x_, const Tensor& a_, const Tensor& b_, const MaybeTensor& base_,
          const Tensor& scaling_, Ints offsets, bool shared_a, int64_t n, int64_t top_k,
          RowsPerToken per_token = {})
      : experts(std::move(offsets), shared_a, scaling_.size(0)),
        per(per_token),
        tokens(n),
        D_in(x_.size(1)),
        D_out(b_.size(1)),
        K(top_k),
        S_columns(experts.saved(top_k)),
        a("lora_A", a_, experts.rows_a(), D_in, experts, Blocks(tokens).few()),
        b("lora_B", b_, experts.R, D_out, experts, Blocks(tokens).few()) {
    x = rows<T>("x", x_, tokens * per.x, D_in);
    const bool shares = per.y != 1 && base_ && base_->size(0) == tokens;
    sharing = shares ? std::max<int64_t>(per.y, 1) : 1;
    base = rows<T>("base", base_, shares ? tokens : tokens * per.y, D_out);
    scaling = contiguous<C>("scaling", scaling_, {experts.E});
    s_data = mutable_data<C>(s = empty<C>({tokens, S_columns}));
  }

  // y is a new tensor, or `into` if the caller has one.
  void make_y() { out = {mutable_data<T>(y = empty<T>({tokens * per.y, D_out})), D_out}; }
  void into(Rows<const T> base_, Rows<T> out_) { base = base_, out = out_; }

  // Tokens [begin, end) through shrink, gate and expand: one block, or a few tokens in parallel.
  void run(int64_t begin, int64_t end, const int32_t* ids, const C* weights, bool few) {
    const Grouping group(ids, K, experts.E, begin, end);
    Sums<T> sums(begin * per.y, end * per.y, D_out, base, out, sharing);
    shrink(group, begin, end, few, sums);
    const auto h = gated(group, weights);
    const Factors<T> hs(pointers<const C>(h.get(), experts.max_rank, 0, group.size()),
                        experts.max_rank);
    const Ints own = per.y == 1 ? Ints() : group.slots_from_first(K);
    const int64_t* to = (per.y == 1 ? group.tokens : own).data();
    for (int64_t e = 0; e < experts.E; ++e) {
      const int64_t i = group.start[e];
      b.with_row(e, 0, [&](auto* row, int64_t stride) {
        sums.add(group.count(e), to + i, hs.data() + i, experts.rank(e), row, stride);
      });
    }
    few ? sums.write_few(weight_bytes(group, b)) : sums.write();
  }

 private:
  int64_t weight_bytes(const Grouping& group, const ExpertMatrix<T>& weights) const {
    return std::min(group.size(), experts.E) * experts.max_rank * weights.row_bytes();
  }

  void shrink(const Grouping& group, int64_t begin, int64_t end, bool few, const Sums<T>& sums) {
    const int64_t bytes = weight_bytes(group, a);
    if (experts.shared_a) {
      const auto from = pointers(x.data, x.stride, begin, end);
      const auto to = pointers(s_data, S_columns, begin, end);
      a.with_row(0, 0, [&](auto* row, int64_t stride) {
        dot_rows(from.data(), to.data(), end - begin, row, stride, S_columns, D_in);
      });
      return;
    }
    std::fill_n(s_data + begin * S_columns, (end - begin) * S_columns, C(0));
    for_rows(experts, group, few, bytes, [&](int64_t e, int64_t first, int64_t last) {
      std::vector<const T*> from;
      std::vector<C*> to;
      for (int64_t i = group.start[e]; i < group.start[e + 1]; ++i) {
        from.push_back(x.row(group.row(i, per.x)));
        to.push_back(row_s(group.slots[i]) + first);
      }
      if (!few && per.y == 1)
        for (int64_t i = group.start[e]; i < group.start[e + 1]; ++i)
          if (group.slots[i] % K == 0) sums.ask_for(group.tokens[i], 0, kChunk);
      a.with_row(e, first, [&](auto* row, int64_t stride) {
        dot_rows(from.data(), to.data(), group.count(e), row, stride, last - first, D_in);
      });
    });
  }

  // H of each slot in the group's order: (slots, max_rank).
  std::unique_ptr<C[]> gated(const Grouping& group, const C* weights) {
    const int64_t r = experts.max_rank;
    auto h = uninitialized<C>(group.size() * r);
    for (int64_t e = 0; e < experts.E; ++e)
      for (int64_t i = group.start[e]; i < group.start[e + 1]; ++i) {
        const C gate = weights[group.slots[i]] * scaling[e];
        const C* from = row_s(group.slots[i]);
        for (int64_t j = 0; j < experts.rank(e); ++j) h[i * r + j] = from[j] * gate;
        std::fill(h.get() + i * r + experts.rank(e), h.get() + (i + 1) * r, C(0));
      }
    return h;
  }

  C* row_s(int64_t slot) { return s_data + slot / K * S_columns + experts.column(slot % K); }
};

template <class T>
void copy_columns(Rows<const T> from, Rows<T> to, int64_t n, int64_t begin, int64_t end) {
  for (int64_t t = 0; begin < end && t < n; ++t)
    std::copy(from.row(t) + begin, from.row(t) + end, to.row(t) + begin);
}

void check_plan(const std::string& plan) {
  check(plan == "segmented", "plan: the C++ backend runs 'segmented' only, got '", plan, "'");
}

std::tuple<Tensor, Tensor> grouped_lora(Tensor x, Tensor a, Tensor b, MaybeTensor base,
                                        Tensor indices, Tensor weights, Tensor scaling,
                                        Ints offsets, bool shared_a, std::string slots,
                                        std::string plan) {
  check_plan(plan);
  return dispatch(x, [&]<class T>() -> std::tuple<Tensor, Tensor> {
    using C = acc_t<T>;
    const int64_t n = indices.size(0), K = indices.size(1);
    const int32_t* ids = contiguous<int32_t>("indices", indices, {n, K});
    const C* weight = contiguous<C>("weights", weights, {n, K});
    Forward<T> forward(x, a, b, base, scaling, std::move(offsets), shared_a, n, K,
                       RowsPerToken(slots, K, shared_a));
    forward.make_y();
    check_ids(ids, n * K, forward.experts.E);
    const Blocks blocks(n, forward.experts.E, K);
    blocks.run(
        [&](int64_t begin, int64_t end) { forward.run(begin, end, ids, weight, blocks.few()); });
    return {forward.y, forward.s};
  });
}

template <class T, class RouterWeight>
void run(Router<T, RouterWeight>& router, Forward<T>& forward) {
  check(router.E == forward.experts.E, "router_weight: expected ", forward.experts.E,
        " rows, one per expert, got ", router.E);
  if (router.blocks.few()) {
    router.few();
    forward.run(0, router.tokens, router.ids, router.weight, true);
  } else {
    router.blocks.run([&](int64_t begin, int64_t end) {
      router.block(begin, end);
      forward.run(begin, end, router.ids, router.weight, false);
    });
  }
}

using Routed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Routed routed_lora(Tensor x, Tensor w, Tensor a, Tensor b, MaybeTensor base, MaybeTensor bias,
                   MaybeTensor router_bias, Tensor scaling, Ints offsets, bool shared_a,
                   int64_t top_k, std::string gate, bool renormalize, double top_p,
                   double threshold, std::string plan) {
  check_plan(plan);
  return dispatch(x, w, [&]<class T, class RouterWeight>() -> Routed {
    Router<T, RouterWeight> router(x, w, bias, router_bias, top_k,
                                   Gate(gate, renormalize, top_p, threshold));
    Forward<T> forward(x, a, b, base, scaling, std::move(offsets), shared_a, router.tokens, top_k);
    forward.make_y();
    run(router, forward);
    router.finish();
    return {forward.y,        router.indices, router.weights, router.logits,
            router.mean_prob, router.lse,     router.counts,  forward.s};
  });
}

// Several layers that read the same x: bank i adds to columns starts[i].. of y.
Tensor routed_lora_banks(Tensor x, std::vector<Tensor> w, std::vector<Tensor> a,
                         std::vector<Tensor> b, Tensor base, std::vector<MaybeTensor> bias,
                         std::vector<MaybeTensor> router_bias, std::vector<Tensor> scaling,
                         Ints offsets, bool shared_a, Ints starts, int64_t top_k, std::string gate,
                         bool renormalize, double top_p, double threshold, std::string plan) {
  check_plan(plan);
  const size_t n = w.size();
  check(n > 0 && a.size() == n && b.size() == n && bias.size() == n && router_bias.size() == n &&
            scaling.size() == n && starts.size() == n,
        "banks: expected ", n, " of each operand");
  return dispatch(x, w[0], [&]<class T, class RouterWeight>() -> Tensor {
    const int64_t tokens = x.size(0), D = base.size(1);
    const auto base_rows = rows<T>("base", base, tokens, D);
    Tensor y = empty<T>({tokens, D});
    const Rows<T> out = {mutable_data<T>(y), D};
    int64_t done = 0;
    for (size_t i = 0; i < n; ++i) {
      check(starts[i] >= done && starts[i] + b[i].size(1) <= D, "starts: expected columns of ", D,
            " one after the other, got ", starts[i], " for ", b[i].size(1));
      copy_columns(base_rows, out, tokens, done, starts[i]);
      done = starts[i] + b[i].size(1);
      const Gate kind(gate, renormalize, top_p, threshold);
      Router<T, RouterWeight> router(x, w[i], bias[i], router_bias[i], top_k, kind);
      Forward<T> forward(x, a[i], b[i], {}, scaling[i], offsets, shared_a, tokens, top_k);
      forward.into({base_rows.data + starts[i], base_rows.stride}, {out.data + starts[i], D});
      run(router, forward);
    }
    copy_columns(base_rows, out, tokens, done, D);
    return y;
  });
}

}  // namespace

void register_forward(Library& library) {
  library.impl("routed_lora_banks", TORCH_BOX(&routed_lora_banks));
  library.impl("grouped_lora", TORCH_BOX(&grouped_lora));
  library.impl("routed_lora", TORCH_BOX(&routed_lora));
}

}  // namespace lora_moe
