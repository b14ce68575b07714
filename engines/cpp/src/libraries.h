#ifndef IAPT_SRC_LIBRARIES_H_
#define IAPT_SRC_LIBRARIES_H_

#include <filesystem>
#include <optional>
#include <string>

namespace iapt {

// A shared library that is optional: the file that an environment variable names ("none" asks for no file), else the
// one of this name beside the program or library that holds this code, or in ../lib from there.
std::optional<std::filesystem::path> find_library(const char* variable, const std::string& name);

}  // namespace iapt

#endif  // IAPT_SRC_LIBRARIES_H_
