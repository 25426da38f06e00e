// The runtime behind hopper.h: clocks, mbarriers, named barriers, tensor copies.
#include "async.h"

namespace cuda_host {

Async async;

namespace {

int self() { return block.current->number; }

std::string place_of(const void* at) { return "byte " + text(shared_address(at)); }

Mbarrier& mbarrier_of(const void* at) {
  for (Mbarrier& barrier : async.mbarriers) {
    if (barrier.at != at) continue;
    if (barrier.init_thread != self() && barrier.init_epoch == block.epoch &&
        !happened(barrier.init_thread, barrier.init_time)) {
      fail("uses an mbarrier with no barrier after its initialisation");
    }
    return barrier;
  }
  fail("uses an mbarrier that nobody initialised");
}

void settle(Mbarrier& barrier) {
  if (barrier.pending > 0) return;
  if (barrier.bytes < 0) {
    fail("an mbarrier got " + text(-barrier.bytes) + " bytes more than its phase expects");
  }
  if (barrier.bytes > 0) return;
  ++barrier.phase;
  const auto index = static_cast<size_t>(&barrier - async.mbarriers.data());
  join(barrier.ended, barrier.arriving);
  barrier.ended[static_cast<size_t>(block.threads) + index] = barrier.phase;
  barrier.pending = barrier.count;
  for (int i = 0; i < block.threads; ++i) {
    Fiber& fiber = block.fibers[i];
    if (fiber.state == State::kMbarrier && fiber.waits_for == static_cast<int>(index)) {
      fiber.state = State::kReady;
    }
  }
}

void finish(const TensorCopy& copy) {
  const TensorMap& map = copy.map;
  const uint32_t* box = map.box;
  const auto start = static_cast<size_t>(copy.to - block.shared);
  size_t offset = start;
  const auto outside = [&](int axis, uint32_t i) {
    const int64_t x = copy.first[axis] + static_cast<int64_t>(i);
    return x < 0 || x >= static_cast<int64_t>(map.sizes[axis]);
  };
  for (uint32_t w = 0; w < box[3]; ++w) {
    for (uint32_t z = 0; z < box[2]; ++z) {
      for (uint32_t y = 0; y < box[1]; ++y) {
        const bool row_outside = outside(3, w) || outside(2, z) || outside(1, y);
        const char* row = static_cast<const char*>(map.data) + (copy.first[3] + w) * map.steps[2] +
                          (copy.first[2] + z) * map.steps[1] + (copy.first[1] + y) * map.steps[0];
        for (uint32_t x = 0; x < box[0]; ++x, offset += 2) {
          char* to = block.shared + swizzled(offset, map.swizzle);
          const char* from = row + 2 * (copy.first[0] + static_cast<int>(x));
          if (row_outside || outside(0, x)) {
            std::memset(to, 0, 2);
          } else {
            check_global(from, 2, map.begin, map.end, 2, false);
            std::memcpy(to, from, 2);
          }
        }
      }
    }
  }
  Granule* granules = granules_of(copy.to);
  for (size_t i = 0; i < (offset - start) / 16; ++i) granules[i].copying = false;
  Mbarrier& barrier = async.mbarriers[static_cast<size_t>(copy.mbarrier)];
  barrier.bytes -= static_cast<int64_t>(offset - start);
  settle(barrier);
}

}  // namespace

size_t swizzled(size_t offset, int bytes) {
  return offset ^ (offset >> 7 & (static_cast<size_t>(bytes) / 16 - 1)) << 4;
}

uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(static_cast<const char*>(at) - block.shared - kStaticLimit);
}

Granule* granules_of(const void* at) {
  return &async.granules[static_cast<size_t>(static_cast<const char*>(at) - block.shared) / 16];
}

// --- clocks ---

void use_async() {
  if (block.async) return;
  block.async = true;
  const auto threads = static_cast<size_t>(block.threads);
  async.clocks.assign(threads, Clock(threads + kMaxMbarriers, 0));
  for (size_t i = 0; i < threads; ++i) async.clocks[i][i] = 1;
  async.fences.assign(threads, {});
  async.granules.assign((kStaticLimit + kSharedLimit) / 16, Granule{-1, -1, 0, 0, false, {}, {}});
  async.mbarriers.clear();
  async.mbarriers.reserve(kMaxMbarriers);
  async.named.assign(16, {0, 0, Clock(threads + kMaxMbarriers, 0), {}});
  async.copies.clear();
  clear_products();
}

void join(Clock& clock, const Clock& other) {
  for (size_t i = 0; i < clock.size(); ++i) clock[i] = std::max(clock[i], other[i]);
}

void join_warp(int warp) {
  const auto first = static_cast<size_t>(32 * warp);
  const size_t end = std::min(first + 32, static_cast<size_t>(block.threads));
  Clock all = async.clocks[first];
  for (size_t i = first + 1; i < end; ++i) join(all, async.clocks[i]);
  for (size_t i = first; i < end; ++i) async.clocks[i] = all, release(static_cast<int>(i));
}

void join_block() {
  Clock all = async.clocks[0];
  for (const Clock& clock : async.clocks) join(all, clock);
  for (int i = 0; i < block.threads; ++i) {
    async.clocks[static_cast<size_t>(i)] = all, release(i);
  }
}

uint32_t now(int thread) {
  return block.async ? async.clocks[static_cast<size_t>(thread)][static_cast<size_t>(thread)] : 1;
}

uint32_t release(int thread) {
  return async.clocks[static_cast<size_t>(thread)][static_cast<size_t>(thread)]++;
}

bool happened(int thread, uint32_t time) {
  return block.async &&
         async.clocks[static_cast<size_t>(self())][static_cast<size_t>(thread)] >= time;
}

// --- shared memory that others than threads access ---

// The last copy to it has ended, as the current thread knows.
void check_copied(const void* at, size_t bytes, const char* verb) {
  const Granule* granules = granules_of(at);
  const size_t count = (reinterpret_cast<uintptr_t>(at) % 16 + bytes + 15) / 16;
  for (const Granule* g = granules; g < granules + count; ++g) {
    if (g->mbarrier < 0) continue;
    const auto agent = static_cast<size_t>(block.threads + g->mbarrier);
    if (g->copying || async.clocks[static_cast<size_t>(self())][agent] <= g->phase) {
      fail(std::string(verb) + "shared memory (" + place_of(at) +
           ") that TMA fills, without a wait for its mbarrier");
    }
  }
}

// No product reads it any more, as the current thread knows.
void check_unread(const void* at, size_t bytes, const char* verb) {
  const Granule* granules = granules_of(at);
  const size_t count = (reinterpret_cast<uintptr_t>(at) % 16 + bytes + 15) / 16;
  for (const Granule* g = granules; g < granules + count; ++g) {
    for (int warp = 0; warp < (block.threads + 31) / 32; ++warp) {
      const uint32_t time = g->read_time[warp];
      if (g->reading[warp] != 0 || (time > 0 && !happened(32 * warp, time))) {
        fail(std::string(verb) + "shared memory (" + place_of(at) +
             ") that a wgmma may still read");
      }
    }
  }
}

uint32_t fences(int thread) {
  return static_cast<uint32_t>(async.fences[static_cast<size_t>(thread)].size());
}

bool fenced(int thread, uint32_t before) {
  if (fences(thread) <= before) return false;
  return thread == self() || happened(thread, async.fences[static_cast<size_t>(thread)][before]);
}

void fence_proxy_async() {
  use_async();
  async.fences[static_cast<size_t>(self())].push_back(now(self()));
}

// --- barriers ---

void mbarrier_init(void* at, int count) {
  use_async();
  for (const Mbarrier& barrier : async.mbarriers) {
    if (barrier.at == at) fail("initialises an mbarrier twice");
  }
  if (count < 1 || async.mbarriers.size() == kMaxMbarriers) fail("too many mbarriers or no count");
  const Clock zero(async.clocks[0].size(), 0);
  async.mbarriers.push_back({static_cast<const char*>(at), count, count, 0, 0, self(), now(self()),
                             fences(self()), block.epoch, zero, zero});
}

void mbarrier_arrive(void* at, int bytes, Site) {
  use_async();
  Mbarrier& barrier = mbarrier_of(at);
  barrier.bytes += bytes;
  if (--barrier.pending < 0) fail("arrives at an mbarrier more often than its phase expects");
  join(barrier.arriving, async.clocks[static_cast<size_t>(self())]);
  release(self());
  settle(barrier);
}

void mbarrier_wait(void* at, int parity, Site site) {
  use_async();
  const Mbarrier& barrier = mbarrier_of(at);
  Fiber& fiber = *block.current;
  while (static_cast<int>(barrier.phase & 1) == parity) {
    fiber.waits_for = static_cast<int>(&barrier - async.mbarriers.data());
    wait_as(State::kMbarrier, site);
  }
  join(async.clocks[static_cast<size_t>(self())], barrier.ended);
}

void named_barrier(int id, int threads, bool waits, Site site) {
  use_async();
  if (id < 1 || id > 15 || threads % 32 != 0 || threads > block.threads) {
    fail("barrier " + text(id) + " of " + text(threads) + " threads");
  }
  NamedBarrier& barrier = async.named[static_cast<size_t>(id)];
  if (barrier.arrived > 0 && barrier.threads != threads) {
    fail("barrier " + text(id) + " is of " + text(threads) + " threads here and of " +
         text(barrier.threads) + " elsewhere");
  }
  barrier.threads = threads;
  join(barrier.clock, async.clocks[static_cast<size_t>(self())]);
  release(self());
  if (waits) barrier.waiting.push_back(self());
  if (++barrier.arrived == threads) {
    for (int i : barrier.waiting) {
      join(async.clocks[static_cast<size_t>(i)], barrier.clock);
      block.fibers[i].state = State::kReady;
    }
    barrier.waiting.clear();
    barrier.arrived = 0;
  } else if (waits) {
    block.current->waits_for = id;
    wait_as(State::kNamed, site);
  }
}

std::string missing(const Fiber& fiber) {
  const auto index = static_cast<size_t>(fiber.waits_for);
  if (fiber.state == State::kNamed) {
    const NamedBarrier& barrier = async.named[index];
    return text(barrier.threads - barrier.arrived) + " of its threads do not reach";
  }
  const Mbarrier& barrier = async.mbarriers[index];
  return "lacks " + text(barrier.pending) + " arrivals and " + text(barrier.bytes) + " bytes";
}

// --- copies ---

void tensor_copy(void* to, const void* begin, const void* end, const TensorMap& map, void* barrier,
                 const int (&first)[4]) {
  use_async();
  const Mbarrier& full = mbarrier_of(barrier);
  if (!fenced(full.init_thread, full.init_fence)) {
    fail("copies for an mbarrier that no fence.proxy.async followed");
  }
  const size_t row = 2 * map.box[0], bytes = row * map.box[1] * map.box[2] * map.box[3];
  const auto swizzle = static_cast<size_t>(map.swizzle);
  const bool aligned = reinterpret_cast<uintptr_t>(map.data) % 16 == 0 && map.steps[0] % 16 == 0 &&
                       map.steps[1] % 16 == 0 && map.steps[2] % 16 == 0;
  const size_t start = shared_address(to), pattern = swizzle > 16 ? 8 * swizzle : 128;
  if (!aligned || row % 16 != 0 || (swizzle > 16 && row > swizzle) || map.box[1] > 256 ||
      start % pattern != 0) {
    fail("a tensor copy of rows of " + text(row) + " bytes to byte " + text(start) +
         " is not what TMA takes");
  }
  check_unread(to, bytes, "copies to ");
  const Granule* before = granules_of(to);
  for (size_t i = 0; i < bytes / 16; ++i) {
    const int writer = before[i].writer;
    if (writer >= 0 && !fenced(writer, before[i].fence)) {
      fail("copies to shared memory that a thread wrote without fence.proxy.async");
    }
  }
  write_shared(to, bytes, begin, end, 16);
  std::memset(to, 0xFF, bytes);
  Shadow* shadow = &block.shadow[static_cast<size_t>(static_cast<char*>(to) - block.shared)];
  for (size_t i = 0; i < bytes; ++i) shadow[i].writer = kTensorCopy;
  const auto index = static_cast<int>(&full - async.mbarriers.data());
  Granule* granules = granules_of(to);
  for (size_t i = 0; i < bytes / 16; ++i) {
    granules[i].mbarrier = static_cast<int16_t>(index);
    granules[i].writer = -1;
    granules[i].phase = full.phase;
    granules[i].copying = true;
  }
  async.copies.push_back(
      {static_cast<char*>(to), map, index, {first[0], first[1], first[2], first[3]}});
}

bool finish_a_copy(bool newest) {
  if (!block.async || async.copies.empty()) return false;
  const auto which = newest ? async.copies.end() - 1 : async.copies.begin();
  const TensorCopy copy = *which;
  async.copies.erase(which);
  finish(copy);
  return true;
}

void end_async() {
  if (!block.async) return;
  if (!async.copies.empty()) fail("ends while a tensor copy is under way");
  for (size_t id = 1; id < async.named.size(); ++id) {
    if (async.named[id].arrived > 0) {
      fail("ends while barrier " + text(id) + " lacks threads");
    }
  }
  check_products_ended();
}

}  // namespace cuda_host
