// Feeds malformed input to everything that reads files from outside: manifests, safetensors files, tokenizers and chat
// templates. Whatever comes, the answer is a value or an iapt::Error; anything else is a defect, which the sanitizers
// report.
//
//     fuzz_files SECONDS FOLDER   reads FOLDER/KIND/*, then mutates them for a bounded time, always in the same order
//     fuzz_files --judge          reads inputs from stdin, each after a line "KIND SIZE", and answers each with a line:
//                                 {"error": ...}, or what was read; tests compare with Python's readers
//
// With clang and -DIAPT_LIBFUZZER=ON this is a libFuzzer target, whose first byte chooses the kind.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "chat_template.h"
#include "decoder.h"
#include "iapt/manifest.h"
#include "json_fields.h"
#include "safetensors.h"
#include "tokenizer_parts.h"

namespace {

using iapt::Json;

Json of(const std::optional<std::string>& text) { return text ? Json(*text) : Json(); }

Json of(const iapt::Range& range) { return {range.min, range.opt, range.max}; }

Json read_manifest(const std::string& text) {
  const auto manifest = iapt::BundleManifest::parse(text, "fuzz");
  const auto& backbone = manifest.backbone;
  const auto& ranges = manifest.ranges;
  Json methods = Json::array(), tenants = Json::array(), targets = Json::array(), files = Json::object();
  for (const auto& method : manifest.methods) methods.push_back({method.name, method.form, method.prompt_length});
  for (const auto& tenant : manifest.tenants) {
    tenants.push_back({tenant.name, of(tenant.method), of(tenant.path), tenant.prompt_format, of(tenant.system_prompt),
                       tenant.labels, manifest.prompt_length(tenant.name)});
  }
  for (const auto& target : manifest.targets) targets.push_back({target.name, target.dtype, target.graphs.size()});
  for (const auto& [name, file] : manifest.files) files[name] = file.size_bytes;
  return {{"backbone",
           {backbone.hidden_size, backbone.num_layers, backbone.num_kv_heads, backbone.head_dim, backbone.value_dim,
            backbone.vocab_size, backbone.max_positions, backbone.pad_token_id, backbone.eos_token_ids,
            backbone.fingerprint}},
          {"methods", methods},
          {"tenants", tenants},
          {"targets", targets},
          {"files", files},
          {"ranges", {of(ranges.batch), of(ranges.sequence), of(ranges.past), of(ranges.tenants)}},
          {"slots", manifest.num_slots()},
          {"verdict", manifest.verdict}};
}

Json read_safetensors(const std::string& bytes) {
  const auto weights = iapt::parse_safetensors(bytes, "fuzz");
  Json tensors = Json::object();
  for (const auto& [name, tensor] : weights.tensors) tensors[name] = {tensor.dtype, tensor.shape};
  return {{"tensors", tensors}, {"metadata", weights.metadata}};
}

Json read_tokenizer(const std::string& text) {
  const Json json = iapt::parse_json(text);
  try {
    const iapt::TokenizerParts parts(json);
    const iapt::Decoder decoder(json);
    const std::string probe = "A fine film, 123 \xc3\xa4\xe2\x82\xac!";
    if (parts.refusal(probe).empty()) (void)parts.pieces(probe);
    return {{"text", decoder.decode({0, 1, 2, 300, -1, 1 << 30})}};
  } catch (const Json::exception& error) {  // as TextCodec turns it into an error
    throw iapt::Error(error.what());
  }
}

Json read_template(const std::string& text) {
  return {{"text", iapt::prepared_template(text, {{"bos_token", "<s>"}, {"eos_token", "</s>"}}, "2026")}};
}

using Reader = Json (*)(const std::string&);
const std::pair<const char*, Reader> kReaders[] = {{"manifest", read_manifest},
                                                   {"safetensors", read_safetensors},
                                                   {"tokenizer", read_tokenizer},
                                                   {"template", read_template}};

Json judged(Reader read, const std::string& text) {
  try {
    return read(text);
  } catch (const iapt::Error& error) {
    return {{"error", error.what()}};
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  judged(kReaders[data[0] % std::size(kReaders)].second, {reinterpret_cast<const char*>(data) + 1, size - 1});
  return 0;
}

#ifndef IAPT_LIBFUZZER
namespace {

std::string file_content(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

// A seed with a few small damages, the kinds that truncation, editing and malice bring.
std::string damaged(std::string text, std::mt19937& source) {
  static const char* const kWords[] = {
      "null", "-1", "1e999", "18446744073709551615", "[]", "{}", "\"\\u0000\"", "../", "\"", "[[[[[[[[",
      "true", "0",  "",      "9223372036854775807",  "{%", "%}", "{{"};
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

int judge() {
  std::string kind;
  size_t size = 0;
  while (std::cin >> kind >> size) {
    std::cin.get();
    std::string text(size, '\0');
    std::cin.read(text.data(), static_cast<std::streamsize>(size));
    const auto is_kind = [&](const auto& reader) { return reader.first == kind; };
    const auto* reader = std::find_if(std::begin(kReaders), std::end(kReaders), is_kind);
    if (!std::cin || reader == std::end(kReaders)) return 2;
    std::cout << judged(reader->second, text).dump(-1, ' ', true, Json::error_handler_t::replace) << '\n';
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::string(argv[1]) == "--judge") return judge();
  if (argc != 3) {
    std::fprintf(stderr, "usage: fuzz_files SECONDS FOLDER, or fuzz_files --judge\n");
    return 2;
  }
  std::vector<std::pair<Reader, std::string>> seeds;
  for (const auto& [kind, read] : kReaders) {
    std::vector<std::filesystem::path> paths;
    size_t valid = 0;
    const auto folder = std::filesystem::path(argv[2]) / kind;
    for (const auto& item : std::filesystem::directory_iterator(folder)) paths.push_back(item.path());
    std::sort(paths.begin(), paths.end());
    for (const auto& path : paths) {
      seeds.emplace_back(read, file_content(path));
      valid += !judged(read, seeds.back().second).contains("error");
    }
    if (valid == 0) {  // then nothing behind the first check would be tested
      std::fprintf(stderr, "no seed in %s is valid\n", folder.c_str());
      return 2;
    }
  }
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(std::stol(argv[1]));
  std::mt19937 source(0);
  long count = 0;
  while (std::chrono::steady_clock::now() < end) {
    for (const auto& [read, seed] : seeds) judged(read, damaged(seed, source));
    count += static_cast<long>(seeds.size());
  }
  std::printf("%ld malformed inputs, each read or refused\n", count);
  return 0;
}
#endif
