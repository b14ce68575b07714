#ifndef IAPT_SRC_SAFETENSORS_H_
#define IAPT_SRC_SAFETENSORS_H_

#include <filesystem>
#include <map>
#include <string>
#include <string_view>

#include "iapt/tensor.h"

namespace iapt {

struct Weights {
  Tensors tensors;  // on the host
  std::map<std::string, std::string> metadata;
};

// The content of a safetensors file. Throws Error: it is no whole safetensors file, has holes or bytes that no tensor
// owns, or tensors of types that no bundle has.
Weights read_safetensors(const std::filesystem::path& path);
// The same from bytes; `where` names them in errors.
Weights parse_safetensors(std::string_view bytes, const std::string& where);

}  // namespace iapt

#endif  // IAPT_SRC_SAFETENSORS_H_
