// The contract of everything that runs a graph. Making a runner loads the graph (Python's `activate`), destroying it
// gives the memory back.
#ifndef IAPT_RUNNER_H_
#define IAPT_RUNNER_H_

#include <filesystem>
#include <memory>
#include <string>

#include "iapt/manifest.h"
#include "iapt/tensor.h"

namespace iapt {

class Runner {
 public:
  virtual ~Runner() = default;

  // Runs the graph once.
  //   feeds   every input by name, of the manifest's types and shapes; others are left alone
  //   into    outputs that are to be written to memory which is there already, for example an input's own
  // Returns every output by name; a cache may stay on the GPU, everything else is on the host.
  // Throws Error: an input is missing, or the runtime refuses it.
  virtual Tensors infer(const Tensors& feeds, const Tensors& into = {}) = 0;

  // Zeros where this runner wants to find what stays between its calls.
  virtual Tensor zeros(const std::string& dtype, std::vector<int64_t> shape) { return {dtype, std::move(shape)}; }

  // Which form of ai.iapt::Rational runs: "native kernel", "function body" or "plugin".
  virtual std::string rational() const = 0;
};

struct RunnerOptions {
  std::string device = "cpu";  // cpu or cuda, for ONNX Runtime; TensorRT always runs on the GPU
  int threads = 0;             // 0 takes every processor that this process may use
};

// The runner of one graph of a target. Throws Error: this program or this machine cannot run it; the text says what
// could.
std::unique_ptr<Runner> open_runner(const std::filesystem::path& bundle, const TargetSpec& target,
                                    const GraphSpec& graph, const RunnerOptions& options);

}  // namespace iapt

#endif  // IAPT_RUNNER_H_
