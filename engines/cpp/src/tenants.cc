#include "tenants.h"

#include <cmath>
#include <cstring>

#include "safetensors.h"
#include "tenant_card.h"

namespace iapt {
namespace {

std::vector<int64_t> sizes_of(const TensorSpec& spec) {
  std::vector<int64_t> sizes;
  for (const Size& size : spec.shape) {
    if (!std::holds_alternative<int64_t>(size)) throw Error("weight " + spec.name + " has a dynamic size");
    sizes.push_back(std::get<int64_t>(size));
  }
  return sizes;
}

std::string shown(const std::vector<int64_t>& shape) {
  std::string text;
  for (const int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

Tensors load_tenant(const std::filesystem::path& bundle, const BundleManifest& manifest, const TenantSpec& tenant,
                    const MethodSpec& method) {
  if (!tenant.path)
    throw Error("tenant " + tenant.name + " is of method " + method.name + " but names no weights file");
  const auto path = bundle / *tenant.path;
  auto [tensors, metadata] = read_safetensors(path);
  check_card(metadata, path.string(), manifest, tenant, method);
  for (const TensorSpec& weight : method.weights) {
    const auto found = tensors.find(weight.name);
    const auto expected = sizes_of(weight);
    if (found == tensors.end() || found->second.shape != expected) {
      throw Error("tenant " + tenant.name + ": " + weight.name + " has " +
                  (found == tensors.end() ? "nothing" : "shape " + shown(found->second.shape)) +
                  ", the bundle expects " + shown(expected));
    }
    const Tensor wide = cast(found->second, "fp32");
    const auto* values = wide.as<float>();
    for (size_t i = 0; i < wide.count(); ++i) {
      if (!std::isfinite(values[i])) {
        throw Error("tenant " + tenant.name + ": " + weight.name + " holds NaN or infinity; train the adapter again");
      }
    }
  }
  return tensors;
}

std::string type_of(const TargetSpec& target, const std::string& input) {
  for (const auto& [name, graph] : target.graphs) {
    for (const auto& tensor : graph.inputs) {
      if (tensor.name == input) return tensor.dtype;
    }
  }
  throw Error("no graph of target " + target.name + " takes " + input);
}

}  // namespace

Tensors load_tenants(const std::filesystem::path& bundle, const BundleManifest& manifest, const TargetSpec& target) {
  Tensors stacks;
  for (const auto& method : manifest.methods) {
    std::vector<Tensors> files;
    for (const TenantSpec* tenant : manifest.tenants_of(method.name)) {
      files.push_back(load_tenant(bundle, manifest, *tenant, method));
    }
    for (const auto& weight : method.weights) {
      const std::string name = method.name + "." + weight.name;
      const std::string dtype = type_of(target, name);
      std::vector<int64_t> shape = sizes_of(weight);
      shape.insert(shape.begin(), static_cast<int64_t>(files.size()));
      Tensor stack(dtype, shape);
      size_t offset = 0;
      for (const Tensors& file : files) {
        const Tensor one = cast(file.at(weight.name), dtype);
        std::memcpy(stack.as<char>() + offset, one.data.get(), one.num_bytes());
        offset += one.num_bytes();
      }
      stacks[name] = stack;
    }
  }
  return stacks;
}

}  // namespace iapt
