// Backward to rank space:  G = dy @ B^T,  dS = G g s,  H = S g s,  dlogits, in one pass over dy.
//
// The gate's gradient needs nothing of size D_out, and H is recomputed rather than saved.
// Reads T*D_out + R*D_out + 4*T*(R + E + 3K) bytes, writes 2*T*R and 4*T*(R + E + K) bytes.
#include "shrink.h"

namespace lora_moe::cuda {

template <class T>
void shrink(const Shrink<T>& p, const MiddleGrad<T>* m, cudaStream_t stream) {
  launch_shrink(p, m, stream);
}

template <class T>
void gate_ranks(const MiddleGrad<T>& m, cudaStream_t stream) {
  launch_middle(m, stream);
}

template void shrink(const Shrink<float>&, const MiddleGrad<float>*, cudaStream_t);
template void shrink(const Shrink<f16>&, const MiddleGrad<f16>*, cudaStream_t);
template void shrink(const Shrink<bf16>&, const MiddleGrad<bf16>*, cudaStream_t);
template void gate_ranks(const MiddleGrad<float>&, cudaStream_t);
template void gate_ranks(const MiddleGrad<f16>&, cudaStream_t);
template void gate_ranks(const MiddleGrad<bf16>&, cudaStream_t);

}  // namespace lora_moe::cuda
