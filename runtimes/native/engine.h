// Runs a bundle's three graphs with ONNX Runtime's C API, as runtimes/ort.py does, and to the same bits on one machine.
//
//   pixels -> vision_encoder -> features ---.
//   ids -> embed_tokens -> embeddings -> image rows replaced -> decoder_model_merged <-> cache, in place -> logits
#pragma once

#include <onnxruntime_c_api.h>

#include <array>
#include <cmath>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "bundle.h"
#include "machine.h"

constexpr uint32_t kApi = 21;        // level of ONNX Runtime's C API; newer libraries still offer it
constexpr int64_t kChunk = 128;      // tokens of a prompt that run at once
using Options = std::map<std::string, std::string>;

inline const OrtApi& api() {
  static const OrtApi* found = OrtGetApiBase()->GetApi(kApi);
  if (!found)
    throw Failed(std::string("ONNX Runtime ") + OrtGetApiBase()->GetVersionString() + " has no API level " +
                 std::to_string(kApi));
  return *found;
}

inline std::string engine_version() { return OrtGetApiBase()->GetVersionString(); }

inline std::string message(OrtStatus* status) {  // empty: no error
  if (!status) return "";
  const std::string text = api().GetErrorMessage(status);
  api().ReleaseStatus(status);
  return text.empty() ? "unknown error" : text;
}

inline void check(OrtStatus* status, const std::string& where) {
  const std::string text = message(status);
  if (!text.empty()) throw Failed(where + ": ONNX Runtime failed: " + text);
}

template <typename T>
using Handle = std::unique_ptr<T, void (*)(T*)>;

// A tensor over memory of ours, which must outlive it.
template <typename T>
Handle<OrtValue> tensor(T* data, const std::vector<int64_t>& shape) {
  constexpr auto type = std::is_same_v<T, float>     ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
                        : std::is_same_v<T, int64_t> ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64
                                                     : ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, int64_t> || std::is_same_v<T, bool>);
  static const Handle<OrtMemoryInfo> memory = [] {
    OrtMemoryInfo* made = nullptr;
    check(api().CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &made), "memory");
    return Handle<OrtMemoryInfo>(made, api().ReleaseMemoryInfo);
  }();
  size_t bytes = sizeof(T);
  for (const int64_t dim : shape) bytes *= static_cast<size_t>(dim);
  OrtValue* value = nullptr;
  check(api().CreateTensorWithDataAsOrtValue(memory.get(), data, bytes, shape.data(), shape.size(), type, &value),
        "a tensor of " + show(shape));
  return {value, api().ReleaseValue};
}

inline int64_t room(int64_t tokens, int64_t context) {  // tokens a cache has room for when it must hold `tokens`
  return std::min(context, tokens + std::max<int64_t>(64, tokens / 8));
}

inline bool finite(const float* values, size_t count) {
  for (size_t i = 0; i < count; ++i)
    if (!std::isfinite(values[i])) return false;
  return true;
}

struct Cache {  // keys and values of the tokens so far, in the order of the decoder's past inputs
  int64_t length = 0, room = 0;
  std::vector<std::unique_ptr<float[]>> buffers;  // each f32 [1, G, room, D]
  std::vector<Handle<OrtValue>> tensors;
  Handle<OrtIoBinding> binding{nullptr, nullptr};
};

class Runner {
 public:
  Runner(const Bundle& bundle, int threads, Options options, bool vision)
      : settings_(bundle.settings), graphs_(bundle.graphs), threads_(threads), options_(std::move(options)) {
    if (older(engine_version(), bundle.least_engine))
      throw BadInput(bundle.folder + "/manifest.json: needs ONNX Runtime " + bundle.least_engine +
                     " or later, this is " + engine_version());
    if (bundle.saturates_without_vnni && saturates()) options_.emplace("session.x64quantprecision", "1");
    for (int64_t i = 0; i < settings_.layers; ++i)
      for (const char* part : {".key", ".value"}) pairs_.push_back(std::to_string(i) + part);
    OrtEnv* env = nullptr;
    check(api().CreateEnv(ORT_LOGGING_LEVEL_ERROR, "smolport", &env), "environment");
    env_ = {env, api().ReleaseEnv};
    // Each graph is packed by one thread.
    auto tower = vision ? std::async(std::launch::async, [this] { return open("vision_encoder"); })
                        : std::future<Handle<OrtSession>>();
    auto decoder = std::async(std::launch::async, [this] { return open("decoder_model_merged"); });
    embed_ = open("embed_tokens");
    decoder_ = decoder.get();
    if (vision) vision_ = tower.get();
    check_in_place();
  }

  const Options& options() const { return options_; }

  // f32 [3, S, S] -> f32 [L, hidden]
  std::vector<float> encode_tile(float* pixels) {
    const int64_t side = settings_.tile_size;
    const std::unique_ptr<bool[]> mask(new bool[side * side]);
    std::fill_n(mask.get(), side * side, true);
    const auto image = tensor(pixels, {1, 1, 3, side, side});
    const auto all = tensor(mask.get(), {1, 1, side, side});
    const auto found =
        run(*vision_, "vision_encoder", {"pixel_values", "pixel_attention_mask"}, {image.get(), all.get()}, "image_features");
    const int64_t wanted = settings_.seq_len * settings_.hidden;
    return values(*found, wanted, "vision_encoder: features");
  }

  Cache new_cache() const { return {}; }

  // Feeds tokens; f32 [vocab] after the last. `features`: a row for each image token; null: those are ordinary tokens.
  std::vector<float> extend(Cache& cache, const std::vector<int64_t>& ids, const std::vector<float>* features) {
    const auto count = static_cast<int64_t>(ids.size());
    if (!count || cache.length + count > settings_.context)
      throw BadInput(std::to_string(count) + " tokens after " + std::to_string(cache.length) +
                     " do not fit into the context of " + std::to_string(settings_.context));
    std::vector<float> embeds = embeddings(ids);  // [T, hidden]
    if (features) {
      const float* row = features->data();
      for (int64_t i = 0; i < count; ++i)
        if (ids[i] == settings_.image_id) {
          std::copy_n(row, settings_.hidden, embeds.begin() + i * settings_.hidden);
          row += settings_.hidden;
        }
    }
    if (cache.room < cache.length + count) grow(cache, room(cache.length + count, settings_.context));
    std::vector<float> logits(settings_.vocab);
    for (int64_t start = 0; start < count; start += kChunk) {
      const int64_t n = std::min(kChunk, count - start);
      decode(cache, embeds.data() + start * settings_.hidden, n, logits);
      cache.length += n;
    }
    return logits;
  }

 private:
  Settings settings_;
  std::map<std::string, std::string> graphs_;
  int threads_;
  Options options_;
  std::vector<std::string> pairs_;  // "0.key", "0.value", "1.key", ...
  Handle<OrtEnv> env_{nullptr, nullptr};
  Handle<OrtSession> embed_{nullptr, nullptr}, decoder_{nullptr, nullptr}, vision_{nullptr, nullptr};

  static bool older(const std::string& version, const std::string& least) {
    const auto numbers = [](const std::string& text) {
      std::array<unsigned long, 3> out{};
      const char* at = text.c_str();
      for (unsigned long& number : out) {
        char* end = nullptr;
        number = std::strtoul(at, &end, 10);  // of too many digits: the largest
        at = *end == '.' ? end + 1 : end;
      }
      return out;
    };
    return numbers(version) < numbers(least);
  }

  Handle<OrtSession> open(const std::string& graph) const {
    const std::string& path = graphs_.at(graph);
    OrtSessionOptions* made = nullptr;
    check(api().CreateSessionOptions(&made), "session options");
    const Handle<OrtSessionOptions> options(made, api().ReleaseSessionOptions);
    // looking up embeddings is no work, and threads that wait for it would take the decoder's cores
    check(api().SetIntraOpNumThreads(made, graph == "embed_tokens" ? 1 : threads_), "threads");
    check(api().SetSessionLogSeverityLevel(made, ORT_LOGGING_LEVEL_ERROR), "log level");
    check(api().DisableMemPattern(made), "memory pattern");  // one would be kept for every length that ever ran
    for (const auto& [key, value] : options_) {
      const std::string fault = message(api().AddSessionConfigEntry(made, key.c_str(), value.c_str()));
      if (!fault.empty()) throw BadInput("--session " + key + "=" + value + ": " + fault);
    }
    OrtSession* session = nullptr;
    const std::string fault = message(api().CreateSession(env_.get(), path.c_str(), made, &session));
    if (!fault.empty()) throw BadInput(path + ": ONNX Runtime " + engine_version() + " refuses it: " + fault);
    Handle<OrtSession> out(session, api().ReleaseSession);
    check_graph(graph, *session, path);
    return out;
  }

  struct Wanted {
    ONNXTensorElementDataType type;
    std::vector<int64_t> shape;  // -1: any
  };

  // The graph takes and gives the tensors that the manifest's sizes ask for.
  void check_graph(const std::string& graph, const OrtSession& session, const std::string& where) const {
    const Settings& s = settings_;
    std::map<std::string, Wanted> inputs;
    std::vector<std::string> outputs;
    if (graph == "embed_tokens") {
      inputs = {{"input_ids", {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, {-1, -1}}}};
      outputs = {"inputs_embeds"};
    } else if (graph == "vision_encoder") {
      inputs = {{"pixel_values", {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, {-1, -1, 3, s.tile_size, s.tile_size}}},
                {"pixel_attention_mask", {ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL, {-1, -1, s.tile_size, s.tile_size}}}};
      outputs = {"image_features"};
    } else {
      inputs = {{"inputs_embeds", {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, {-1, -1, s.hidden}}},
                {"attention_mask", {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, {-1, -1}}},
                {"num_logits_to_keep", {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, {}}}};
      outputs = {"logits"};
      for (const std::string& pair : pairs_) {
        inputs["past_key_values." + pair] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, {-1, s.kv_heads, -1, s.head_dim}};
        outputs.push_back("present." + pair);
      }
    }
    const auto given = names(session, true);
    if (given.size() != inputs.size())
      throw BadInput(where + ": has " + std::to_string(given.size()) + " inputs, want " + std::to_string(inputs.size()));
    for (size_t i = 0; i < given.size(); ++i) {
      const auto wanted = inputs.find(given[i]);
      if (wanted == inputs.end()) throw BadInput(where + ": its input " + given[i] + " is unknown");
      check_input(session, i, wanted->second, where + ": input " + given[i]);
    }
    const auto made = names(session, false);
    for (const std::string& name : outputs)
      if (std::find(made.begin(), made.end(), name) == made.end()) throw BadInput(where + ": has no output " + name);
  }

  static void check_input(const OrtSession& session, size_t index, const Wanted& wanted, const std::string& where) {
    OrtTypeInfo* made = nullptr;
    check(api().SessionGetInputTypeInfo(&session, index, &made), where);
    const Handle<OrtTypeInfo> info(made, api().ReleaseTypeInfo);
    const OrtTensorTypeAndShapeInfo* tensor = nullptr;
    check(api().CastTypeInfoToTensorInfo(made, &tensor), where);
    if (!tensor) throw BadInput(where + " is no tensor");
    ONNXTensorElementDataType type{};
    check(api().GetTensorElementType(tensor, &type), where);
    size_t rank = 0;
    check(api().GetDimensionsCount(tensor, &rank), where);
    std::vector<int64_t> shape(rank);
    check(api().GetDimensions(tensor, shape.data(), rank), where);
    bool fits = type == wanted.type && rank == wanted.shape.size();
    for (size_t d = 0; fits && d < rank; ++d) fits = wanted.shape[d] < 0 || shape[d] < 0 || shape[d] == wanted.shape[d];
    if (!fits)
      throw BadInput(where + " is of type " + std::to_string(type) + " and " + show(shape) + ", want type " +
                     std::to_string(wanted.type) + " and " + show(wanted.shape));
  }

  static std::vector<std::string> names(const OrtSession& session, bool inputs) {
    OrtAllocator* allocator = nullptr;
    check(api().GetAllocatorWithDefaultOptions(&allocator), "allocator");
    size_t count = 0;
    check(inputs ? api().SessionGetInputCount(&session, &count) : api().SessionGetOutputCount(&session, &count), "names");
    std::vector<std::string> out;
    for (size_t i = 0; i < count; ++i) {
      char* name = nullptr;
      check(inputs ? api().SessionGetInputName(&session, i, allocator, &name)
                   : api().SessionGetOutputName(&session, i, allocator, &name),
            "names");
      out.emplace_back(name);
      message(api().AllocatorFree(allocator, name));
    }
    return out;
  }

  void check_in_place() const {
    OrtAllocator* allocator = nullptr;
    check(api().GetAllocatorWithDefaultOptions(&allocator), "allocator");
    OrtModelMetadata* made = nullptr;
    check(api().SessionGetModelMetadata(decoder_.get(), &made), "metadata");
    const Handle<OrtModelMetadata> metadata(made, api().ReleaseModelMetadata);
    char* value = nullptr;
    check(api().ModelMetadataLookupCustomMetadataMap(made, allocator, "smolport.kv_cache", &value), "metadata");
    const std::string found = value ? value : "missing";
    if (value) message(api().AllocatorFree(allocator, value));
    if (found != "in_place")
      throw BadInput(graphs_.at("decoder_model_merged") + ": its metadata smolport.kv_cache is " + found +
                     ", want in_place");
  }

  Handle<OrtValue> run(OrtSession& session, const char* graph, const std::vector<const char*>& names,
                       const std::vector<const OrtValue*>& inputs, const char* output) const {
    OrtValue* value = nullptr;
    check(api().Run(&session, nullptr, names.data(), inputs.data(), inputs.size(), &output, 1, &value), graph);
    return {value, api().ReleaseValue};
  }

  static std::vector<float> values(OrtValue& value, int64_t wanted, const std::string& where) {
    OrtTensorTypeAndShapeInfo* made = nullptr;
    check(api().GetTensorTypeAndShape(&value, &made), where);
    const Handle<OrtTensorTypeAndShapeInfo> info(made, api().ReleaseTensorTypeAndShapeInfo);
    ONNXTensorElementDataType type{};
    size_t count = 0;
    check(api().GetTensorElementType(made, &type), where);
    check(api().GetTensorShapeElementCount(made, &count), where);
    if (type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || count != static_cast<size_t>(wanted))
      throw Failed(where + " are " + std::to_string(count) + " values of type " + std::to_string(type) + ", want " +
                   std::to_string(wanted) + " of float");
    void* data = nullptr;
    check(api().GetTensorMutableData(&value, &data), where);
    const auto* first = static_cast<const float*>(data);
    if (!finite(first, count)) throw Failed(where + " hold NaN or infinity");
    return {first, first + count};
  }

  std::vector<float> embeddings(std::vector<int64_t> ids) const {
    const auto tokens = tensor(ids.data(), {1, static_cast<int64_t>(ids.size())});
    const auto found = run(*embed_, "embed_tokens", {"input_ids"}, {tokens.get()}, "inputs_embeds");
    return values(*found, static_cast<int64_t>(ids.size()) * settings_.hidden, "embed_tokens: embeddings");
  }

  void grow(Cache& cache, int64_t held) const {
    cache.binding.reset();  // which holds the tensors
    cache.buffers.resize(pairs_.size());
    cache.tensors.clear();
    const int64_t heads = settings_.kv_heads, dim = settings_.head_dim;
    for (auto& buffer : cache.buffers) {  // one after the other: old and new are never both whole
      std::unique_ptr<float[]> larger(new float[heads * held * dim]);
      for (int64_t head = 0; head < heads; ++head)
        std::copy_n(buffer.get() + head * cache.room * dim, cache.length * dim, larger.get() + head * held * dim);
      buffer = std::move(larger);
    }
    cache.room = held;
    OrtIoBinding* made = nullptr;
    check(api().CreateIoBinding(decoder_.get(), &made), "binding");
    cache.binding = {made, api().ReleaseIoBinding};
    for (size_t i = 0; i < pairs_.size(); ++i) {
      cache.tensors.push_back(tensor(cache.buffers[i].get(), {1, heads, held, dim}));
      const OrtValue* value = cache.tensors.back().get();
      check(api().BindInput(made, ("past_key_values." + pairs_[i]).c_str(), value), "binding");
      check(api().BindOutput(made, ("present." + pairs_[i]).c_str(), value), "binding");
    }
  }

  void decode(Cache& cache, float* embeds, int64_t count, std::vector<float>& logits) const {
    std::vector<int64_t> mask(cache.length + count, 1);
    int64_t keep = 1;
    const auto rows = tensor(embeds, {1, count, settings_.hidden});
    const auto seen = tensor(mask.data(), {1, static_cast<int64_t>(mask.size())});
    const auto kept = tensor(&keep, {});
    const auto out = tensor(logits.data(), {1, 1, settings_.vocab});
    OrtIoBinding* binding = cache.binding.get();
    const char* where = "decoder_model_merged";
    check(api().BindInput(binding, "inputs_embeds", rows.get()), where);
    check(api().BindInput(binding, "attention_mask", seen.get()), where);
    check(api().BindInput(binding, "num_logits_to_keep", kept.get()), where);
    check(api().BindOutput(binding, "logits", out.get()), where);
    check(api().RunWithBinding(decoder_.get(), nullptr, binding), where);
    if (!finite(logits.data(), logits.size()))
      throw Failed("decoder: logits after " + std::to_string(mask.size()) + " tokens hold NaN or infinity");
  }
};
