// Arguments and launchers of the kernels: plain structs of pointers and sizes, without PyTorch.
//
// Letters: T tokens, E experts, K slots per token, R rank rows of all experts.
// S has S_columns: R, or one expert's rank with a shared A.
//
// Launchers are defined for float, f16 and bf16.
#pragma once

#include "numbers.h"

namespace lora_moe::cuda {

constexpr int kGroup = 4;  // tokens per warp in the middle, and per partial sum

struct Router {
  const float* bias = nullptr;         // (E,), added to the gates for selection only
  const float* router_bias = nullptr;  // (E,), added to the logits
  int E = 0, K = 0;
  bool sigmoid = false, renormalize = false;
  float top_p = 0, threshold = 0;
};

struct Routing {
  int32_t* indices = nullptr;        // (T, K), -1 for an empty slot
  float* weights = nullptr;          // (T, K)
  float* lse = nullptr;              // (T,)
  float* prob_partial = nullptr;     // (T / kGroup, E): sums of the gates over a group of tokens
  int32_t* count_partial = nullptr;  // and of the slots
};

struct Experts {
  const float* scaling = nullptr;    // (E,)
  const int32_t* offsets = nullptr;  // (E + 1,), or null: every expert has `rank` rows
  int rank = 0;
  int E = 0, R = 0, S_columns = 0;
  bool shared_a = false;

  __host__ __device__ int first(int e) const { return offsets ? offsets[e] : e * rank; }
  __host__ __device__ int last(int e) const { return first(e + 1); }
  __host__ __device__ int saved(int e) const { return shared_a ? 0 : first(e); }  // column of S
};

// Gradients of the routing from outside the experts; null if there is none.
struct RoutingGrad {
  const float *weights = nullptr, *logits = nullptr, *mean_prob = nullptr, *lse = nullptr;
};

// S = x A^T and logits = x W^T over splits of the columns of x, each with its own sums.
template <class T>
struct Shrink {
  Rows<T> x, a;
  Rows<float> w;
  float *s = nullptr, *logits = nullptr;  // (splits, T, R), (splits, T, E)
  int64_t tokens = 0, columns = 0, split_size = 0;
  int R = 0, E = 0;
  int64_t splits() const { return split_size ? ceil_div(columns, split_size) : 1; }
};

// The middle of the forward: top-k of the logits unless the routing is given, and H = gate(S).
template <class T>
struct Middle {
  static constexpr bool kRouter = true;  // the logits are computed along with S
  Router router;
  Routing routing;
  Experts experts;
  float* logits = nullptr;   // (T, E), router_bias is added; null: the routing is given
  const float* s = nullptr;  // (T, S_columns), null: no experts
  T* h = nullptr;            // (T, R)
  int64_t tokens = 0;
};

// The middle of the backward, from G = dy B^T.
template <class T>
struct MiddleGrad {
  static constexpr bool kRouter = false;
  Router router;
  Routing routing;
  Experts experts;
  RoutingGrad aux;
  const float *g = nullptr, *s = nullptr;         // (T, R), (T, S_columns)
  const float* logits = nullptr;                  // (T, E), null: the routing was given
  T *ds = nullptr, *h = nullptr;                  // (T, S_columns), (T, R)
  float *dweights = nullptr, *dlogits = nullptr;  // (T, K), (T, E)
  int64_t tokens = 0;
};

// y = base + H B + H2 B2; the second pair in fp32.
template <class T>
struct Expand {
  Rows<T> h, b, base;
  Rows<float> h2, b2;
  T* y = nullptr;  // (T, D)
  int64_t tokens = 0, columns = 0;
  int R = 0, R2 = 0;
};

// H^T x: sums over splits of the tokens.
template <class H, class T>
struct Wgrad {
  Rows<H> h;
  Rows<T> x;
  float* partial = nullptr;  // (splits, R, D)
  int64_t tokens = 0, columns = 0, split_size = 0;
  int R = 0;
};

// One launch if a block holds all columns of S and the logits; otherwise a second for the middle.
template <class T>
void shrink(const Shrink<T>&, const Middle<T>*, cudaStream_t);
template <class T>
void shrink(const Shrink<T>&, const MiddleGrad<T>*, cudaStream_t);
// The middles alone, if S or G was computed in splits.
template <class T>
void gate_ranks(const Middle<T>&, cudaStream_t);
template <class T>
void gate_ranks(const MiddleGrad<T>&, cudaStream_t);

template <class T>
void expand(const Expand<T>&, cudaStream_t);
template <class H, class T>
void wgrad(const Wgrad<H, T>&, cudaStream_t);
int64_t wgrad_split_size(int64_t tokens, int64_t columns, int R);
// out = the sum over the splits, in order.  (splits, n) -> (n,)
template <class T>
void add_splits(const float* partial, int64_t count, int64_t n, T* out, cudaStream_t);

// The segmented plan: each slot's tokens are sorted by expert, and a tile uses one expert's rows.
// S, G, H and dS (T, K, max_rank) hold one slot after another.
constexpr int kTileTokens = 64;

struct Segments {
  Experts experts;
  int K = 0, max_rank = 0;
  int64_t tokens = 0;
  int32_t* order = nullptr;   // (K, T): tokens by expert, then by index; without an expert last
  int32_t* starts = nullptr;  // (K, E + 2): where each expert's tokens start, and those without one
};

void sort_slots(const Segments&, const int32_t* indices, cudaStream_t);
// out (T, K, max_rank) = x @ the rows of each slot's expert; x may have one row per slot.
template <class T>
void segmented_shrink(const Segments&, const Rows<T>& x, const Rows<T>& rows, int64_t columns,
                      float* out, cudaStream_t);
template <class T>
void segmented_gate(const Middle<T>&, const Segments&, cudaStream_t);
template <class T>
void segmented_gate(const MiddleGrad<T>&, const Segments&, cudaStream_t);
// y = base + H @ the rows of each slot's expert; `wide` (T, D) holds the sums between the slots,
// and before the first if `add_wide` is set.
template <class T>
void segmented_expand(const Segments&, const T* h, const Rows<T>& rows, const Rows<T>& base,
                      float* wide, bool add_wide, int64_t columns, T* y, cudaStream_t);
// The same without the sum: y (T, K, D), base with one row per token or per slot.
template <class T>
void segmented_expand_apart(const Segments&, const T* h, const Rows<T>& rows, const Rows<T>& base,
                            int64_t columns, T* y, cudaStream_t);
// out (R, D) = H^T x, each expert over its own tokens; x may have one row per slot.
template <class T>
void segmented_wgrad(const Segments&, const T* h, const Rows<T>& x, int64_t columns, float* out,
                     cudaStream_t);

// mean_prob (E,) and counts (E,) from the sums over groups of tokens.
void router_totals(const Routing&, int64_t tokens, int E, float* mean_prob, int64_t* counts,
                   cudaStream_t);
void router_gradient(const Router&, const Routing&, const RoutingGrad&, const float* logits,
                     int64_t tokens, float* dlogits, cudaStream_t);

// A table on the device, without a copy from host memory, which would synchronize: kernel arguments
// carry the values.
void write_table(const int64_t* values, int64_t n, int32_t* table, cudaStream_t);

}  // namespace lora_moe::cuda
