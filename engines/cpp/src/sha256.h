#ifndef IAPT_SRC_SHA256_H_
#define IAPT_SRC_SHA256_H_

#include <filesystem>
#include <string>

namespace iapt {

// SHA-256 of a file's bytes, in hex. Throws Error: the file cannot be read.
std::string file_sha256(const std::filesystem::path& path);

}  // namespace iapt

#endif  // IAPT_SRC_SHA256_H_
