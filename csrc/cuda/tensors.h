// From stable-ABI tensors on a GPU to kernel arguments, and the device guard for launches.
#pragma once

#include "../tensors.h"
#include "kernels.h"
#include "launch.h"

namespace lora_moe::cuda {

template <class T>
constexpr ScalarType scalar_type_of() {
  if constexpr (std::is_same_v<T, bf16>) return ScalarType::BFloat16;
  if constexpr (std::is_same_v<T, f16>) return ScalarType::Half;
  if constexpr (std::is_same_v<T, int32_t>) return ScalarType::Int;
  if constexpr (std::is_same_v<T, int64_t>) return ScalarType::Long;
  return ScalarType::Float;
}

// During its lifetime, launches and allocations go to x's device; `stream` is PyTorch's current
// stream there.
class OnDevice {
 public:
  cudaStream_t stream = nullptr;

  explicit OnDevice(const Tensor& x) {
    const int device = x.get_device_index();
    require(cudaGetDevice(&before_), "cudaGetDevice");
    require(cudaSetDevice(device), "cudaSetDevice");
    void* current = nullptr;
    check(aoti_torch_get_current_cuda_stream(device, &current) == 0, "x: no stream on its device");
    stream = static_cast<cudaStream_t>(current);
    if (x.scalar_type() != ScalarType::BFloat16) return;
    int major = 0;
    require(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "device");
    check(major >= 8, "bfloat16: expected a GPU of compute capability 8.0 or newer, got ", major,
          ".x; float16 and float32 work");
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

template <class T>
const T* data(const char* name, const Tensor& t, const Tensor& like, Ints shape) {
  check(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(), name,
        ": expected a tensor on x's device");
  check_operand(name, t, scalar_type_of<T>(), shape);
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
Rows<T> rows(const char* name, const Tensor& t, const Tensor& like, int64_t n, int64_t columns) {
  const T* p = data<T>(name, t, like, {n, columns});
  check_columns(name, t);
  return Rows<T>(p, t.stride(0));
}

template <class T>
Rows<T> rows(const char* name, const MaybeTensor& t, const Tensor& like, int64_t n,
             int64_t columns) {
  return t ? rows<T>(name, *t, like, n, columns) : Rows<T>();
}

template <class T>
const T* contiguous(const char* name, const Tensor& t, const Tensor& like, Ints shape) {
  check(t.is_contiguous(), name, ": expected a contiguous tensor");
  return data<T>(name, t, like, shape);
}

template <class T>
const T* contiguous(const char* name, const MaybeTensor& t, const Tensor& like, Ints shape) {
  return t ? contiguous<T>(name, *t, like, shape) : nullptr;
}

template <class T>
Tensor empty(const Tensor& like, Ints shape) {
  return torch::stable::new_empty(like, shape, scalar_type_of<T>());
}

template <class T>
T* mutable_data(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// f.template operator()<T>() for the dtype of x.
template <class F>
auto dispatch(const Tensor& x, F f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f.template operator()<float>();
    case ScalarType::BFloat16:
      return f.template operator()<bf16>();
    case ScalarType::Half:
      return f.template operator()<f16>();
    default:
      refuse("x: the CUDA kernels take float32, bfloat16 or float16, got ", text(x.scalar_type()));
  }
}

inline Tensor wide(const Tensor& t) { return as_dtype(t, ScalarType::Float); }

}  // namespace lora_moe::cuda
