// Memory of a step's activations, kept for the next step. The C library gives large blocks back to
// the kernel as soon as they are freed, so every step would have its pages mapped and zeroed again:
// 10 to 20 % of a prefill. Tensors that are made on a thread while a KeepMemory lives come from here
// and return here whenever, and on whichever thread, they are freed; all others are torch's affair.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace inlay {
namespace {

constexpr size_t kLeastKept = 64 << 10;  // smaller blocks come from pages that the C library keeps
constexpr size_t kLine = 64, kPage = 4096;

// As much is kept as the last steps needed, and half of that again for blocks of other sizes; the one
// that was longest unused goes first. What callers hold on to between steps does not count.
class KeptMemory final : public c10::Allocator {
 public:
  static KeptMemory& instance() {
    static auto* memory = new KeptMemory(c10::GetCPUAllocator());  // outlives every tensor
    return *memory;
  }

  c10::DataPtr allocate(size_t size) override {
    if (!active || size < kLeastKept) return torch_allocate(size);
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

  void begin_step() {
    const std::lock_guard<std::mutex> lock(mutex_);
    held_ = most_used_ = used_bytes_;
  }
  void end_step() {
    const std::lock_guard<std::mutex> lock(mutex_);
    needs_[num_steps_++ % needs_.size()] = most_used_ - std::min(held_, most_used_);
    drop_beyond(limit());
  }
  void forget() {
    const std::lock_guard<std::mutex> lock(mutex_);
    needs_ = {};
    drop_beyond(0);
  }

  static thread_local bool active;

 private:
  struct Block {
    void* at;
    size_t size;
  };

  explicit KeptMemory(c10::Allocator* torch) : torch_(torch) { c10::SetCPUAllocator(this); }

  c10::DataPtr torch_allocate(size_t size) {
    try {
      return torch_->allocate(size);
    } catch (const c10::Error&) {
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (kept_.empty()) throw;
        drop_beyond(0);
      }
      return torch_->allocate(size);
    }
  }

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
      block.at = fresh(size);
    }
    used_[block.at] = block.size;
    used_bytes_ += block.size;
    most_used_ = std::max(most_used_, used_bytes_);
    return block.at;
  }

  void* fresh(size_t size) {
    void* at = std::aligned_alloc(kLine, size);
    if (!at && !kept_.empty()) {
      drop_beyond(0);
      at = std::aligned_alloc(kLine, size);
    }
    TORCH_CHECK(at, "inlay_cpu: no memory for ", size, " bytes of activations; give fewer "
                "max_num_tokens, or a smaller KV cache");
    ++num_fresh_;
    return at;
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
    drop_beyond(limit());
    return true;
  }

  size_t limit() const {
    const size_t now = most_used_ - std::min(held_, most_used_);
    const size_t need = std::max(now, *std::max_element(needs_.begin(), needs_.end()));
    return need + need / 2;
  }

  void drop_beyond(size_t bytes) {
    while (!kept_.empty() && kept_bytes_ > bytes) {
      std::free(kept_.front().at);
      kept_bytes_ -= kept_.front().size;
      kept_.erase(kept_.begin());
    }
  }

  c10::Allocator* torch_;
  std::mutex mutex_;
  std::vector<Block> kept_;  // the one that was freed first is the first; a few dozen
  std::unordered_map<void*, size_t> used_;
  size_t kept_bytes_ = 0, used_bytes_ = 0;
  size_t held_ = 0, most_used_ = 0;     // when this step began, and at most since then
  std::array<size_t, 256> needs_ = {};  // of the last steps
  size_t num_steps_ = 0;
  int64_t num_fresh_ = 0;
};

thread_local bool KeptMemory::active = false;

// While one lives, a step's length, tensors of this thread get kept memory.
class KeepMemory {
 public:
  KeepMemory() {
    KeptMemory::instance().begin_step();
    KeptMemory::active = true;
  }
  ~KeepMemory() {
    KeptMemory::active = false;
    KeptMemory::instance().end_step();
  }
  KeepMemory(const KeepMemory&) = delete;
  KeepMemory& operator=(const KeepMemory&) = delete;
};

// While one lives, tensors of this thread are torch's affair: for what outlives the step.
class LastingMemory {
 public:
  LastingMemory() : before_(KeptMemory::active) { KeptMemory::active = false; }
  ~LastingMemory() { KeptMemory::active = before_; }
  LastingMemory(const LastingMemory&) = delete;
  LastingMemory& operator=(const LastingMemory&) = delete;

 private:
  bool before_;
};

std::vector<int64_t> kept_memory() { return KeptMemory::instance().statistics(); }

}  // namespace
}  // namespace inlay
