#include "safetensors.h"

#include <cstring>
#include <fstream>
#include <iterator>

#include "json_fields.h"

namespace iapt {
namespace {

const char* dtype_of(const std::string& name) {
  if (name == "F32") return "fp32";
  if (name == "F16") return "fp16";
  if (name == "BF16") return "bf16";
  if (name == "I64") return "int64";
  if (name == "I32") return "int32";
  if (name == "BOOL") return "bool";
  throw Error("it has a tensor of type " + name);
}

Tensor read_tensor(const Json& entry, const char* data, size_t size) {
  std::vector<std::string> problems;
  Fields fields(entry, "tensor", problems);
  std::string dtype;
  fields.read("dtype", dtype);
  std::vector<int64_t> shape, offsets;
  const auto whole = [&](std::vector<int64_t>& into) {
    return [&](const Json& item, const std::string& place) {
      if (item.is_number_integer() && item >= 0 && item <= INT64_MAX) return into.push_back(item.get<int64_t>());
      problems.push_back(place + " is no size");
    };
  };
  fields.array("shape", whole(shape));
  fields.array("data_offsets", whole(offsets));
  if (!problems.empty()) throw Error(problems.front());
  Tensor tensor;
  tensor.dtype = dtype_of(dtype);
  tensor.shape = shape;
  const size_t bytes = tensor.num_bytes();  // before memory is taken for it
  if (offsets.size() != 2 || offsets[0] > offsets[1] || static_cast<size_t>(offsets[1]) > size ||
      static_cast<size_t>(offsets[1] - offsets[0]) != bytes) {
    throw Error("its offsets do not fit its shapes or its size");
  }
  tensor = Tensor(tensor.dtype, shape);
  std::memcpy(tensor.data.get(), data + offsets[0], bytes);
  return tensor;
}

}  // namespace

Tensors read_safetensors(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary);
  const std::string file(std::istreambuf_iterator<char>(stream), {});
  try {
    uint64_t length = 0;  // little-endian, as is every machine that this runs on
    if (!stream || file.size() < sizeof(length)) throw Error("it is too short");
    std::memcpy(&length, file.data(), sizeof(length));
    if (length > file.size() - sizeof(length)) throw Error("its header is longer than the file");
    const char* header = file.data() + sizeof(length);
    const char* data = header + length;
    const Json json = Json::parse(header, data, nullptr, /*allow_exceptions=*/false);
    if (!json.is_object()) throw Error("its header is no JSON object");
    Tensors tensors;
    for (const auto& [name, entry] : json.items()) {
      if (name == "__metadata__") continue;
      tensors[name] = read_tensor(entry, data, file.size() - sizeof(length) - length);
    }
    return tensors;
  } catch (const Error& error) {
    throw Error(path.string() + " is not a whole safetensors file: " + error.what());
  }
}

}  // namespace iapt
