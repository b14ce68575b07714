// What libiapt makes of texts, conversations and ids, for tests: one JSON object on stdin, one on stdout.
//
//     read_texts FOLDER < {"eos": [2], "texts": [...], "chats": [[{"role": ..., "content": ...}]], "answers": [[...]]}
//
// A result is {"ids": [...]}, {"text": ...} or {"error": ...}; the codec's refusal stands alone as {"error": ...}.
#include <iostream>
#include <nlohmann/json.hpp>

#include "iapt/text.h"

using Json = nlohmann::json;

int main(int, char** argv) {
  const Json given = Json::parse(std::cin);
  Json made = Json::object();
  const auto result = [](const auto& compute) {
    try {
      return compute();
    } catch (const iapt::Error& error) {
      return Json{{"error", error.what()}};
    }
  };
  try {
    iapt::BundleManifest manifest;
    manifest.backbone.eos_token_ids = given.at("eos").get<std::vector<int64_t>>();
    manifest.backbone.pad_token_id = manifest.backbone.eos_token_ids.at(0);
    manifest.backbone.vocab_size = 1 << 20;
    manifest.backbone.max_positions = 4096;
    const iapt::TextCodec codec(argv[1], manifest);
    made = {{"texts", Json::array()}, {"lines", Json::array()}, {"chats", Json::array()}, {"answers", Json::array()}};
    for (const auto& text : given.at("texts")) {
      made["texts"].push_back(result([&] { return Json{{"ids", codec.encode({{"user", text}}, "plain")}}; }));
      made["lines"].push_back(result([&] { return Json{{"ids", codec.encode({{"user", text}}, "newline")}}; }));
    }
    for (const auto& chat : given.at("chats")) {
      std::vector<iapt::Message> messages;
      for (const auto& message : chat) messages.push_back({message.at("role"), message.at("content")});
      made["chats"].push_back(result([&] {
        return Json{{"text", codec.render(messages, given.at("date"))}, {"ids", codec.encode(messages, "chat")}};
      }));
    }
    for (const auto& ids : given.at("answers")) {
      made["answers"].push_back(result([&] { return Json{{"text", codec.decode(ids)}}; }));
    }
  } catch (const iapt::Error& error) {
    made = {{"error", error.what()}};
  }
  std::cout << made.dump() << '\n';
  return 0;
}
