// The arithmetic of ai.iapt::Rational, written once for the CPU kernel and for the CUDA kernel.
//
//     y = P(x) / Q(x),  P(x) = sum_{j=0..m} a_j x^j
//     form A: Q(x) = 1 + sum_{k=1..n} |b_k x^k|
//     form B: Q(x) = 1 + |sum_{k=1..n} b_k x^k|
//
// Evaluation is in fp32 by Horner's rule whatever the tensor's type: x^5 leaves the fp16 range at |x| > 9.2. Every
// product is rounded before it is added (compile with -ffp-contract=off, nvcc with -fmad=false), so that CPU, GPU,
// NumPy and PyTorch agree to the last bit. The kernel is bound by memory, so a fused multiply-add would gain nothing.
#ifndef IAPT_OP_RATIONAL_H_
#define IAPT_OP_RATIONAL_H_

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define IAPT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define IAPT_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace iapt {

constexpr int kMaxDegree = 8;

enum class Form : int32_t { kA = 0, kB = 1 };

// 16-bit tensors hold bits only; arithmetic is always fp32.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

IAPT_HOST_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

IAPT_HOST_DEVICE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

IAPT_HOST_DEVICE float to_float(float value) { return value; }

IAPT_HOST_DEVICE float to_float(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

IAPT_HOST_DEVICE float to_float(Half value) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(value.bits));
#else
  // Place exponent and fraction where fp32 has them, then scale by 2^112: exact, denormals included. What had the
  // largest exponent (infinity, NaN) gets fp32's.
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const float scaled = float_of(magnitude) * float_of(0x77800000u);
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return float_of(bits_of(scaled) | special | (static_cast<uint32_t>(value.bits & 0x8000u) << 16));
#endif
}

IAPT_HOST_DEVICE void from_float(float value, float* out) { *out = value; }

// Both conversions below round to the nearest, ties to even.
IAPT_HOST_DEVICE void from_float(float value, BFloat16* out) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}

IAPT_HOST_DEVICE void from_float(float value, Half* out) {
#ifdef __CUDA_ARCH__
  out->bits = __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the result is a denormal: adding 0.5 leaves its bits, rounded by the addition, at the fraction's end.
  const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t finite = magnitude < 0x38800000u ? small : normal;
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  out->bits = static_cast<uint16_t>((magnitude >= 0x477ff000u ? large : finite) | ((bits >> 16) & 0x8000u));
#endif
}

// sum_j c[j] x^j for Width values side by side; the inner loops have a fixed length, so that compilers vectorise them.
template <int Width>
IAPT_HOST_DEVICE void horner(const float (&x)[Width], const float* c, int count, bool absolute, float (&sum)[Width]) {
  const float last = absolute ? float_of(bits_of(c[count - 1]) & 0x7fffffffu) : c[count - 1];
  for (int i = 0; i < Width; ++i) sum[i] = last;
  for (int j = count - 2; j >= 0; --j) {
    const float next = absolute ? float_of(bits_of(c[j]) & 0x7fffffffu) : c[j];
    for (int i = 0; i < Width; ++i) {
      const float product = sum[i] * x[i];
      sum[i] = product + next;
    }
  }
}

// y = R(x) for Width values of one coefficient row: numerator [num_a] ascending powers, denominator [num_b] powers 1
// on.
template <int Width>
IAPT_HOST_DEVICE void rational(const float (&x)[Width], const float* a, int num_a, const float* b, int num_b, Form form,
                               float (&y)[Width]) {
  float base[Width], top[Width], inner[Width];
  const uint32_t kept = form == Form::kA ? 0x7fffffffu : 0xffffffffu;
  for (int i = 0; i < Width; ++i) base[i] = float_of(bits_of(x[i]) & kept);
  horner(x, a, num_a, false, top);
  horner(base, b, num_b, form == Form::kA, inner);
  for (int i = 0; i < Width; ++i) {
    const float tail = float_of(bits_of(base[i] * inner[i]) & 0x7fffffffu);
    y[i] = top[i] / (1.0f + tail);
  }
}

}  // namespace iapt

#endif  // IAPT_OP_RATIONAL_H_
