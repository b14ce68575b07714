// A named array's content: type, shape, and memory on the host or on the GPU that whoever holds it shares.
#ifndef IAPT_TENSOR_H_
#define IAPT_TENSOR_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "iapt/error.h"

namespace iapt {

struct Tensor {
  std::string dtype;  // as in TensorSpec
  std::vector<int64_t> shape;
  std::shared_ptr<void> data;
  bool on_gpu = false;  // runners that leave an output there take it back as an input

  // Zeros on the host.
  Tensor(std::string dtype, std::vector<int64_t> shape);
  // Memory that is there already.
  Tensor(std::string dtype, std::vector<int64_t> shape, std::shared_ptr<void> data, bool on_gpu)
      : dtype(std::move(dtype)), shape(std::move(shape)), data(std::move(data)), on_gpu(on_gpu) {}
  Tensor() = default;

  size_t count() const;
  size_t num_bytes() const;
  template <typename T>
  T* as() const {
    return static_cast<T*>(data.get());
  }
  // One row of a host tensor [B, ..., V] whose last axis are floats of any type; `row` counts the leading axes.
  std::vector<float> row_as_float(size_t row) const;
};

using Tensors = std::map<std::string, Tensor>;

// Bytes of one element. Throws Error: an unknown type.
size_t element_size(const std::string& dtype);

// A host tensor of floats in another float type. Throws Error: it is no float type, or a finite number leaves its
// range.
Tensor cast(const Tensor& tensor, const std::string& dtype);

}  // namespace iapt

#endif  // IAPT_TENSOR_H_
