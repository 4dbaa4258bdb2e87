// Forward:  [S | logits] = x @ [A | W]^T,  ids = top-k,  H = gate(S), in one pass over x.
//
// Reads T*D + (R + E)*D, writes 4*T*(R + E + 2K) bytes and T*R.
#include "shrink.h"

namespace lora_moe::cuda {

template <class T>
void shrink(const Shrink<T>& p, const Middle<T>* m, cudaStream_t stream) {
  launch_shrink(p, m, stream);
}

template <class T>
void gate_ranks(const Middle<T>& m, cudaStream_t stream) {
  launch_middle(m, stream);
}

template void shrink(const Shrink<float>&, const Middle<float>*, cudaStream_t);
template void shrink(const Shrink<f16>&, const Middle<f16>*, cudaStream_t);
template void shrink(const Shrink<bf16>&, const Middle<bf16>*, cudaStream_t);
template void gate_ranks(const Middle<float>&, cudaStream_t);
template void gate_ranks(const Middle<f16>&, cudaStream_t);
template void gate_ranks(const Middle<bf16>&, cudaStream_t);

}  // namespace lora_moe::cuda
