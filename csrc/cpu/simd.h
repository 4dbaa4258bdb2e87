// Portable SIMD in GCC/Clang vector types: one width per instruction set, four storage types.
//
// Arithmetic happens in acc_t<T>: fp64 for fp64, fp32 for everything else.  bf16 and fp16 are
// widened when loaded and rounded to nearest even, once, when stored.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#pragma GCC diagnostic ignored "-Wpsabi"                // the whole extension has the same flags
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 on its own AVX-512 intrinsics

#define LORA_MOE_INLINE inline __attribute__((always_inline))

namespace lora_moe {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// An fp32 number that is rounded to the 16-bit T as it is loaded.
template <class T>
struct rounded_to {
  acc_t<T> wide;
};

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class C>
struct VectorOf {
  typedef C type __attribute__((vector_size(kVectorBytes)));
};
template <class C>
using Vec = typename VectorOf<C>::type;
template <class C>
constexpr int kLanes = kVectorBytes / sizeof(C);

typedef uint16_t Half16 __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Word32 __attribute__((vector_size(kVectorBytes)));
typedef int32_t Mask32 __attribute__((vector_size(kVectorBytes)));

// --- one number ----------------------------------------------------------------------------------

LORA_MOE_INLINE float widen(float v) { return v; }
LORA_MOE_INLINE double widen(double v) { return v; }
LORA_MOE_INLINE float widen(bf16 v) {
  uint32_t bits = uint32_t(v.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
LORA_MOE_INLINE float widen(f16 v) {
#if defined(__F16C__)
  return _cvtsh_ss(v.bits);
#else
  // Shift the exponent into place, then rescale by 2^112: this also handles subnormals.
  const uint32_t magnitude = uint32_t(v.bits & 0x7fff) << 13;
  const uint32_t special = magnitude >= 0x0f800000 ? 0x7f800000 | (magnitude & 0x7fffff) : 0;
  float out;
  std::memcpy(&out, &magnitude, sizeof out);
  out *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &out, sizeof bits);
  bits = (special ? special : bits) | uint32_t(v.bits & 0x8000) << 16;
  std::memcpy(&out, &bits, sizeof out);
  return out;
#endif
}

template <class T>
LORA_MOE_INLINE T narrow(acc_t<T> v) {
  if constexpr (std::is_same_v<T, bf16>) {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    if (v != v) return bf16{uint16_t(bits >> 16 | 0x40)};
    return bf16{uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else if constexpr (std::is_same_v<T, f16>) {
#if defined(__F16C__)
    return f16{uint16_t(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT))};
#else
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    const uint16_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return f16{uint16_t(sign | 0x7e00 | (bits >> 13 & 0x3ff))};
    if (bits >= 0x477ff000) return f16{uint16_t(sign | 0x7c00)};
    if (bits < 0x38800000) {  // subnormal: let the fp32 adder round at 2^-24
      float magnitude;
      std::memcpy(&magnitude, &bits, sizeof magnitude);
      magnitude += 0.5f;
      std::memcpy(&bits, &magnitude, sizeof bits);
      return f16{uint16_t(sign | (bits - 0x3f000000))};
    }
    return f16{uint16_t(sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13))};
#endif
  } else {
    return v;
  }
}

// --- one vector ----------------------------------------------------------------------------------

// The first n <= kVectorBytes bytes of a register; the other bytes are zero, their memory
// untouched.
template <class V>
LORA_MOE_INLINE V load_bytes(const void* p, int64_t n) {
#if defined(__AVX512BW__)
  return (V)_mm512_maskz_loadu_epi8(n > 0 ? ~0ull >> (64 - n) : 0, p);
#else
  V out = {};
  std::memcpy(&out, p, n);
  return out;
#endif
}

template <class V>
LORA_MOE_INLINE void store_bytes(void* p, V v, int64_t n) {
#if defined(__AVX512BW__)
  _mm512_mask_storeu_epi8(p, n > 0 ? ~0ull >> (64 - n) : 0, (__m512i)v);
#else
  std::memcpy(p, &v, n);
#endif
}

template <class T>
LORA_MOE_INLINE Vec<acc_t<T>> load(const T* p) {
  if constexpr (std::is_same_v<T, bf16>) {
    Half16 half;
    std::memcpy(&half, p, sizeof half);
    return (Vec<float>)(__builtin_convertvector(half, Word32) << 16);
  } else if constexpr (std::is_same_v<T, f16>) {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
    return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    Vec<float> out;
    for (int i = 0; i < kLanes<float>; ++i) out[i] = widen(p[i]);
    return out;
#endif
  } else {
    Vec<T> out;
    std::memcpy(&out, p, sizeof out);
    return out;
  }
}

template <class T>
LORA_MOE_INLINE void store(T* p, Vec<acc_t<T>> v) {
  if constexpr (std::is_same_v<T, bf16>) {
    const Word32 bits = (Word32)v;
    const Mask32 is_nan = v != v;
    const Word32 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Word32 quiet = bits >> 16 | 0x40;
    const Half16 half = __builtin_convertvector(is_nan ? quiet : rounded, Half16);
    std::memcpy(p, &half, sizeof half);
  } else if constexpr (std::is_same_v<T, f16>) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kLanes<float>; ++i) p[i] = narrow<f16>(v[i]);
#endif
  } else {
    std::memcpy(p, &v, sizeof v);
  }
}

// The first n <= kLanes elements; the other lanes are zero and their memory is not touched.
template <class T>
LORA_MOE_INLINE Vec<acc_t<T>> load_tail(const T* p, int64_t n) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    return load_bytes<Vec<T>>(p, n * sizeof(T));
  } else {
    T padded[kLanes<acc_t<T>>] = {};
    for (int64_t i = 0; i < n; ++i) padded[i] = p[i];
    return load(padded);
  }
}

template <class T>
LORA_MOE_INLINE void store_tail(T* p, Vec<acc_t<T>> v, int64_t n) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    store_bytes(p, v, n * sizeof(T));
  } else {
    T padded[kLanes<acc_t<T>>];
    store(padded, v);
    for (int64_t i = 0; i < n; ++i) p[i] = padded[i];
  }
}

// a * b + c, fused if the CPU can.  Explicit, because a compiler that contracts on its own may do
// so in one tile and not in the next, and a token's bits would depend on its tile.
LORA_MOE_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
LORA_MOE_INLINE Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

template <class C>
LORA_MOE_INLINE Vec<C> broadcast(C v) {
  return v - Vec<C>{};  // all lanes v, a zero's sign included
}

// --- memory --------------------------------------------------------------------------------------

// Prefetches the lines of n elements, to be read or written soon: rows of tokens are in any order
// and pages apart, so the hardware cannot predict them.  Always inlined, as must be callers that do
// nothing else: GCC considers them functions without effect and drops the calls.
template <bool Write = false, class T>
LORA_MOE_INLINE void prefetch(const T* p, int64_t n) {
  for (int64_t i = 0; i < n * int64_t(sizeof(T)); i += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + i, Write, 2);
}

// --- functions -----------------------------------------------------------------------------------

// e^v for v <= 0 or NaN, within 2 units in the last place (fp32):
//
//   e^v = 2^n e^f,  |f| <= ln 2 / 2,  with a Taylor polynomial of degree 7 for e^f
LORA_MOE_INLINE Vec<float> exp_negative(Vec<float> v) {
  const Vec<float> shift = broadcast(0x1.8p23f);  // adding it rounds to an integer
  const Vec<float> n = multiply_add(v, broadcast(1.44269504f), shift) - shift;
  Vec<float> f = multiply_add(n, broadcast(-0x1.62e4p-1f), v);  // ln 2 in two parts
  f = multiply_add(n, broadcast(-0x1.7f7d1cp-20f), f);
  Vec<float> e = broadcast(1 / 5040.f);
  for (float c : {1 / 720.f, 1 / 120.f, 1 / 24.f, 1 / 6.f, 0.5f, 1.f, 1.f})
    e = multiply_add(e, f, broadcast(c));
  const Vec<float> bounded = n < -126 ? broadcast(-126.f) : n;
  const Mask32 exponent = (__builtin_convertvector(bounded, Mask32) + 127) << 23;
  return n < -126 ? Vec<float>{} : e * (Vec<float>)exponent;  // a NaN stays: e is one
}
LORA_MOE_INLINE Vec<double> exp_negative(Vec<double> v) {
  for (int i = 0; i < kLanes<double>; ++i) v[i] = std::exp(v[i]);
  return v;
}

}  // namespace lora_moe
