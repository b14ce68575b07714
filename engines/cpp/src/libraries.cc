#include "libraries.h"

#include <dlfcn.h>

#include <cstdlib>

namespace iapt {
namespace {

// ONNX Runtime and onnxruntime-genai keep an identifier of the machine and send events to Microsoft, on Linux from 1.29
// and 0.18 on, unless this is set before their first call. Whoever wants that sets it to 0.
[[maybe_unused]] const int kTelemetryIsOff = setenv("ORT_DISABLE_TELEMETRY", "1", /*overwrite=*/0);

}  // namespace

std::optional<std::filesystem::path> find_library(const char* variable, const std::string& name) {
  const char* named = std::getenv(variable);
  if (named != nullptr && *named != '\0') {
    if (std::string(named) == "none") return std::nullopt;
    return std::filesystem::path(named);
  }
  Dl_info info;
  if (dladdr(reinterpret_cast<const void*>(&find_library), &info) == 0) return std::nullopt;
  const auto here = std::filesystem::absolute(info.dli_fname).parent_path();
  for (const auto& folder : {here, here.parent_path() / "lib"}) {
    if (std::filesystem::is_regular_file(folder / name)) return folder / name;
  }
  return std::nullopt;
}

}  // namespace iapt
