// ai.iapt::Rational over a whole tensor on an NVIDIA GPU; callable from code that no CUDA compiler sees.
#ifndef IAPT_OP_RATIONAL_CUDA_H_
#define IAPT_OP_RATIONAL_CUDA_H_

#include "rational_layout.h"

namespace iapt {

// Puts the kernel on `stream` (a cudaStream_t); all pointers are the GPU's. T is float, Half or BFloat16.
// Returns nullptr, or CUDA's words for what went wrong.
template <typename T>
const char* rational_cuda(const RationalLayout& layout, const T* x, const float* numerator, const float* denominator,
                          T* y, void* stream);

}  // namespace iapt

#endif  // IAPT_OP_RATIONAL_CUDA_H_
