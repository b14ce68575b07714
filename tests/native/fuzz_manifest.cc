// Feeds malformed input to everything that reads files from outside: the manifest and safetensors files. Whatever
// comes, the answer is a value or an iapt::Error; anything else is a defect, which the sanitizers report.
//
// With clang and -DIAPT_LIBFUZZER=ON this is a libFuzzer target. Otherwise it mutates its seed files itself for a
// bounded time, always in the same order: fuzz_manifest SECONDS MANIFEST SAFETENSORS
#include <unistd.h>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>

#include "iapt/manifest.h"
#include "safetensors.h"

namespace {

void read_manifest(const std::string& text) {
  try {
    const auto manifest = iapt::BundleManifest::parse(text, "fuzz");
    for (const auto& tenant : manifest.tenants) manifest.prompt_length(tenant.name);
    manifest.num_slots();
    if (!manifest.targets.empty()) manifest.target("");
    iapt::verify_files("/nonexistent", manifest);
  } catch (const iapt::Error&) {
  }
}

void read_weights(const std::string& bytes) {
  static const auto path = std::filesystem::temp_directory_path() / ("iapt-fuzz-" + std::to_string(getpid()));
  std::ofstream(path, std::ios::binary) << bytes;
  try {
    for (const auto& [name, tensor] : iapt::read_safetensors(path)) (void)tensor.num_bytes();
  } catch (const iapt::Error&) {
  }
  std::filesystem::remove(path);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string rest(reinterpret_cast<const char*>(data) + 1, size - 1);
  data[0] % 2 == 0 ? read_manifest(rest) : read_weights(rest);
  return 0;
}

#ifndef IAPT_LIBFUZZER
namespace {

std::string file_content(const char* path) {
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

// A seed with a few small damages, the kinds that truncation, editing and malice bring.
std::string damaged(std::string text, std::mt19937& source) {
  static const char* const kWords[] = {
      "null", "-1", "1e999", "18446744073709551615", "[]", "{}", "\"\\u0000\"", "../", "\"", "[[[[[[[[",
      "true", "0",  "",      "9223372036854775807"};
  const auto below = [&](size_t limit) { return limit == 0 ? 0 : source() % limit; };
  for (size_t count = 1 + below(4); count > 0; --count) {
    const size_t at = below(text.size());
    switch (below(6)) {
      case 0:
        if (!text.empty()) text[at] = static_cast<char>(source());
        break;
      case 1:
        text.resize(at);
        break;
      case 2:
        text.insert(at, kWords[below(std::size(kWords))]);
        break;
      case 3:
        text.erase(at, 1 + below(40));
        break;
      case 4:
        text.insert(at, text.substr(below(text.size()), 1 + below(200)));
        break;
      default: {  // a value becomes another
        const size_t colon = text.find(": ", at);
        const size_t end = colon == std::string::npos ? colon : text.find_first_of(",\n", colon);
        if (end != std::string::npos) text.replace(colon + 2, end - colon - 2, kWords[below(std::size(kWords))]);
      }
    }
  }
  return text;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: fuzz_manifest SECONDS MANIFEST SAFETENSORS\n");
    return 2;
  }
  const std::string manifest = file_content(argv[2]), weights = file_content(argv[3]);
  if (manifest.empty() || weights.empty()) {
    std::fprintf(stderr, "a seed file is missing or empty\n");
    return 2;
  }
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(std::stol(argv[1]));
  std::mt19937 source(0);
  iapt::BundleManifest::parse(manifest, "the seed");  // throws if the seed is not valid: then nothing would be tested
  long count = 0;
  while (std::chrono::steady_clock::now() < end) {
    for (int i = 0; i < 50; ++i, count += 2) {
      read_manifest(damaged(manifest, source));
      read_weights(damaged(weights, source));
    }
  }
  std::printf("%ld malformed inputs, each read or refused\n", count);
  return 0;
}
#endif
