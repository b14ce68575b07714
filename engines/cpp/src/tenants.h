#ifndef IAPT_SRC_TENANTS_H_
#define IAPT_SRC_TENANTS_H_

#include <filesystem>

#include "iapt/manifest.h"
#include "iapt/tensor.h"

namespace iapt {

// The weights of all tenants, stacked by method in the manifest's order: METHOD.TENSOR to [N, ...] in the type that
// the target's graphs take. Throws Error: a file is missing, no safetensors, or not what the manifest asks for.
Tensors load_tenants(const std::filesystem::path& bundle, const BundleManifest& manifest, const TargetSpec& target);

}  // namespace iapt

#endif  // IAPT_SRC_TENANTS_H_
