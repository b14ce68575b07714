// Either TensorRT: both have the same C++ interface, and each makes a library of its own from this file.
#include "tensorrt_runner.h"

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <fstream>
#include <iterator>

#include "libraries.h"

namespace iapt {
namespace {

void check(cudaError_t status, const std::string& what) {
  if (status != cudaSuccess) throw Error(what + ": CUDA says: " + cudaGetErrorString(status));
}

// Keeps what TensorRT says went wrong, for the error that follows.
class ErrorLogger final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity > Severity::kERROR) return;
    try {
      text_ += (text_.empty() ? "" : "; ") + std::string(message);
    } catch (const std::exception&) {  // no memory for the message: the error is told without it
    }
  }
  std::string taken() {
    std::string text = text_.empty() ? "it gives no reason" : text_;
    text_.clear();
    return text;
  }

 private:
  std::string text_;
};

// CUDA's stream as a member, so that it outlives the buffers that are freed on it.
class Stream {
 public:
  Stream() { check(cudaStreamCreate(&handle_), "a CUDA stream cannot be made"); }
  ~Stream() { cudaStreamDestroy(handle_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return handle_; }
  void wait() const { check(cudaStreamSynchronize(handle_), "the GPU's work failed"); }

 private:
  cudaStream_t handle_ = nullptr;
};

void require_gpu(const TargetSpec& target) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && count > 0) return;
  throw Error("target " + target.name + " needs an NVIDIA GPU and its driver, and there is none here (CUDA says: " +
              cudaGetErrorString(status == cudaSuccess ? cudaErrorNoDevice : status) +
              "); run on a machine that has them, or take --target onnxruntime");
}

std::vector<int64_t> shape_of(const nvinfer1::Dims& dims) { return {dims.d, dims.d + dims.nbDims}; }

nvinfer1::Dims dims_of(const std::vector<int64_t>& shape) {
  nvinfer1::Dims dims{};
  if (shape.size() > static_cast<size_t>(nvinfer1::Dims::MAX_DIMS)) throw Error("a tensor has too many dimensions");
  dims.nbDims = static_cast<int32_t>(shape.size());
  for (size_t axis = 0; axis < shape.size(); ++axis) dims.d[axis] = shape[axis];
  return dims;
}

class TensorRTRunner final : public Runner {
 public:
  TensorRTRunner(const std::filesystem::path& path, const TargetSpec& target, const GraphSpec& graph)
      : graph_(graph), rational_(target.rational == "plugin" ? "plugin" : "function body") {
    require_gpu(target);
    stream_ = std::make_shared<Stream>();
    runtime_.reset(nvinfer1::createInferRuntime(logger_));
    if (!runtime_) throw Error(target.name + " cannot start: " + logger_.taken());
    if (target.rational == "plugin") load_plugin();
    std::ifstream file(path, std::ios::binary);
    const std::string plan(std::istreambuf_iterator<char>(file), {});
    engine_.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
    if (engine_) context_.reset(engine_->createExecutionContext());
    if (!context_) {
      throw Error(target.name + " cannot open " + path.string() + ": " + logger_.taken() + "; it was built by " +
                  target.runtime_version +
                  ", and engines open only in the version and on the GPUs they were built for");
    }
  }

  std::string rational() const override { return rational_; }

  Tensor zeros(const std::string& dtype, std::vector<int64_t> shape) override {
    const Tensor made = gpu_tensor(dtype, std::move(shape));
    check(cudaMemsetAsync(made.data.get(), 0, made.num_bytes(), stream_->get()), "clearing memory on the GPU");
    stream_->wait();  // another runner, on a stream of its own, may be the first to read it
    return made;
  }

  Tensors infer(const Tensors& feeds, const Tensors& into) override {
    Tensors outputs;
    for (const auto& input : graph_.inputs) {
      const auto found = feeds.find(input.name);
      if (found == feeds.end()) throw Error(graph_.path + ": input " + input.name + " is missing");
      const Tensor tensor = on_gpu(input.name, found->second);
      if (!context_->setInputShape(input.name.c_str(), dims_of(tensor.shape)) ||
          !context_->setTensorAddress(input.name.c_str(), tensor.data.get())) {
        throw Error(graph_.path + ": TensorRT refuses input " + input.name + ": " + logger_.taken());
      }
    }
    for (const auto& output : graph_.outputs) {
      const auto given = into.find(output.name);
      outputs[output.name] = given != into.end()
                                 ? given->second
                                 : gpu_tensor(output.dtype, shape_of(context_->getTensorShape(output.name.c_str())));
      context_->setTensorAddress(output.name.c_str(), outputs[output.name].data.get());
    }
    if (!context_->enqueueV3(stream_->get())) throw Error(graph_.path + ": TensorRT fails to run: " + logger_.taken());
    for (auto& [name, tensor] : outputs) {  // the cache stays where the next step needs it
      if (name.rfind("present.", 0) != 0) tensor = on_host(tensor);
    }
    stream_->wait();
    return outputs;
  }

 private:
  struct Upload {
    Tensor host, gpu;
  };

  void load_plugin() {
    const auto library = find_library("IAPT_PLUGIN_LIBRARY", "libiapt_trt_plugin.so");
    if (!library) throw Error("this engine needs libiapt_trt_plugin.so, which is not beside this program");
    auto& registry = runtime_->getPluginRegistry();
    if (registry.getCreator("Rational", "1", "") != nullptr) return;
    if (registry.loadLibrary(library->c_str()) == nullptr) {
      throw Error("TensorRT cannot load " + library->string() + ": " + logger_.taken());
    }
  }

  Tensor gpu_tensor(const std::string& dtype, std::vector<int64_t> shape) const {
    Tensor made(dtype, std::move(shape), nullptr, true);
    void* data = nullptr;
    const size_t bytes = made.num_bytes();
    check(cudaMallocAsync(&data, bytes > 0 ? bytes : 1, stream_->get()), "memory on the GPU");
    made.data = std::shared_ptr<void>(data, [stream = stream_](void* p) { cudaFreeAsync(p, stream->get()); });
    return made;
  }

  // Uploads a host tensor; one that was uploaded before, such as the tenants' weights, is there already.
  Tensor on_gpu(const std::string& name, const Tensor& tensor) {
    if (tensor.on_gpu) return tensor;
    Upload& last = uploads_[name];
    if (last.host.data != tensor.data || last.host.shape != tensor.shape) {
      last = {tensor, gpu_tensor(tensor.dtype, tensor.shape)};  // holding the host's memory keeps its address unique
      check(cudaMemcpyAsync(last.gpu.data.get(), tensor.data.get(), tensor.num_bytes(), cudaMemcpyHostToDevice,
                            stream_->get()),
            "upload of " + name);
    }
    return last.gpu;
  }

  Tensor on_host(const Tensor& tensor) const {
    if (!tensor.on_gpu) return tensor;
    Tensor made(tensor.dtype, tensor.shape);
    check(cudaMemcpyAsync(made.data.get(), tensor.data.get(), made.num_bytes(), cudaMemcpyDeviceToHost, stream_->get()),
          "download");
    return made;
  }

  GraphSpec graph_;
  std::string rational_;
  ErrorLogger logger_;
  // destroyed from the last to the first: buffers, context, engine, runtime, stream
  std::shared_ptr<Stream> stream_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  std::map<std::string, Upload> uploads_;
};

}  // namespace
}  // namespace iapt

extern "C" __attribute__((visibility("default"))) iapt::Runner* iapt_open_tensorrt(const std::filesystem::path& path,
                                                                                   const iapt::TargetSpec& target,
                                                                                   const iapt::GraphSpec& graph) {
  return new iapt::TensorRTRunner(path, target, graph);
}
