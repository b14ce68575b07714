#include "safetensors.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>
#include <tuple>

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

constexpr uint64_t kLongestHeader = 100000000;

// Where a tensor lies in the data.
struct Place {
  int64_t begin, end;
};

Tensor read_tensor(const Json& entry, std::string_view data, std::vector<Place>& places) {
  std::vector<std::string> problems;
  Fields fields(entry, "tensor", problems);
  std::string dtype;
  fields.read("dtype", dtype);
  const auto shape = fields.integers("shape"), offsets = fields.integers("data_offsets");
  fields.refuse_unknown();
  if (!problems.empty()) throw Error(problems.front());
  const auto is_negative = [](int64_t size) { return size < 0; };
  if (std::any_of(shape.begin(), shape.end(), is_negative) ||
      std::any_of(offsets.begin(), offsets.end(), is_negative)) {
    throw Error("it has a tensor with a negative size or offset");
  }
  Tensor tensor;
  tensor.dtype = dtype_of(dtype);
  tensor.shape = shape;
  const size_t bytes = tensor.num_bytes();  // before memory is taken for it
  if (offsets.size() != 2 || offsets[0] > offsets[1] || static_cast<size_t>(offsets[1]) > data.size() ||
      static_cast<size_t>(offsets[1] - offsets[0]) != bytes) {
    throw Error("its offsets do not fit its shapes or its size");
  }
  places.push_back({offsets[0], offsets[1]});
  tensor = Tensor(tensor.dtype, shape);
  if (bytes > 0) std::memcpy(tensor.data.get(), data.data() + offsets[0], bytes);
  return tensor;
}

// Every byte belongs to one tensor: nothing is hidden in the file, and nothing is read twice.
void check_places(std::vector<Place> places, size_t size) {
  std::sort(places.begin(), places.end(), [](const Place& some, const Place& other) {
    return std::tie(some.begin, some.end) < std::tie(other.begin, other.end);
  });
  int64_t at = 0;
  for (const Place& place : places) {
    if (place.begin != at) throw Error("its tensors leave a hole or overlap");
    at = place.end;
  }
  if (static_cast<size_t>(at) != size) throw Error("it has bytes behind its last tensor");
}

Weights parse(std::string_view file) {
  uint64_t length = 0;  // little-endian, as is every machine that this runs on
  if (file.size() < sizeof(length)) throw Error("it is too short");
  std::memcpy(&length, file.data(), sizeof(length));
  if (length > kLongestHeader || length > file.size() - sizeof(length)) {
    throw Error("its header is longer than the file");
  }
  const std::string_view header = file.substr(sizeof(length), length), data = file.substr(sizeof(length) + length);
  const Json json = header.substr(0, 1) == "{" ? parse_json(header) : Json();
  if (!json.is_object()) throw Error("its header is no JSON object");
  Weights weights;
  std::vector<std::string> problems;
  weights.metadata = Fields(json, "header", problems).text_map("__metadata__", /*required=*/false);
  if (!problems.empty()) throw Error(problems.front());
  std::vector<Place> places;
  for (const auto& [name, entry] : json.items()) {
    if (name != "__metadata__") weights.tensors[name] = read_tensor(entry, data, places);
  }
  check_places(std::move(places), data.size());
  return weights;
}

}  // namespace

Weights parse_safetensors(std::string_view bytes, const std::string& where) {
  try {
    return parse(bytes);
  } catch (const Error& error) {
    throw Error(where + " is not a whole safetensors file: " + error.what());
  }
}

Weights read_safetensors(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary);
  const std::string file(std::istreambuf_iterator<char>(stream), {});
  return parse_safetensors(file, path.string());
}

}  // namespace iapt
