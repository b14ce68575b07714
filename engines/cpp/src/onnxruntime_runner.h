#ifndef IAPT_SRC_ONNXRUNTIME_RUNNER_H_
#define IAPT_SRC_ONNXRUNTIME_RUNNER_H_

#include "iapt/runner.h"

namespace iapt {

std::unique_ptr<Runner> open_onnxruntime(const std::filesystem::path& path, const GraphSpec& graph,
                                         const RunnerOptions& options);

}  // namespace iapt

#endif  // IAPT_SRC_ONNXRUNTIME_RUNNER_H_
