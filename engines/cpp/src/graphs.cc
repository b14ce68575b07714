#include "iapt/graphs.h"

namespace iapt {

std::optional<StepGraphs> step_graphs(const std::map<std::string, GraphSpec>& graphs, bool in_place,
                                      const std::string& device) {
  StepGraphs found{nullptr, nullptr};
  for (const GraphKind& kind : kGraphKinds) {
    const auto graph = graphs.find(std::string(kind.name));
    if (graph == graphs.end() || kind.in_place != in_place || (device != "cpu" && kind.needs_onnxruntime)) continue;
    if (kind.reads && found.reads == nullptr) found.reads = &graph->second;
    if (kind.continues && found.continues == nullptr) found.continues = &graph->second;
  }
  if (found.reads == nullptr || found.continues == nullptr) return std::nullopt;
  return found;
}

}  // namespace iapt
