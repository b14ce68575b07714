#include "iapt/tensor.h"

#include <cmath>
#include <cstring>

#include "rational.h"

namespace iapt {
namespace {

// Calls `each(pointer)` with the tensor's memory as the float type that it holds.
template <typename Each>
void with_floats(const std::string& dtype, void* data, Each each) {
  if (dtype == "fp32") return each(static_cast<float*>(data));
  if (dtype == "fp16") return each(static_cast<Half*>(data));
  if (dtype == "bf16") return each(static_cast<BFloat16*>(data));
  throw Error("type " + dtype + " is no float type; expected fp32, fp16 or bf16");
}

}  // namespace

size_t element_size(const std::string& dtype) {
  if (dtype == "int64") return 8;
  if (dtype == "fp32" || dtype == "int32") return 4;
  if (dtype == "fp16" || dtype == "bf16") return 2;
  if (dtype == "bool" || dtype == "int8") return 1;
  throw Error("tensor type '" + dtype + "' is not known; expected int64, int32, int8, bool, fp32, fp16 or bf16");
}

Tensor::Tensor(std::string type, std::vector<int64_t> sizes) : dtype(std::move(type)), shape(std::move(sizes)) {
  const size_t bytes = num_bytes();
  data = std::shared_ptr<void>(new char[bytes > 0 ? bytes : 1](), [](void* p) { delete[] static_cast<char*>(p); });
}

size_t Tensor::count() const {
  size_t product = 1;
  for (const int64_t size : shape) {
    if (size < 0 || __builtin_mul_overflow(product, static_cast<size_t>(size), &product)) {
      throw Error("a tensor's shape is negative or too large");
    }
  }
  return product;
}

size_t Tensor::num_bytes() const {
  size_t bytes = 0;
  if (__builtin_mul_overflow(count(), element_size(dtype), &bytes)) throw Error("a tensor's shape is too large");
  return bytes;
}

std::vector<float> Tensor::row_as_float(size_t row) const {
  const auto width = static_cast<size_t>(shape.back());
  std::vector<float> values(width);
  with_floats(dtype, data.get(), [&](const auto* all) {
    for (size_t i = 0; i < width; ++i) values[i] = to_float(all[row * width + i]);
  });
  return values;
}

Tensor cast(const Tensor& tensor, const std::string& dtype) {
  if (tensor.dtype == dtype) return tensor;
  Tensor made(dtype, tensor.shape);
  const size_t count = tensor.count();
  with_floats(tensor.dtype, tensor.data.get(), [&](const auto* from) {
    with_floats(dtype, made.data.get(), [&](auto* to) {
      for (size_t i = 0; i < count; ++i) {
        const float value = to_float(from[i]);
        from_float(value, to + i);
        if (std::isfinite(value) && !std::isfinite(to_float(to[i]))) {
          throw Error("a number is too large for " + dtype + "; build for fp32 or bf16");
        }
      }
    });
  });
  return made;
}

}  // namespace iapt
