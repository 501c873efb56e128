// Files: read with bounds, hashed, written under another name and renamed; tensors as safetensors.
#pragma once

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "error.h"
#include "json.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "files are little-endian, and are read as they lie");

// ---- SHA-256 (FIPS 180-4)

class Sha256 {
 public:
  void update(const void* data, size_t size) {
    const auto* bytes = static_cast<const uint8_t*>(data);
    total_ += size;
    while (size) {
      const size_t n = std::min(size, sizeof block_ - filled_);
      std::memcpy(block_ + filled_, bytes, n);
      filled_ += n, bytes += n, size -= n;
      if (filled_ == sizeof block_) compress(), filled_ = 0;
    }
  }

  std::string hex() {
    const uint64_t bits = total_ * 8;
    const uint8_t one = 0x80, zero = 0;
    update(&one, 1);
    while (filled_ != 56) update(&zero, 1);
    for (int i = 0; i < 8; ++i) block_[56 + i] = static_cast<uint8_t>(bits >> (56 - 8 * i));
    compress();
    char text[65];
    for (int i = 0; i < 8; ++i) std::snprintf(text + 8 * i, 9, "%08x", state_[i]);
    return text;
  }

 private:
  uint32_t state_[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  uint8_t block_[64];
  size_t filled_ = 0;
  uint64_t total_ = 0;

  static uint32_t turn(uint32_t x, int n) { return x >> n | x << (32 - n); }

  void compress() {
    static const uint32_t k[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be,
        0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa,
        0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85,
        0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3,
        0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f,
        0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
    uint32_t w[64];
    for (int i = 0; i < 16; ++i)
      w[i] = static_cast<uint32_t>(block_[4 * i]) << 24 | block_[4 * i + 1] << 16 | block_[4 * i + 2] << 8 | block_[4 * i + 3];
    for (int i = 16; i < 64; ++i) {
      const uint32_t a = w[i - 15], b = w[i - 2];
      w[i] = w[i - 16] + (turn(a, 7) ^ turn(a, 18) ^ a >> 3) + w[i - 7] + (turn(b, 17) ^ turn(b, 19) ^ b >> 10);
    }
    std::array<uint32_t, 8> s;
    std::copy(state_, state_ + 8, s.begin());
    for (int i = 0; i < 64; ++i) {
      const uint32_t t1 = s[7] + (turn(s[4], 6) ^ turn(s[4], 11) ^ turn(s[4], 25)) + ((s[4] & s[5]) ^ (~s[4] & s[6])) + k[i] + w[i];
      const uint32_t t2 = (turn(s[0], 2) ^ turn(s[0], 13) ^ turn(s[0], 22)) + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
      s = {t1 + t2, s[0], s[1], s[2], s[3] + t1, s[4], s[5], s[6]};
    }
    for (int i = 0; i < 8; ++i) state_[i] += s[i];
  }
};

inline std::string sha256(const void* data, size_t size) {
  Sha256 hash;
  hash.update(data, size);
  return hash.hex();
}

// ---- reading

class File {  // a regular file, open for reading; a link is refused, a pipe does not block
 public:
  explicit File(const std::string& path) : path_(path), fd_(open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC)) {
    if (fd_ < 0) throw BadInput(path + ": " + (errno == ENOENT ? "is missing" : errno == ELOOP ? "is a link" : std::strerror(errno)));
    struct stat status;
    if (fstat(fd_, &status) || !S_ISREG(status.st_mode)) {
      close(fd_);
      throw BadInput(path + ": is not a regular file");
    }
    size_ = static_cast<uint64_t>(status.st_size);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File() { close(fd_); }

  uint64_t size() const { return size_; }

  void read(void* out, uint64_t offset, uint64_t size) const {
    auto* bytes = static_cast<char*>(out);
    while (size) {
      const ssize_t n = pread(fd_, bytes, std::min<uint64_t>(size, 1u << 30), static_cast<off_t>(offset));
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) throw BadInput(path_ + ": " + (n ? std::strerror(errno) : "ends too early"));
      bytes += n, offset += static_cast<uint64_t>(n), size -= static_cast<uint64_t>(n);
    }
  }

  std::string sha256() const {
    Sha256 hash;
    std::vector<char> piece(std::min<uint64_t>(1 << 20, size_));
    for (uint64_t at = 0; at < size_; at += piece.size()) {
      const uint64_t n = std::min<uint64_t>(piece.size(), size_ - at);
      read(piece.data(), at, n);
      hash.update(piece.data(), n);
    }
    return hash.hex();
  }

 private:
  std::string path_;
  int fd_;
  uint64_t size_ = 0;
};

inline Json read_json(const std::string& path) {
  const File file(path);
  if (file.size() > kMostJson) throw BadInput(path + ": is larger than " + std::to_string(kMostJson >> 20) + " MiB");
  std::string text(file.size(), '\0');
  file.read(text.data(), 0, text.size());
  Json content = Json::parse(text, path);
  if (content.kind() != Json::Kind::object) throw BadInput(path + ": holds " + content.kind_name() + ", want an object");
  return content;
}

inline void list_files(const std::string& folder, const std::string& below, std::vector<std::string>& out) {
  DIR* directory = opendir((folder + "/" + below).c_str());
  if (!directory) throw BadInput(folder + "/" + below + ": cannot be read: " + std::strerror(errno));
  std::vector<std::string> names;
  while (const dirent* entry = readdir(directory)) names.emplace_back(entry->d_name);
  closedir(directory);
  for (const std::string& name : names) {
    if (name == "." || name == "..") continue;
    struct stat status;
    const std::string path = below + name;
    if (lstat((folder + "/" + path).c_str(), &status)) throw BadInput(folder + "/" + path + ": " + std::strerror(errno));
    if (S_ISDIR(status.st_mode))
      list_files(folder, path + "/", out);
    else if (S_ISREG(status.st_mode))
      out.push_back(path);
    else
      throw BadInput(folder + "/" + path + ": is a link or no regular file, which a bundle may not hold");
  }
}

// ---- writing

class NewFile {  // appears under its name with `commit`, whole and on the disk, or not at all
 public:
  NewFile(const std::string& folder, const std::string& name) : folder_(folder), path_(folder + "/" + name), half_(folder + "/." + name + ".partial") {
    fd_ = open(half_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0644);
    if (fd_ < 0) throw BadInput(half_ + ": cannot be written: " + std::strerror(errno));
  }
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;
  ~NewFile() {
    if (fd_ < 0) return;
    close(fd_);
    unlink(half_.c_str());
  }

  void write(const void* data, size_t size) {
    hash_.update(data, size);
    written_ += size;
    const auto* bytes = static_cast<const char*>(data);
    while (size) {
      const ssize_t n = ::write(fd_, bytes, std::min<size_t>(size, 1u << 30));
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) throw Failed(half_ + ": cannot be written: " + std::strerror(errno));
      bytes += n, size -= static_cast<size_t>(n);
    }
  }

  std::string commit() {  // returns the SHA-256
    if (fsync(fd_) || rename(half_.c_str(), path_.c_str()))
      throw Failed(path_ + ": cannot be written: " + std::strerror(errno));
    close(fd_);
    fd_ = -1;
    const int folder = open(folder_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder >= 0) fsync(folder), close(folder);  // the name too; not every file system can
    return hash_.hex();
  }
  uint64_t written() const { return written_; }

 private:
  std::string folder_, path_, half_;
  int fd_ = -1;
  Sha256 hash_;
  uint64_t written_ = 0;
};

// ---- safetensors: u64 length of the header | header: JSON | data

struct TensorInfo {
  std::string dtype;
  std::vector<int64_t> shape;
  uint64_t offset = 0, size = 0;  // bytes, from the file's start
};

inline std::string show(const std::vector<int64_t>& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

class TensorFile {
 public:
  explicit TensorFile(const std::string& path) : path_(path), file_(path) {
    uint64_t length = 0;
    if (file_.size() >= 8) file_.read(&length, 0, 8);
    if (file_.size() < 8 || length > file_.size() - 8) throw BadInput(path + ": is truncated, or no safetensors file");
    if (length > kMostJson) throw BadInput(path + ": has a header of more than " + std::to_string(kMostJson >> 20) + " MiB");
    std::string text(length, '\0');
    file_.read(text.data(), 8, length);
    const std::string where = path + ": header";
    const Json header = Json::parse(text, where);
    if (header.kind() != Json::Kind::object) throw BadInput(where + " is " + header.kind_name() + ", want an object");
    for (const auto& [name, entry] : header.members())
      if (name != "__metadata__") infos_[name] = info(entry, path + ": " + name, 8 + length);
    std::vector<std::pair<uint64_t, uint64_t>> spans;
    for (const auto& [name, i] : infos_) spans.emplace_back(i.offset, i.size);
    std::sort(spans.begin(), spans.end());
    uint64_t end = 8 + length;
    for (const auto& [offset, size] : spans) {
      if (offset != end) throw BadInput(path + ": its tensors overlap or leave a hole at byte " + std::to_string(end));
      end += size;
    }
    if (end != file_.size())
      throw BadInput(path + ": is truncated or too long: " + std::to_string(file_.size()) + " bytes, its tensors end at " + std::to_string(end));
  }

  std::vector<int64_t> shape(const std::string& name, size_t rank) const {
    const TensorInfo& found = at(name);
    if (found.shape.size() != rank)
      throw BadInput(path_ + ": " + name + " is " + show(found.shape) + ", want " + std::to_string(rank) + " dimensions");
    return found.shape;
  }

  const TensorInfo& want(const std::string& name, const char* dtype, const std::vector<int64_t>& shape) const {
    const TensorInfo& found = at(name);
    if (found.dtype != dtype || found.shape != shape)
      throw BadInput(path_ + ": " + name + " is " + found.dtype + " " + show(found.shape) + ", want " + dtype + " " +
                     show(shape));
    return found;
  }

  template <typename T>
  std::vector<T> read(const TensorInfo& tensor) const {
    std::vector<T> out(tensor.size / sizeof(T));
    file_.read(out.data(), tensor.offset, tensor.size);
    return out;
  }

 private:
  std::string path_;
  File file_;
  std::map<std::string, TensorInfo> infos_;

  const TensorInfo& at(const std::string& name) const {
    const auto found = infos_.find(name);
    if (found == infos_.end()) throw BadInput(path_ + ": holds no tensor " + name);
    return found->second;
  }

  static TensorInfo info(const Json& entry, const std::string& where, uint64_t data) {
    static const std::map<std::string, uint64_t> widths = {{"F32", 4}, {"U8", 1}, {"I64", 8}, {"F16", 2}, {"I32", 4}};
    TensorInfo out;
    out.dtype = entry.at("dtype", where).string(where + ": dtype");
    const auto width = widths.find(out.dtype);
    if (width == widths.end()) throw BadInput(where + " has dtype " + out.dtype + ", want F32, F16, U8, I64 or I32");
    uint64_t size = width->second;
    const auto& shape = entry.at("shape", where).list(where + ": shape");
    if (shape.size() > 8) throw BadInput(where + " has more than 8 dimensions");
    for (const Json& dim : shape) {
      const int64_t n = dim.integer(where + ": shape");
      if (n < 0 || (n && size > (uint64_t{1} << 50) / static_cast<uint64_t>(n))) throw BadInput(where + " has an impossible shape");
      out.shape.push_back(n);
      size *= static_cast<uint64_t>(n);
    }
    const auto& offsets = entry.at("data_offsets", where).list(where + ": data_offsets");
    if (offsets.size() != 2) throw BadInput(where + ": data_offsets are not two");
    const int64_t start = offsets[0].integer(where + ": data_offsets"), end = offsets[1].integer(where + ": data_offsets");
    if (start < 0 || end < start || static_cast<uint64_t>(end - start) != size)
      throw BadInput(where + ": data_offsets do not fit " + out.dtype + " " + show(out.shape));
    out.offset = data + static_cast<uint64_t>(start);
    out.size = size;
    return out;
  }
};

struct Array {  // to be written
  std::string name;
  std::vector<int64_t> shape;
  std::vector<float> values;
};

struct Written {
  std::string sha256;
  int64_t bytes;
};

inline Written write_tensors(const std::string& folder, const std::string& name, const std::vector<Array>& arrays) {
  Json header = Json::object();
  int64_t end = 0;
  for (const Array& array : arrays) {
    Json entry = Json::object(), shape = Json::list(), offsets = Json::list();
    for (int64_t dim : array.shape) shape.push(dim);
    offsets.push(end);
    end += static_cast<int64_t>(array.values.size() * sizeof(float));
    offsets.push(end);
    entry.set("dtype", "F32");
    entry.set("shape", std::move(shape));
    entry.set("data_offsets", std::move(offsets));
    header.set(array.name, std::move(entry));
  }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  const uint64_t length = text.size();
  NewFile file(folder, name);
  file.write(&length, 8);
  file.write(text.data(), text.size());
  for (const Array& array : arrays) file.write(array.values.data(), array.values.size() * sizeof(float));
  const auto bytes = static_cast<int64_t>(file.written());
  return {file.commit(), bytes};
}
