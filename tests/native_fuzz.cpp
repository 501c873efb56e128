// Gives mutants of a bundle's files to the native runner's readers, many in one process, digests made right again.
//
//   native_fuzz FOLDER < MUTANTS         FOLDER: a bundle, written into and put back; a line of JSON for each mutant
//   native_fuzz FOLDER --leave < MUTANT  the bundle stays as the mutant made it, for the runner itself
//   a libFuzzer target, with -DLIBFUZZER and the folder in FUZZ_BUNDLE: one byte for the file, then its content
//
// Mutants: u32 number of files, then for each u8 which of kFiles | u32 size | content. Beyond kFiles: kJson takes a
// text through the JSON reader and back, kPlanted and on are faults by which a harness shows that it sees them.
#include <csignal>

#include <chrono>
#include <fstream>
#include <iostream>
#include <iterator>
#include <limits>

#include "bundle.h"

namespace {

const char* const kFiles[] = {"manifest.json",    "config.json",            "preprocessor_config.json",
                              "cases/cases.json", "cases/cases.safetensors", "report.json"};
constexpr uint8_t kJson = 64, kPlanted = 128;
using Changed = std::map<std::string, std::string>;  // path -> content

struct Base {
  std::string folder, digest;
  Changed files;
};

std::string content(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw Failed(path + ": cannot be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

void write(const std::string& folder, const Changed& files) {
  for (const auto& [path, text] : files) {
    std::ofstream file(folder + "/" + path, std::ios::binary | std::ios::trunc);
    if (!file.write(text.data(), static_cast<std::streamsize>(text.size())).flush()) throw Failed(path + ": cannot be written");
  }
}

Base read_base(const std::string& folder) {
  Base base{folder, read_bundle(folder).payload_digest, {}};
  for (const char* path : kFiles) base.files[path] = content(folder + "/" + path);
  return base;
}

// Size and digest of each changed file in the manifest, and then the payload's there and in the report. A manifest that
// is no longer read that far stays as it is.
void repair(const Base& base, Changed& changed) {
  std::string& text = changed.try_emplace("manifest.json", base.files.at("manifest.json")).first->second;
  try {
    const Json manifest = Json::parse(text, "manifest.json");
    std::vector<Entry> entries;
    for (const Json& row : manifest.at("files", "").list("")) {
      entries.push_back(read_entry(row, ""));
      if (const auto found = changed.find(entries.back().path); found != changed.end()) {
        entries.back().size = static_cast<int64_t>(found->second.size());
        entries.back().sha256 = sha256(found->second.data(), found->second.size());
      }
    }
    const std::string digest = payload_digest(entries);
    std::string report = changed.count("report.json") ? changed["report.json"] : base.files.at("report.json");
    if (const size_t at = report.find(base.digest); at != std::string::npos && digest != base.digest) {
      report.replace(at, digest.size(), digest);
      for (Entry& entry : entries)
        if (entry.path == "report.json") entry.sha256 = sha256(report.data(), report.size());
      changed["report.json"] = report;
    }
    Json files = Json::list(), out = Json::object();
    for (const Entry& entry : entries) {
      Json row = Json::object();
      row.set("path", entry.path);
      row.set("size", entry.size);
      row.set("sha256", entry.sha256);
      row.set("role", entry.evidence ? "evidence" : "payload");
      files.push(std::move(row));
    }
    for (const auto& [key, value] : manifest.members())
      out.set(key, key == "files" ? files : key == "payload_digest" ? Json(digest) : value);
    text = out.dump();
  } catch (const BadInput&) {
  }
}

volatile double sink;  // what was read counts as used

Json read_all(const std::string& folder) {
  Json out = Json::object();
  try {
    const Bundle bundle = read_bundle(folder);
    const Cases cases(bundle);
    for (const Case& c : cases.all)
      for (const auto& values : {cases.pixels(c), cases.wanted_features(c), cases.wanted_logits(c)})
        for (const float value : values) sink = value;
    sink = read_limits(bundle).logits;
    out.set("taken", true);
  } catch (const BadInput& fault) {
    out.set("error", fault.what());
  } catch (const std::exception& fault) {
    out.set("failed", fault.what());
  }
  return out;
}

bool of_digests(const Json& outcome) {
  const Json* error = outcome.find("error");
  return error && error->string("").find("payload_digest is ") != std::string::npos;
}

Json try_files(const Base& base, Changed changed, bool leave) {
  const bool alone = changed.size() == 1 && changed.count("manifest.json");
  if (!alone) repair(base, changed);  // a manifest alone is first read byte for byte
  write(base.folder, changed);
  Json outcome = read_all(base.folder);
  if (alone && of_digests(outcome)) {
    repair(base, changed);
    write(base.folder, changed);
    outcome = read_all(base.folder);
  }
  if (!leave)
    for (auto& [path, text] : changed) text = base.files.at(path);
  if (!leave) write(base.folder, changed);
  return outcome;
}

Json try_json(const std::string& text) {
  Json out = Json::object();
  try {
    out.set("json", Json::parse(text, "text"));
  } catch (const BadInput& fault) {
    out.set("error", fault.what());
  }
  return out;
}

void planted(int fault, const std::string& text) {
  volatile int most = std::numeric_limits<int>::max();
  std::vector<std::string> held;
  switch (fault) {
    case 0: sink = *(std::vector<char>(text.begin(), text.end()).data() + text.size()); break;
    case 1: most = most + static_cast<int>(text.size()); break;
    case 2: while (most) sink = most;
    [[fallthrough]];
    case 3: while (most) held.emplace_back(8 << 20, 'x');
    [[fallthrough]];
    default: throw fault;
  }
}

#ifndef LIBFUZZER
uint32_t size_of(std::istream& in, uint64_t most) {
  uint32_t value = 0;
  in.read(reinterpret_cast<char*>(&value), 4);
  if (in.gcount() != 4 || value > most) throw Failed("the mutants are cut off");
  return value;
}
#endif

}  // namespace

#ifdef LIBFUZZER
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Base base = read_base(std::getenv("FUZZ_BUNDLE"));
  if (!size) return 0;
  const std::string text(reinterpret_cast<const char*>(data) + 1, size - 1);
  if (*data < std::size(kFiles)) try_files(base, {{kFiles[*data], text}}, false);
  if (*data == kJson) try_json(text);
  return 0;
}
#else
int main(int count, char** words) {
  std::ios::sync_with_stdio(false);
  try {
    if (count < 2) throw Failed("want a FOLDER");
    const bool leave = count > 2;
    const Base base = read_base(words[1]);
    while (std::cin.peek() != std::istream::traits_type::eof()) {
      Changed changed;
      Json outcome;
      const uint32_t files = size_of(std::cin, 16);
      const auto began = std::chrono::steady_clock::now();
      alarm(20);  // ends the process
      for (uint32_t i = 0; i < files; ++i) {
        const int which = std::cin.get();
        std::string text(size_of(std::cin, 1u << 28), '\0');
        std::cin.read(text.data(), static_cast<std::streamsize>(text.size()));
        if (which >= kPlanted) planted(which - kPlanted, text);
        if (which == kJson)
          outcome = try_json(text);
        else
          changed[kFiles[which]] = std::move(text);
      }
      if (!changed.empty()) outcome = try_files(base, std::move(changed), leave);
      alarm(0);
      outcome.set("ms", std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - began).count());
      std::cout << outcome.dump() << std::endl;
    }
  } catch (const std::exception& fault) {
    std::cerr << "native_fuzz: " << fault.what() << std::endl;
    return 3;
  }
  return 0;
}
#endif
