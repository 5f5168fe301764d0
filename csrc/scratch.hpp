// Memory that a thread keeps from call to call.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace usmlite {

// Memory without a constructor, aligned to cache lines, kept by the thread from call to call.
class Scratch {
 public:
  void* get(size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<char*>(::operator new(bytes, std::align_val_t{64})));
      size_ = bytes;
    }
    return memory_.get();
  }
  // Gives back what only one large call needed.
  void trim() {
    if (size_ > kKept) {
      memory_.reset();
      size_ = 0;
    }
  }

 private:
  static constexpr size_t kKept = 16u << 20;
  struct Free {
    void operator()(char* memory) const { ::operator delete(memory, std::align_val_t{64}); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t size_ = 0;
};

inline size_t rounded(size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace usmlite
