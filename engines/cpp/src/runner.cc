#include "iapt/runner.h"

#include <dlfcn.h>

#include <algorithm>

#include "libraries.h"
#include "onnxruntime_runner.h"
#include "tensorrt_runner.h"

namespace iapt {
namespace {

// TensorRT's runner lies in a library of its own for each flavour, so that a machine needs only what its bundle runs
// on.
OpenTensorRT tensorrt_runner(const std::string& target) {
  std::string name = "libiapt_" + target + ".so";
  std::replace(name.begin(), name.end(), '-', '_');
  const auto library = find_library("IAPT_TENSORRT_LIBRARY", name);
  if (!library) {
    throw Error("target " + target + " needs " + name +
                ", which is not beside this program; compile it where nvcc and "
                "TensorRT are (CMake: TENSORRT_ROOT), or take --target onnxruntime");
  }
  void* handle = dlopen(library->c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    throw Error("target " + target + " needs TensorRT's library: " + dlerror() +
                "; put its folder into LD_LIBRARY_PATH, or take --target onnxruntime");
  }
  auto* open = reinterpret_cast<OpenTensorRT>(dlsym(handle, kOpenTensorRT));
  if (open == nullptr) throw Error(library->string() + " is no runner of TensorRT engines");
  return open;
}

}  // namespace

std::unique_ptr<Runner> open_runner(const std::filesystem::path& bundle, const TargetSpec& target,
                                    const GraphSpec& graph, const RunnerOptions& options) {
  const auto path = bundle / graph.path;
  if (target.name == "onnxruntime") return open_onnxruntime(path, graph, options);
  if (target.name != "tensorrt" && target.name != "tensorrt-rtx") {
    throw Error("target " + target.name + " is not known; this program runs onnxruntime, tensorrt-rtx and tensorrt");
  }
  return std::unique_ptr<Runner>(tensorrt_runner(target.name)(path, target, graph));
}

}  // namespace iapt
