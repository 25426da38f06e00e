// The runtime behind cuda_host.h: bounds, the shadow of shared memory, asynchronous copies.
#include "async.h"

namespace cuda_host {

uint64_t bytes_read = 0, bytes_written = 0, bank_conflicts = 0, multiply_adds = 0;

void check_global(const void* at, size_t bytes, const void* begin, const void* end, size_t align,
                  bool write) {
  const auto first = reinterpret_cast<uintptr_t>(at);
  const char* verb = write ? "writes " : "reads ";
  if (first < reinterpret_cast<uintptr_t>(begin) ||
      first + bytes > reinterpret_cast<uintptr_t>(end)) {
    const auto offset = static_cast<int64_t>(first - reinterpret_cast<uintptr_t>(begin));
    const auto size =
        static_cast<int64_t>(static_cast<const char*>(end) - static_cast<const char*>(begin));
    fail(verb + text(bytes) + " bytes at byte " + text(offset) + " of a tensor of " + text(size));
  }
  if (first % align != 0) fail(verb + text(bytes) + " bytes of global memory misaligned");
  (write ? bytes_written : bytes_read) += bytes;
}

// Marks the memory as never written, and fills it with NaN.
void forget(size_t offset, size_t bytes) {
  std::fill_n(block.shadow.begin() + static_cast<int64_t>(offset), bytes,
              Shadow{0, 0, 0, 0, 0, 0, kNobody, kNobody, false, false});
  std::memset(block.shared + offset, 0xFF, bytes);
}

void* static_shared(const void* key, size_t bytes, size_t align) {
  for (const auto& [other, offset] : block.arrays) {
    if (other == key) return block.shared + offset;
  }
  const size_t offset = (block.static_bytes + align - 1) / align * align;
  if (offset + bytes > kStaticLimit) fail("more than 48 KB of static shared memory");
  block.static_bytes = offset + bytes;
  block.arrays.emplace_back(key, offset);
  return block.shared + offset;
}

void* dynamic_shared() { return block.shared + kStaticLimit; }
size_t dynamic_shared_bytes() { return block.dynamic_bytes; }

static Shadow* shadow_of(const void* at, size_t bytes, const void* begin, const void* end,
                         size_t align, const char* verb) {
  if (at < begin || static_cast<const char*>(at) + bytes > end) {
    fail(verb + text(bytes) + " bytes at byte " +
         text(static_cast<const char*>(at) - static_cast<const char*>(begin)) +
         " of a shared array of " +
         text(static_cast<const char*>(end) - static_cast<const char*>(begin)));
  }
  const size_t offset = static_cast<size_t>(static_cast<const char*>(at) - block.shared);
  if (offset % align != 0) fail(verb + text(bytes) + " bytes of shared memory misaligned");
  return &block.shadow[offset];
}

// What the current thread, or a product of its, reads of shared memory is there.
void check_written(const void* at, size_t bytes) {
  const Shadow* shadow =
      &block.shadow[static_cast<size_t>(static_cast<const char*>(at) - block.shared)];
  const int self = block.current->number;
  const uint32_t warp_epoch = block.warps[self / 32].epoch;
  if (block.async) check_copied(at, bytes, "reads ");
  for (const Shadow* s = shadow; s < shadow + bytes; ++s) {
    if (s->under_way) fail("reads shared memory that a cp.async has not filled yet");
    if (!s->written) fail("reads shared memory that nothing wrote");
    if (s->write_block == block.epoch && s->writer != self && s->writer != kTensorCopy &&
        (s->writer / 32 != self / 32 || s->write_warp == warp_epoch) &&
        !happened(s->writer, s->write_time)) {
      fail("reads shared memory that thread " + show(block.fibers[s->writer].index) +
           " wrote with no barrier between");
    }
  }
}

void read_shared(const void* at, size_t bytes, const void* begin, const void* end, size_t align) {
  Shadow* shadow = shadow_of(at, bytes, begin, end, align, "reads ");
  check_written(at, bytes);
  const auto self = static_cast<int16_t>(block.current->number);
  const int16_t readers = static_cast<int16_t>(kReaders - self / 32);
  const uint32_t warp_epoch = block.warps[self / 32].epoch, time = now(self);
  for (size_t i = 0; i < bytes; ++i) {
    Shadow& s = shadow[i];
    if (s.read_block != block.epoch || s.reader == kNobody) {
      s.reader = self;
    } else if (s.reader != self && s.reader != readers) {
      s.reader = s.reader >= 0 && s.reader / 32 == self / 32 ? readers : kSeveralWarps;
    }
    s.read_block = block.epoch, s.read_warp = warp_epoch, s.read_time = time;
  }
}

static void mark_written(Shadow* shadow, size_t bytes) {
  const auto self = static_cast<int16_t>(block.current->number);
  const int16_t readers = static_cast<int16_t>(kReaders - self / 32);
  const uint32_t warp_epoch = block.warps[self / 32].epoch, time = now(self);
  for (size_t i = 0; i < bytes; ++i) {
    Shadow& s = shadow[i];
    if (s.write_block == block.epoch && s.writer != self && s.writer != kTensorCopy && s.written &&
        (s.writer / 32 != self / 32 || s.write_warp == warp_epoch) &&
        !happened(s.writer, s.write_time)) {
      fail("writes shared memory that thread " + show(block.fibers[s.writer].index) +
           " wrote with no barrier between");
    }
    const bool same_warp = s.reader == readers || (s.reader >= 0 && s.reader / 32 == self / 32);
    if (s.read_block == block.epoch && s.reader != kNobody && s.reader != self &&
        !(same_warp && s.read_warp < warp_epoch) &&
        !(s.reader >= 0 && happened(s.reader, s.read_time))) {
      fail("writes shared memory that another thread read with no barrier between");
    }
    s.writer = self, s.written = true;
    s.write_block = block.epoch, s.write_warp = warp_epoch, s.write_time = time;
  }
}

void write_shared(void* at, size_t bytes, const void* begin, const void* end, size_t align) {
  Shadow* shadow = shadow_of(at, bytes, begin, end, align, "writes ");
  for (size_t i = 0; i < bytes; ++i) {
    if (shadow[i].under_way) fail("writes shared memory that a cp.async is about to fill");
  }
  if (block.async) {
    check_copied(at, bytes, "writes ");
    check_unread(at, bytes, "writes ");
    Granule* granule = granules_of(at);
    const Granule* end = granules_of(static_cast<char*>(at) + bytes - 1);
    for (; granule <= end; ++granule) {
      granule->mbarrier = -1;
      granule->writer = static_cast<int16_t>(block.current->number);
      granule->fence = fences(block.current->number);
    }
  }
  mark_written(shadow, bytes);
}

void copy_async(void* to, const void* begin, const void* end, const void* from, size_t bytes,
                size_t valid) {
  Shadow* shadow = shadow_of(to, bytes, begin, end, bytes, "copies ");
  for (size_t i = 0; i < bytes; ++i) {
    if (shadow[i].under_way) fail("two cp.async fill the same shared memory");
  }
  mark_written(shadow, bytes);
  for (size_t i = 0; i < bytes; ++i) shadow[i].under_way = true;
  Copy copy{static_cast<char*>(to), {}};
  std::memcpy(copy.bytes, from, valid);  // the rest is zeros
  std::memset(to, 0xFF, bytes);
  block.current->copies.back().push_back(copy);
}

void copy_async_commit() { block.current->copies.emplace_back(); }

void copy_async_wait(int pending) {
  auto& copies = block.current->copies;
  while (copies.size() > static_cast<size_t>(pending) + 1) {
    for (const Copy& copy : copies.front()) {
      std::memcpy(copy.to, copy.bytes, 16);
      Shadow* shadow = &block.shadow[static_cast<size_t>(copy.to - block.shared)];
      for (int i = 0; i < 16; ++i) shadow[i].under_way = false;
      mark_written(shadow, 16);
    }
    copies.erase(copies.begin());
  }
}

void count_multiply_adds(int count) { multiply_adds += static_cast<uint64_t>(count); }

void count_bank_conflicts(const void* const* rows, int count) {
  int used[8] = {};
  for (int i = 0; i < count; ++i) ++used[reinterpret_cast<uintptr_t>(rows[i]) / 16 % 8];
  bank_conflicts += static_cast<uint64_t>(*std::max_element(used, used + 8) - 1);
}

}  // namespace cuda_host
