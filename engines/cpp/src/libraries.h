#ifndef IAPT_SRC_LIBRARIES_H_
#define IAPT_SRC_LIBRARIES_H_

#include <filesystem>
#include <optional>
#include <string>

namespace iapt {

// A shared library that is optional: the file that an environment variable names ("none" asks for no file), else the
// one of this name beside the program or library that holds this code, or in ../lib from there.
std::optional<std::filesystem::path> find_library(const char* variable, const std::string& name);

// Tells ONNX Runtime and onnxruntime-genai, before their first call, to keep no identifier of the machine and to send no
// events to Microsoft, which they do on Linux from 1.29 and 0.18 on. Whoever wants that sets ORT_DISABLE_TELEMETRY to 0.
void keep_telemetry_off();

}  // namespace iapt

#endif  // IAPT_SRC_LIBRARIES_H_
