// Memory of a step's activations, kept for the next step. The C library gives large blocks back to
// the kernel as soon as they are freed, so every step would have its pages mapped and zeroed again:
// 10 to 20 % of a prefill. Tensors that are made on a thread while a KeepMemory lives come from here
// and return here whenever, and on whichever thread, they are freed; all others are torch's affair.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace inlay {
namespace {

constexpr size_t kLeastKept = 64 << 10;  // smaller blocks come from pages that the C library keeps
constexpr size_t kLine = 64, kPage = 4096;

// What is kept and what is in use together stay within 1.5 times the most that was in use at once:
// blocks of sizes that no longer occur go, the one that was longest unused first.
class KeptMemory final : public c10::Allocator {
 public:
  static KeptMemory& instance() {
    static auto* memory = new KeptMemory(c10::GetCPUAllocator());  // outlives every tensor
    return *memory;
  }

  c10::DataPtr allocate(size_t size) override {
    if (!active || size < kLeastKept) return torch_->allocate(size);
    void* block = take((size + kPage - 1) / kPage * kPage);
    return {block, block, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t count) const override {
    std::memcpy(to, from, count);
  }

  // Bytes kept, bytes in use, blocks that had to be had from the C library so far.
  std::vector<int64_t> statistics() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {static_cast<int64_t>(kept_bytes_), static_cast<int64_t>(used_bytes_), num_fresh_};
  }

  static thread_local bool active;

 private:
  struct Block {
    void* at;
    size_t size;
  };

  explicit KeptMemory(c10::Allocator* torch) : torch_(torch) { c10::SetCPUAllocator(this); }

  void* take(size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = kept_.end();
    for (auto it = kept_.begin(); it != kept_.end(); ++it)
      if (it->size >= size && it->size <= size + size / 4 &&
          (best == kept_.end() || it->size < best->size))
        best = it;
    Block block{nullptr, size};
    if (best != kept_.end()) {
      block = *best;
      kept_.erase(best);
      kept_bytes_ -= block.size;
    } else {
      block.at = std::aligned_alloc(kLine, size);
      TORCH_CHECK(block.at, "inlay_cpu: no memory for ", size, " bytes of activations; give fewer "
                  "max_num_tokens");
      ++num_fresh_;
    }
    used_[block.at] = block.size;
    used_bytes_ += block.size;
    most_used_ = std::max(most_used_, used_bytes_);
    drop_oldest();
    return block.at;
  }

  static void release(void* at) {
    if (!instance().keep(at)) instance().torch_->raw_deleter()(at);
  }

  bool keep(void* at) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = used_.find(at);
    if (found == used_.end()) return false;
    kept_.push_back({at, found->second});
    kept_bytes_ += found->second;
    used_bytes_ -= found->second;
    used_.erase(found);
    drop_oldest();
    return true;
  }

  void drop_oldest() {
    while (!kept_.empty() && kept_bytes_ + used_bytes_ > most_used_ + most_used_ / 2) {
      std::free(kept_.front().at);
      kept_bytes_ -= kept_.front().size;
      kept_.erase(kept_.begin());
    }
  }

  c10::Allocator* torch_;
  std::mutex mutex_;
  std::vector<Block> kept_;  // the one that was freed first is the first; a few dozen
  std::unordered_map<void*, size_t> used_;
  size_t kept_bytes_ = 0, used_bytes_ = 0, most_used_ = 0;
  int64_t num_fresh_ = 0;
};

thread_local bool KeptMemory::active = false;

// While one lives, tensors of this thread get kept memory.
class KeepMemory {
 public:
  KeepMemory() : before_(KeptMemory::active) {
    KeptMemory::instance();
    KeptMemory::active = true;
  }
  ~KeepMemory() { KeptMemory::active = before_; }
  KeepMemory(const KeepMemory&) = delete;
  KeepMemory& operator=(const KeepMemory&) = delete;

 private:
  bool before_;
};

std::vector<int64_t> kept_memory() { return KeptMemory::instance().statistics(); }

}  // namespace
}  // namespace inlay
