#include "probes.h"

#include <fstream>
#include <iterator>

#include "json_fields.h"

namespace iapt {
namespace {

using Problems = std::vector<std::string>;

Message read_message(const Json& json, const std::string& where, Problems& problems) {
  Message message;
  Fields fields(json, where, problems);
  fields.read("role", message.role);
  fields.read("content", message.content);
  fields.refuse_unknown();
  return message;
}

}  // namespace

Probes Probes::load(const std::filesystem::path& bundle) {
  const auto path = bundle / "probes.json";
  std::ifstream stream(path, std::ios::binary);
  if (!stream) {
    throw Error(bundle.string() +
                " holds no probes.json, by which this program's text is compared with training's; "
                "build the bundle again");
  }
  const Json json = parse_json(std::string(std::istreambuf_iterator<char>(stream), {}));
  Problems problems;
  Probes probes;
  Fields fields(json, "probes", problems);
  int64_t version = 0;
  fields.read("schema_version", version);
  if (version != kProbesVersion) {
    throw Error(path.string() + ": schema_version is " + std::to_string(version) + ", this program reads " +
                std::to_string(kProbesVersion) + "; build the bundle again, or take the program of its version");
  }
  fields.read("date", probes.date);
  fields.array("texts", [&](const Json& item, const std::string& place) {
    Fields inner(item, place, problems);
    TextProbe probe;
    inner.read("text", probe.text);
    probe.ids = inner.integers("ids");
    inner.refuse_unknown();
    probes.texts.push_back(std::move(probe));
  });
  fields.array("chats", [&](const Json& item, const std::string& place) {
    Fields inner(item, place, problems);
    ChatProbe probe;
    inner.array("messages", [&](const Json& message, const std::string& where) {
      probe.messages.push_back(read_message(message, where, problems));
    });
    inner.read("text", probe.text);
    probe.ids = inner.integers("ids");
    inner.refuse_unknown();
    probes.chats.push_back(std::move(probe));
  });
  fields.array("answers", [&](const Json& item, const std::string& place) {
    Fields inner(item, place, problems);
    AnswerProbe probe;
    probe.ids = inner.integers("ids");
    inner.read("text", probe.text);
    inner.refuse_unknown();
    probes.answers.push_back(std::move(probe));
  });
  fields.refuse_unknown();
  if (!problems.empty()) throw Error(path.string() + " is not valid: " + joined(problems, "; "));
  return probes;
}

}  // namespace iapt
