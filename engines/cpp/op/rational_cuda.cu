#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "rational_cuda.h"

namespace iapt {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocksX = 65536;
constexpr int64_t kMaxBlocksY = 65535;

template <typename T, int Width>
struct alignas(sizeof(T) * Width) Pack {
  T value[Width];
};

// One thread takes `Width` neighbouring values at a time, which one memory access moves; x counts along a run, y runs.
template <typename T, int Width>
__global__ void __launch_bounds__(kThreads)
    rational_kernel(RationalLayout layout, const T* __restrict__ x, const float* __restrict__ numerator,
                    const float* __restrict__ denominator, T* __restrict__ y) {
  __shared__ float a[kMaxDegree + 1], b[kMaxDegree];
  const int64_t packs = layout.run / Width;
  for (int64_t run = blockIdx.y; run < layout.num_runs; run += gridDim.y) {
    int64_t offset_a = 0, offset_b = 0;
    coefficient_offsets(layout, run, &offset_a, &offset_b);
    __syncthreads();  // the previous run's coefficients are no longer needed
    if (threadIdx.x < layout.num_numerator) a[threadIdx.x] = numerator[offset_a + threadIdx.x];
    if (threadIdx.x < layout.num_denominator) b[threadIdx.x] = denominator[offset_b + threadIdx.x];
    __syncthreads();
    const auto* from = reinterpret_cast<const Pack<T, Width>*>(x + run * layout.run);
    auto* to = reinterpret_cast<Pack<T, Width>*>(y + run * layout.run);
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t pack = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; pack < packs; pack += step) {
      const Pack<T, Width> given = from[pack];
      Pack<T, Width> made;
      float in[Width], out[Width];
#pragma unroll
      for (int i = 0; i < Width; ++i) in[i] = to_float(given.value[i]);
      rational(in, a, layout.num_numerator, b, layout.num_denominator, layout.form, out);
#pragma unroll
      for (int i = 0; i < Width; ++i) from_float(out[i], &made.value[i]);
      to[pack] = made;
    }
  }
}

template <typename T, int Width>
void launch(const RationalLayout& layout, const T* x, const float* numerator, const float* denominator, T* y,
            cudaStream_t stream) {
  const int64_t blocks = (layout.run / Width + kThreads - 1) / kThreads;
  const dim3 grid(static_cast<unsigned>(std::min(blocks, kMaxBlocksX)),
                  static_cast<unsigned>(std::min(layout.num_runs, kMaxBlocksY)));
  rational_kernel<T, Width><<<grid, kThreads, 0, stream>>>(layout, x, numerator, denominator, y);
}

}  // namespace

template <typename T>
const char* rational_cuda(const RationalLayout& layout, const T* x, const float* numerator, const float* denominator,
                          T* y, void* stream) {
  if (layout.num_runs == 0 || layout.run == 0) return nullptr;
  constexpr int kWide = 16 / sizeof(T);
  const bool aligned =
      layout.run % kWide == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0 && reinterpret_cast<uintptr_t>(y) % 16 == 0;
  const auto on = static_cast<cudaStream_t>(stream);
  if (aligned) {
    launch<T, kWide>(layout, x, numerator, denominator, y, on);
  } else {
    launch<T, 1>(layout, x, numerator, denominator, y, on);
  }
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

template const char* rational_cuda(const RationalLayout&, const float*, const float*, const float*, float*, void*);
template const char* rational_cuda(const RationalLayout&, const Half*, const float*, const float*, Half*, void*);
template const char* rational_cuda(const RationalLayout&, const BFloat16*, const float*, const float*, BFloat16*,
                                   void*);

}  // namespace iapt
