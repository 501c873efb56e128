// A bundle: its manifest, every file checked against it, the sizes a runner needs, its golden cases. See FORMAT.md.
#pragma once

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "files.h"

constexpr int64_t kSchema = 3;  // of manifest.json: the newest that this reader knows
constexpr const char* kSignature = "manifest.json.sig";  // may lie beside it, unlisted; whoever pulls checks it

struct Entry {
  std::string path, sha256;
  int64_t size;
  bool evidence;
};

struct Settings {
  int64_t vocab, hidden, layers, kv_heads, head_dim, context, tile_size, seq_len, image_id;
};

struct Normalization {
  double factor, mean[3], std[3];
};

struct Bundle {
  std::string folder, payload_digest, least_engine;
  bool saturates_without_vnni = false;
  Settings settings{};
  Normalization normalization{};
  std::vector<Entry> files;
  std::map<std::string, std::string> graphs;  // name -> path of its .onnx
};

inline bool safe_path(const std::string& path) {
  for (const unsigned char c : path)
    if (c < 0x20 || c == 0x7F || c == '\\' || c == ':') return false;
  for (size_t start = 0; start <= path.size();) {
    const size_t end = std::min(path.find('/', start), path.size());
    const std::string part = path.substr(start, end - start);
    if (part.empty() || part == "." || part == "..") return false;
    start = end + 1;
  }
  return true;
}

inline std::string lower(std::string text) {
  for (char& c : text)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  return text;
}

inline bool is_digest(const std::string& text) {
  return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

inline int64_t in_range(const Json& parent, const std::string& key, const std::string& where, int64_t least, int64_t most) {
  const int64_t value = parent.at(key, where).integer(where + ": " + key);
  if (value < least || value > most)
    throw BadInput(where + ": " + key + " is " + std::to_string(value) + ", want " + std::to_string(least) + " to " +
                   std::to_string(most));
  return value;
}

inline Entry read_entry(const Json& entry, const std::string& where) {
  Entry out;
  out.path = entry.at("path", where).string(where + ": path");
  out.size = in_range(entry, "size", where, 0, INT64_C(1) << 50);
  out.sha256 = entry.at("sha256", where).string(where + ": sha256");
  const std::string role = entry.at("role", where).string(where + ": role");
  const std::string folded = lower(out.path);
  if (!safe_path(out.path) || folded == "manifest.json" || folded == kSignature || folded == ".manifest.json.partial")
    throw BadInput(where + ": path is " + Json(out.path).dump() + ", want one below the bundle, with forward slashes");
  if (!is_digest(out.sha256)) throw BadInput(where + ": sha256 of " + out.path + " is not 64 hex digits");
  if (role != "payload" && role != "evidence")
    throw BadInput(where + ": role of " + out.path + " is " + role + ", want payload or evidence");
  out.evidence = role == "evidence";
  return out;
}

inline std::string payload_digest(const std::vector<Entry>& files) {
  std::vector<std::string> lines;
  for (const Entry& file : files)
    if (!file.evidence) lines.push_back(file.path + "\t" + std::to_string(file.size) + "\t" + file.sha256 + "\n");
  std::sort(lines.begin(), lines.end());
  Sha256 hash;
  for (const std::string& line : lines) hash.update(line.data(), line.size());
  return hash.hex();
}

inline Bundle read_manifest(const std::string& folder) {
  const std::string where = folder + "/manifest.json";
  const Json manifest = read_json(where);
  const int64_t schema = in_range(manifest, "schema", where, 1, INT32_MAX);
  const int64_t least = in_range(manifest, "min_reader", where, 1, schema);
  if (least > kSchema)
    throw BadInput(where + ": needs a reader of schema " + std::to_string(least) + ", this one knows " +
                   std::to_string(kSchema));
  Bundle out;
  out.folder = folder;
  const std::string target = manifest.at("target", where).string(where + ": target");
  const Json& engine = manifest.at("engine", where);
  const std::string name = engine.at("name", where + ": engine").string(where + ": engine.name");
  if (target != "onnx" || name != "onnxruntime")
    throw BadInput(where + ": target " + target + " on " + name + ", want onnx on onnxruntime");
  out.least_engine = engine.at("least", where + ": engine").string(where + ": engine.least");
  if (out.least_engine.empty() || out.least_engine.find_first_not_of("0123456789.") != std::string::npos)
    throw BadInput(where + ": engine.least is " + out.least_engine + ", want digits and dots");
  out.saturates_without_vnni = manifest.at("instruction_set", where)
                                   .at("saturates_without_vnni", where + ": instruction_set")
                                   .boolean(where + ": instruction_set.saturates_without_vnni");
  const std::string state =
      manifest.at("proof", where).at("state", where + ": proof").string(where + ": proof.state");
  if (state != "passed")
    throw BadInput(where + ": proof.state is " + state + ", want passed: nothing has shown that it computes its model");

  constexpr int64_t most = 1 << 24;  // of any size: products of two of them, and of the bytes of a value, stay in range
  const Json &image = manifest.at("image", where), &text = manifest.at("text", where);
  const std::string in_image = where + ": image", in_text = where + ": text";
  Settings& s = out.settings;
  s.tile_size = in_range(image, "tile_size", in_image, 1, 4096);
  s.seq_len = in_range(image, "tokens_per_tile", in_image, 1, 1 << 16);
  s.vocab = in_range(text, "vocab", in_text, 2, most);  // the image's token is never chosen
  s.hidden = in_range(text, "hidden", in_text, 1, 1 << 16);
  s.layers = in_range(text, "layers", in_text, 1, 1 << 10);
  s.kv_heads = in_range(text, "kv_heads", in_text, 1, 1 << 10);
  s.head_dim = in_range(text, "head_dim", in_text, 1, 1 << 12);
  s.context = in_range(text, "context", in_text, 1, most);
  s.image_id = in_range(text, "image_token_id", in_text, 0, s.vocab - 1);

  std::set<std::string> seen;
  const auto& files = manifest.at("files", where).list(where + ": files");
  for (size_t i = 0; i < files.size(); ++i) {
    out.files.push_back(read_entry(files[i], where + ": files[" + std::to_string(i) + "]"));
    if (!seen.insert(lower(out.files.back().path)).second)
      throw BadInput(where + ": lists " + out.files.back().path + " twice");
  }
  out.payload_digest = manifest.at("payload_digest", where).string(where + ": payload_digest");
  const std::string found = payload_digest(out.files);
  if (out.payload_digest != found)
    throw BadInput(where + ": payload_digest is " + out.payload_digest + ", want " + found + " by the files listed");
  return out;
}

inline void check_files(const Bundle& bundle) {
  std::vector<std::string> names;
  list_files(bundle.folder, "", names);
  const std::set<std::string> found(names.begin(), names.end());
  std::set<std::string> listed = {"manifest.json", kSignature};
  for (const Entry& entry : bundle.files) {
    const std::string path = bundle.folder + "/" + entry.path;
    listed.insert(entry.path);
    if (!found.count(entry.path))
      throw BadInput(path + ": is missing" +
                     (entry.evidence ? ": the evidence (golden cases and reports) was not pulled, and is needed here"
                                     : ", but listed in manifest.json"));
  }
  for (const std::string& name : found)
    if (!listed.count(name)) throw BadInput(bundle.folder + "/" + name + ": extra, not listed in manifest.json");
  for (const Entry& entry : bundle.files) {
    const std::string path = bundle.folder + "/" + entry.path;
    const File file(path);
    if (file.size() != static_cast<uint64_t>(entry.size))
      throw BadInput(path + ": is " + (file.size() < static_cast<uint64_t>(entry.size) ? "truncated" : "too long") +
                     ": " + std::to_string(file.size()) + " bytes, manifest.json says " + std::to_string(entry.size));
    const std::string digest = file.sha256();
    if (digest != entry.sha256)
      throw BadInput(path + ": content has changed: SHA-256 " + digest + ", manifest.json says " + entry.sha256);
  }
}

inline std::string listed_path(const Bundle& bundle, const std::string& name) {
  for (const Entry& entry : bundle.files)
    if (entry.path == name) return bundle.folder + "/" + name;
  throw BadInput(bundle.folder + "/manifest.json: does not list " + name + ", which is needed");
}

inline void check_config(Bundle& bundle) {  // config.json: the same sizes, and the file of each graph
  const std::string where = listed_path(bundle, "config.json");
  const Json config = read_json(where);
  const Settings& s = bundle.settings;
  const Json &text = config.at("text_config", where), &vision = config.at("vision_config", where);
  const auto same = [&](const Json& part, const char* key, int64_t wanted) {
    const int64_t found = part.at(key, where).integer(where + ": " + key);
    if (found != wanted)
      throw BadInput(where + ": " + key + " is " + std::to_string(found) + ", manifest.json says " +
                     std::to_string(wanted));
  };
  same(text, "vocab_size", s.vocab);
  same(text, "hidden_size", s.hidden);
  same(text, "num_hidden_layers", s.layers);
  same(text, "num_key_value_heads", s.kv_heads);
  same(text, "head_dim", s.head_dim);
  same(vision, "image_size", s.tile_size);
  same(config, "image_token_id", s.image_id);

  static const std::map<std::string, std::string> suffixes = {
      {"fp32", ""},        {"fp16", "_fp16"}, {"int8", "_int8"},    {"uint8", "_uint8"},
      {"q8", "_quantized"}, {"q4", "_q4"},     {"q4f16", "_q4f16"}};
  const std::string in_loading = where + ": transformers.js_config";
  const Json& dtypes = config.at("transformers.js_config", where).at("dtype", in_loading);
  for (const char* graph : {"embed_tokens", "vision_encoder", "decoder_model_merged"}) {
    const Json& dtype = dtypes.kind() == Json::Kind::string ? dtypes : dtypes.at(graph, in_loading + ".dtype");
    const auto suffix = suffixes.find(dtype.string(in_loading + ".dtype." + graph));
    if (suffix == suffixes.end())
      throw BadInput(in_loading + ".dtype of " + graph + " is " + dtype.dump() + ", which is unknown");
    bundle.graphs[graph] = listed_path(bundle, std::string("onnx/") + graph + suffix->second + ".onnx");
  }
}

inline Normalization read_normalization(const Bundle& bundle) {
  const std::string where = listed_path(bundle, "preprocessor_config.json");
  const Json config = read_json(where);
  Normalization out{};
  const Json* factor = config.find("rescale_factor");
  out.factor = factor ? factor->number(where + ": rescale_factor") : 1.0 / 255;
  const auto triple = [&](const char* key, double* values) {
    const auto& items = config.at(key, where).list(where + ": " + key);
    if (items.size() != 3) throw BadInput(where + ": " + key + " has " + std::to_string(items.size()) + " numbers, want 3");
    for (int i = 0; i < 3; ++i) values[i] = items[i].number(where + ": " + key);
  };
  triple("image_mean", out.mean);
  triple("image_std", out.std);
  for (const double value : out.std)
    if (!(value > 0 && value < 1e9 && static_cast<float>(value) > 0)) throw BadInput(where + ": image_std is not positive");
  for (const double value : out.mean)
    if (!(std::fabs(value) < 1e9)) throw BadInput(where + ": image_mean is too large");
  if (!(out.factor > 0 && out.factor <= 1)) throw BadInput(where + ": rescale_factor is not in (0, 1]");
  return out;
}

inline Bundle read_bundle(const std::string& folder) {
  struct stat status;
  if (stat(folder.c_str(), &status) || !S_ISDIR(status.st_mode))
    throw BadInput(folder + ": is no folder, so no bundle");
  Bundle bundle = read_manifest(folder);
  check_files(bundle);
  check_config(bundle);
  bundle.normalization = read_normalization(bundle);
  return bundle;
}

// ---- golden cases

struct Case {
  std::string name;
  std::vector<int64_t> ids, tokens;
  int64_t tiles = 0;
};

struct Limits {
  double features, logits;  // relative L2
};

class Cases {
 public:
  explicit Cases(const Bundle& bundle)
      : settings_(bundle.settings),
        normalization_(bundle.normalization),
        where_(listed_path(bundle, "cases/cases.json")),
        data_(listed_path(bundle, "cases/cases.safetensors")) {
    const Json content = read_json(where_);
    std::set<std::string> names;
    for (const Json& row : content.at("cases", where_).list(where_ + ": cases")) {
      Case c;
      c.name = row.at("name", where_).string(where_ + ": name");
      const std::string where = where_ + ": case " + c.name;
      if (c.name.empty() || !names.insert(c.name).second) throw BadInput(where + ": its name is empty, or given twice");
      c.ids = tokens(row, "ids", where);
      c.tokens = tokens(row, "tokens", where);
      if (static_cast<int64_t>(c.ids.size() + c.tokens.size()) > settings_.context)
        throw BadInput(where + ": has more tokens than the context of " + std::to_string(settings_.context));
      c.tiles = data_.shape(c.name + ".tiles", 4)[0];
      const int64_t images = std::count(c.ids.begin(), c.ids.end(), settings_.image_id);
      if (images % settings_.seq_len || images / settings_.seq_len != c.tiles)  // a header may say any number of tiles
        throw BadInput(where + ": its ids have " + std::to_string(images) + " image tokens, its " +
                       std::to_string(c.tiles) + " tiles want " + std::to_string(settings_.seq_len) + " each");
      tiles(c), features(c), logits(c);  // are there, of the right shape
      all.push_back(std::move(c));
    }
    if (all.empty()) throw BadInput(where_ + ": holds no case");
  }

  std::vector<Case> all;

  // f32 [N, 3, S, S]: the product in float64 rounded to float32, the rest in float32, as the reference does.
  std::vector<float> pixels(const Case& c) const {
    const int64_t side = settings_.tile_size, area = side * side;
    const auto bytes = data_.read<uint8_t>(tiles(c));
    std::vector<float> out(bytes.size());
    for (int channel = 0; channel < 3; ++channel) {
      float table[256];
      for (int level = 0; level < 256; ++level) {
        const auto scaled = static_cast<float>(level * normalization_.factor);
        table[level] = (scaled - static_cast<float>(normalization_.mean[channel])) /
                       static_cast<float>(normalization_.std[channel]);
      }
      for (int64_t tile = 0; tile < c.tiles; ++tile)
        for (int64_t i = 0; i < area; ++i)
          out[(tile * 3 + channel) * area + i] = table[bytes[(tile * area + i) * 3 + channel]];
    }
    return out;
  }

  std::vector<float> wanted_features(const Case& c) const { return data_.read<float>(features(c)); }
  std::vector<float> wanted_logits(const Case& c) const { return data_.read<float>(logits(c)); }

 private:
  Settings settings_;
  Normalization normalization_;
  std::string where_;
  TensorFile data_;

  const TensorInfo& tiles(const Case& c) const {
    return data_.want(c.name + ".tiles", "U8", {c.tiles, settings_.tile_size, settings_.tile_size, 3});
  }
  const TensorInfo& features(const Case& c) const {
    return data_.want(c.name + ".features", "F32", {c.tiles, settings_.seq_len, settings_.hidden});
  }
  const TensorInfo& logits(const Case& c) const {
    return data_.want(c.name + ".logits", "F32", {static_cast<int64_t>(c.tokens.size()), settings_.vocab});
  }

  std::vector<int64_t> tokens(const Json& row, const char* key, const std::string& where) const {
    std::vector<int64_t> out;
    for (const Json& id : row.at(key, where).list(where + ": " + key)) {
      out.push_back(id.integer(where + ": " + key));
      if (out.back() < 0 || out.back() >= settings_.vocab)
        throw BadInput(where + ": " + key + " holds " + std::to_string(out.back()) + ", want 0 to " +
                       std::to_string(settings_.vocab - 1));
    }
    if (out.empty()) throw BadInput(where + ": " + key + " is empty");
    return out;
  }
};

inline Limits read_limits(const Bundle& bundle) {
  const std::string where = listed_path(bundle, "report.json");
  const Json report = read_json(where);
  const std::string of = report.at("payload_digest", where).string(where + ": payload_digest");
  if (of != bundle.payload_digest)
    throw BadInput(where + ": is the proof of payload " + of + ", this one is " + bundle.payload_digest);
  const Json& limits = report.at("verify_limits", where);
  return {limits.at("features", where + ": verify_limits").number(where + ": verify_limits.features"),
          limits.at("logits", where + ": verify_limits").number(where + ": verify_limits.logits")};
}
