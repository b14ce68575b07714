#ifndef IAPT_SRC_SAFETENSORS_H_
#define IAPT_SRC_SAFETENSORS_H_

#include <filesystem>

#include "iapt/tensor.h"

namespace iapt {

// The tensors of a safetensors file, on the host. Throws Error: it is no whole safetensors file.
Tensors read_safetensors(const std::filesystem::path& path);

}  // namespace iapt

#endif  // IAPT_SRC_SAFETENSORS_H_
