#include "iapt/runner.h"

#include "onnxruntime_runner.h"
#ifdef IAPT_TENSORRT_TARGET
#include "tensorrt_runner.h"
#endif

namespace iapt {

std::unique_ptr<Runner> open_runner(const std::filesystem::path& bundle, const TargetSpec& target,
                                    const GraphSpec& graph, const RunnerOptions& options) {
  const auto path = bundle / graph.path;
  if (target.name == "onnxruntime") return open_onnxruntime(path, graph, options);
#ifdef IAPT_TENSORRT_TARGET
  if (target.name == IAPT_TENSORRT_TARGET) return open_tensorrt(path, target, graph);
  throw Error("target " + target.name + " is not in this program, which has onnxruntime and " IAPT_TENSORRT_TARGET
              "; link the other TensorRT (CMake: TENSORRT_ROOT)");
#else
  throw Error("target " + target.name +
              " is not in this program, which has onnxruntime; compile it with TensorRT (CMake: TENSORRT_ROOT)");
#endif
}

}  // namespace iapt
