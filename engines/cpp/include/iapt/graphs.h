// The graphs that a bundle may have, a row each: the table of iapt_export/contract/graphs.py, with the same words. A
// test compares the two.
#ifndef IAPT_GRAPHS_H_
#define IAPT_GRAPHS_H_

#include <map>
#include <optional>
#include <string>
#include <string_view>

#include "iapt/manifest.h"

namespace iapt {

// What a graph is for.
struct GraphKind {
  std::string_view name;   // in a manifest
  bool reads;              // it reads instructions
  bool continues;          // it goes on from them, a token a row
  bool in_place;           // its cache is written in place; else each step returns a longer one
  bool verifies;           // it goes on by several tokens a row, which a session drafted
  bool needs_onnxruntime;  // it has operators of ONNX Runtime's own, which are used on the CPU
};

// Of graphs for one purpose, the better first.
// clang-format off
inline constexpr GraphKind kGraphKinds[] = {
    {"encoder", false, false, false, false, false},  // makes the prompts of a method that computes them beforehand
    {"prefill", true, false, false, false, false},
    {"decode", false, true, false, false, false},
    {"serve", true, true, true, false, true},
    {"verify", false, false, true, true, true},  // a step of drafted tokens
    {"serve_prefill", true, false, true, false, false},
    {"serve_decode", false, true, true, false, false},
    {"generator", false, false, false, false, false},  // makes prompts at every layer, alone, for comparison
};
// clang-format on
inline constexpr std::string_view kEncoder = "encoder";

// Two graphs of a target, which may be one and the same.
struct StepGraphs {
  const GraphSpec *reads, *continues;
};

// The graphs that read instructions and that go on from them over one kind of cache, none where `graphs` has no such
// two.
//   in_place  which kind, see GraphKind
//   device    cpu or cuda, where they shall run
std::optional<StepGraphs> step_graphs(const std::map<std::string, GraphSpec>& graphs, bool in_place,
                                      const std::string& device = "cpu");

}  // namespace iapt

#endif  // IAPT_GRAPHS_H_
