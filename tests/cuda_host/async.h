// What happened before what, where threads meet at other barriers than __syncthreads and
// __syncwarp, and who besides threads accesses shared memory.
#pragma once

#include "block.h"

namespace cuda_host {

constexpr int kMaxMbarriers = 64;

// How far each thread, and each mbarrier's phases, have come as somebody knows. A thread's own
// number grows when it lets others know what it did.
using Clock = std::vector<uint32_t>;

struct Granule {             // 16 bytes of shared memory
  int16_t mbarrier, writer;  // of the last copy, -1: none; the thread that wrote last, -1: a copy
  uint32_t phase, fence;     // in which that copy ends; how many fences the writer had made
  bool copying;
  uint8_t reading[kMaxThreads / 32];     // products of a warp in flight that read this
  uint32_t read_time[kMaxThreads / 32];  // of the warp's first thread, at its latest wait
};

struct Mbarrier {
  const char* at;
  int count, pending;
  int64_t bytes;
  uint32_t phase;
  int init_thread;
  uint32_t init_time, init_fence, init_epoch;
  Clock arriving, ended;
};

struct NamedBarrier {
  int threads, arrived;
  Clock clock;
  std::vector<int> waiting;
};

struct TensorCopy {
  char* to;
  TensorMap map;
  int mbarrier, first[4];
};

struct Async {
  std::vector<Clock> clocks;
  std::vector<std::vector<uint32_t>> fences;  // of each thread: when it made them
  std::vector<Granule> granules;
  std::vector<Mbarrier> mbarriers;
  std::vector<NamedBarrier> named;
  std::vector<TensorCopy> copies;
};
extern Async async;

void use_async();  // what follows needs clocks
void join(Clock& clock, const Clock& other);
uint32_t now(int thread);
uint32_t release(int thread);
bool happened(int thread, uint32_t time);  // before what the current thread does
// Fences a thread has made; and whether one followed its first `before`, and is known here.
uint32_t fences(int thread);
bool fenced(int thread, uint32_t before);
Granule* granules_of(const void* at);
void check_written(const void* at, size_t bytes);  // memory.cpp
void check_copied(const void* at, size_t bytes, const char* verb);
void check_unread(const void* at, size_t bytes, const char* verb);
size_t swizzled(size_t offset, int bytes);

void clear_products();
void check_products_ended();

}  // namespace cuda_host
