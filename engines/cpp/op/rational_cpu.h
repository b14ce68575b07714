// ai.iapt::Rational over a whole tensor on the CPU.
#ifndef IAPT_OP_RATIONAL_CPU_H_
#define IAPT_OP_RATIONAL_CPU_H_

#include <cstdint>

#include "rational_layout.h"

namespace iapt {

// Elements [begin, end) of x, counted over the whole tensor; numerator and denominator as `layout` says.
void rational_cpu(const RationalLayout& layout, const float* x, const float* numerator, const float* denominator,
                  float* y, int64_t begin, int64_t end);
void rational_cpu(const RationalLayout& layout, const Half* x, const float* numerator, const float* denominator,
                  Half* y, int64_t begin, int64_t end);
void rational_cpu(const RationalLayout& layout, const BFloat16* x, const float* numerator, const float* denominator,
                  BFloat16* y, int64_t begin, int64_t end);

}  // namespace iapt

#endif  // IAPT_OP_RATIONAL_CPU_H_
