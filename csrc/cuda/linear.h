// The bare products on tensors, used by the operators.
#pragma once

#include "tensors.h"

namespace lora_moe::cuda {

// S = x A^T and logits = x W^T, both fp32.
std::tuple<Tensor, Tensor> shrink_rows(const Tensor& x, const Tensor& a, const MaybeTensor& w);

Tensor expand_rows(const Tensor& h, const Tensor& b, const MaybeTensor& h2, const MaybeTensor& b2,
                   const MaybeTensor& base, ScalarType dtype);

// H^T x (R, D) in another dtype; H in fp32 or in x's dtype.
Tensor wgrad_rows(const Tensor& h, const Tensor& x, ScalarType dtype, cudaStream_t stream);

}  // namespace lora_moe::cuda
