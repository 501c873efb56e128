// What this machine is, and what a piece of work takes of it.
#pragma once

#include <sched.h>
#include <sys/utsname.h>
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include <chrono>
#include <ctime>
#include <fstream>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "json.h"

inline const char* architecture() {
#if defined(__aarch64__)
  return "aarch64";
#elif defined(__x86_64__)
  return "x86_64";
#else
#error "an unknown architecture"
#endif
}

inline std::string cpuinfo(const std::string& key) {  // the first line of that key
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.compare(0, key.size(), key) == 0 && line.find_first_not_of(" \t", key.size()) == line.find(':'))
      return line.substr(std::min(line.size(), line.find(':') + 2));
  return "";
}

inline std::vector<std::string> cpu_features() {  // those that choose kernels, by Linux's names
  std::vector<std::string> out;
#if defined(__aarch64__)
  // by the auxiliary vector, which an emulator fills in for the CPU that it shows; /proc/cpuinfo may be the host's
  const std::pair<unsigned long, const char*> first[] = {
      {1ul << 1, "asimd"}, {1ul << 9, "fphp"}, {1ul << 10, "asimdhp"}, {1ul << 20, "asimddp"}, {1ul << 22, "sve"}};
  const std::pair<unsigned long, const char*> second[] = {
      {1ul << 1, "sve2"}, {1ul << 13, "i8mm"}, {1ul << 14, "bf16"}, {1ul << 23, "sme"}};
  for (const auto& [bit, name] : first)
    if (getauxval(AT_HWCAP) & bit) out.emplace_back(name);
  for (const auto& [bit, name] : second)
    if (getauxval(AT_HWCAP2) & bit) out.emplace_back(name);
#else
  std::istringstream flags(cpuinfo("flags"));
  for (std::string flag; flags >> flag;)
    for (const char* known : {"avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "amx_int8"})
      if (flag == known) out.push_back(flag);
#endif
  return out;
}

inline bool saturates() {  // whether products of u8 and s8 are summed in 16 bits: on x86 that is not known to have VNNI
#if defined(__aarch64__)
  return false;
#else
  for (const std::string& feature : cpu_features())
    if (feature == "avx512_vnni" || feature == "avx_vnni") return false;
  return true;
#endif
}

inline Json machine() {
  utsname names;
  const bool known = uname(&names) == 0;
  cpu_set_t set;
  const int cores = sched_getaffinity(0, sizeof set, &set) ? 0 : CPU_COUNT(&set);
  std::string model = cpuinfo("model name");
  if (model.empty()) {
    std::ifstream file("/proc/device-tree/model");
    std::getline(file, model, '\0');
  }
  Json features = Json::list(), out = Json::object();
  for (const std::string& feature : cpu_features()) features.push(feature);
  out.set("architecture", architecture());
  out.set("system", known ? Json(std::string(names.sysname) + " " + names.release) : Json());
  out.set("cores", cores ? Json(cores) : Json());
  out.set("cpu_features", std::move(features));
  out.set("model", model.empty() ? Json() : Json(model));
  return out;
}

// ---- phases

inline double cpu_seconds() {
  timespec now;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

class Phase {  // said on stderr as it begins; its CPU time and peak of resident memory are those until `end`
 public:
  explicit Phase(const char* name) : cpu_(cpu_seconds()) {
    std::fprintf(stderr, "phase %s\n", name);
    std::ofstream file("/proc/self/clear_refs");
    file << "5" << std::flush;  // resets VmHWM
    reset_ = file.good();
  }

  template <typename Work>
  auto timed(Work work) {  // the time that it takes becomes a sample, once it is done
    struct Sample {
      std::vector<double>& samples;
      std::chrono::steady_clock::time_point began = std::chrono::steady_clock::now();
      ~Sample() {
        samples.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - began).count());
      }
    } sample{samples_};
    return work();
  }

  Json end() const {
    Json samples = Json::list(), out = Json::object();
    for (const double ms : samples_) samples.push(ms);
    out.set("samples_ms", std::move(samples));
    out.set("cpu_s", cpu_seconds() - cpu_);
    out.set("peak_rss_mib", reset_ ? peak() : Json());
    return out;
  }

 private:
  double cpu_;
  bool reset_ = false;
  std::vector<double> samples_;

  static Json peak() {
    std::ifstream file("/proc/self/status");
    for (std::string line; std::getline(file, line);)
      if (line.compare(0, 6, "VmHWM:") == 0) return Json(std::strtod(line.c_str() + 6, nullptr) / 1024);
    return {};
  }
};
