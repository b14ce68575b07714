#include "onnxruntime_runner.h"

#include <dlfcn.h>
#include <onnxruntime_cxx_api.h>
#include <sched.h>

#include <algorithm>
#include <utility>

#include "libraries.h"

namespace iapt {
namespace {

struct OnnxType {
  const char* dtype;
  ONNXTensorElementDataType type;
};
constexpr OnnxType kTypes[] = {
    {"int64", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64},   {"int32", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32},
    {"int8", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8},     {"bool", ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL},
    {"fp32", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},    {"fp16", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16},
    {"bf16", ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16},
};

ONNXTensorElementDataType onnx_type(const std::string& dtype) {
  for (const auto& known : kTypes) {
    if (dtype == known.dtype) return known.type;
  }
  throw Error("tensor type '" + dtype + "' is not known to ONNX Runtime's runner");
}

std::string dtype_of(ONNXTensorElementDataType type) {
  for (const auto& known : kTypes) {
    if (type == known.type) return known.dtype;
  }
  throw Error("ONNX Runtime gives a tensor of a type that this program does not know");
}

Ort::Env& environment() {
  static Ort::Env made(ORT_LOGGING_LEVEL_ERROR, "iapt");
  return made;
}

int available_processors() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 0;
}

class OnnxRuntimeRunner final : public Runner {
 public:
  OnnxRuntimeRunner(const std::filesystem::path& path, const GraphSpec& graph, const RunnerOptions& options)
      : graph_(graph), on_gpu_(options.device == "cuda") {
    refuse_faulty();
    refuse_rounded_cache(graph);
    check_device(options.device);
    if (options.threads < 0) throw Error(std::to_string(options.threads) + " threads; expected 0 or more");
    try {
      Ort::SessionOptions session;
      session.SetIntraOpNumThreads(options.threads > 0 ? options.threads : available_processors());
      if (on_gpu_) session.AppendExecutionProvider_CUDA_V2(*Ort::CUDAProviderOptions());
      add_kernels(session);
      session_ = Ort::Session(environment(), path.c_str(), session);
    } catch (const Ort::Exception& error) {
      throw Error("ONNX Runtime refuses " + path.string() + ": " + error.what());
    }
  }

  std::string rational() const override { return rational_; }

  Tensors infer(const Tensors& feeds, const Tensors& into) override {
    try {
      Ort::IoBinding binding(session_);
      for (const auto& input : graph_.inputs) {
        const auto found = feeds.find(input.name);
        if (found == feeds.end()) throw Error(graph_.path + ": input " + input.name + " is missing");
        binding.BindInput(input.name.c_str(), value_of(found->second));
      }
      for (const auto& output : graph_.outputs) {
        const auto found = into.find(output.name);
        if (found != into.end()) {
          binding.BindOutput(output.name.c_str(), value_of(found->second));
        } else {
          const bool stays = on_gpu_ && output.name.rfind("present.", 0) == 0;
          binding.BindOutput(output.name.c_str(), stays ? gpu_memory_ : cpu_memory_);
        }
      }
      binding.SynchronizeInputs();
      session_.Run(Ort::RunOptions(nullptr), binding);
      binding.SynchronizeOutputs();
      return collect(binding, into);
    } catch (const Ort::Exception& error) {
      throw Error(graph_.path + ": ONNX Runtime says: " + error.what());
    }
  }

 private:
  // The releases that engines/onnxruntime/runner.py refuses.
  static void refuse_faulty() {
    if (Ort::GetVersionString() != "1.23.0") return;
    throw Error(
        "ONNX Runtime 1.23.0 gives wrong answers: its Attention-23 is wrong where several query heads share a key "
        "head; "
        "expected 1.23.1 or newer");
  }

  // So does that file: 1.25 and 1.26 load such a graph and fail at its first step.
  static void refuse_rounded_cache(const GraphSpec& graph) {
    const auto is_rounded = [](const TensorSpec& tensor) { return tensor.dtype == "int8"; };
    if (std::none_of(graph.inputs.begin(), graph.inputs.end(), is_rounded)) return;
    const std::string version = Ort::GetVersionString();
    const auto release = std::make_pair(std::stoi(version), std::stoi(version.substr(version.find('.') + 1)));
    if (release >= std::make_pair(1, 27)) return;
    throw Error("a cache in 8 bits needs ONNX Runtime 1.27 or newer, and this is " + version +
                "; link a newer one, or build without cache=8");
  }

  static void check_device(const std::string& device) {
    std::string offered;
    for (const auto& provider : Ort::GetAvailableProviders()) {
      if (provider == (device == "cpu" ? "CPUExecutionProvider" : device == "cuda" ? "CUDAExecutionProvider" : "")) {
        return;
      }
      offered += (offered.empty() ? "" : ", ") + provider;
    }
    throw Error("device '" + device + "' is not available: this ONNX Runtime offers " + offered +
                "; use --device cpu, or link its GPU build on a machine with an NVIDIA GPU");
  }

  // Our kernel of ai.iapt::Rational where it lies beside this program; the graph's function body otherwise.
  void add_kernels(Ort::SessionOptions& session) {
    const auto library = find_library("IAPT_OPS_LIBRARY", "libiapt_ops.so");
    if (!library) return;
    void* handle = dlopen(library->c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
      rational_ += std::string(" (") + dlerror() + ")";
      return;
    }
    auto* has_cuda = reinterpret_cast<int32_t (*)()>(dlsym(handle, "iapt_ops_has_cuda"));
    if (on_gpu_ && (has_cuda == nullptr || has_cuda() == 0)) {
      rational_ += " (libiapt_ops.so was built without CUDA)";  // its kernel would fetch each tensor from the GPU
      return;
    }
    session.RegisterCustomOpsLibrary(library->c_str());
    rational_ = "native kernel";
  }

  // The tensor's memory as ONNX Runtime's value, without a copy.
  Ort::Value value_of(const Tensor& tensor) const {
    const auto& memory = tensor.on_gpu ? gpu_memory_ : cpu_memory_;
    return Ort::Value::CreateTensor(memory, tensor.data.get(), tensor.num_bytes(), tensor.shape.data(),
                                    tensor.shape.size(), onnx_type(tensor.dtype));
  }

  Tensors collect(const Ort::IoBinding& binding, const Tensors& into) const {
    const auto names = binding.GetOutputNames();
    auto values = binding.GetOutputValues();
    Tensors outputs;
    for (size_t i = 0; i < names.size(); ++i) {
      const auto given = into.find(names[i]);
      if (given != into.end()) {
        outputs[names[i]] = given->second;
        continue;
      }
      const auto info = values[i].GetTensorTypeAndShapeInfo();
      const bool stays = values[i].GetTensorMemoryInfo().GetDeviceType() == OrtMemoryInfoDeviceType_GPU;
      auto owner = std::make_shared<Ort::Value>(std::move(values[i]));
      void* data = owner->GetTensorMutableRawData();
      outputs[names[i]] =
          Tensor(dtype_of(info.GetElementType()), info.GetShape(), std::shared_ptr<void>(owner, data), stays);
    }
    return outputs;
  }

  GraphSpec graph_;
  bool on_gpu_;
  std::string rational_ = "function body";
  Ort::Session session_{nullptr};
  Ort::MemoryInfo cpu_memory_ = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  Ort::MemoryInfo gpu_memory_{"Cuda", OrtDeviceAllocator, 0, OrtMemTypeDefault};
};

}  // namespace

std::unique_ptr<Runner> open_onnxruntime(const std::filesystem::path& path, const GraphSpec& graph,
                                         const RunnerOptions& options) {
  return std::make_unique<OnnxRuntimeRunner>(path, graph, options);
}

}  // namespace iapt
