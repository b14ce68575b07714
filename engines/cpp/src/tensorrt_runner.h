// The one function of libiapt_tensorrt.so and libiapt_tensorrt_rtx.so.
#ifndef IAPT_SRC_TENSORRT_RUNNER_H_
#define IAPT_SRC_TENSORRT_RUNNER_H_

#include "iapt/runner.h"

namespace iapt {

// One engine on the first GPU; the caller owns the runner. Throws Error: no GPU or driver, or an engine of another
// version or GPU.
using OpenTensorRT = Runner* (*)(const std::filesystem::path& path, const TargetSpec& target, const GraphSpec& graph);

constexpr const char* kOpenTensorRT = "iapt_open_tensorrt";

}  // namespace iapt

#endif  // IAPT_SRC_TENSORRT_RUNNER_H_
