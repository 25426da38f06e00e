// The runtime behind cuda_host.h: fibers, barriers, collectives.
#include <sys/mman.h>
#include <ucontext.h>

#include <mutex>
#include <set>

#include "block.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_host {

Block block;

std::string show(uint3 index) {
  return "(" + text(index.x) + ", " + text(index.y) + ", " + text(index.z) + ")";
}

int multiprocessors = 0;

namespace {

std::recursive_mutex mutex;
std::string kernel;
std::set<std::string> executed;
uint64_t launches = 0;

std::string place(Site site) {
  const char* name = std::strrchr(site.file, '/');
  return std::string(name == nullptr ? site.file : name + 1) + ":" + text(site.line);
}

// --- switching between fibers ---
#if defined(__x86_64__)
extern "C" void cuda_host_switch(void** save, void* next);
asm(R"(
.text
.globl cuda_host_switch
.hidden cuda_host_switch
.type cuda_host_switch, @function
cuda_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
void fiber_main();
void* first_frame(char* stack) {
  auto top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // a return address: the alignment after a call, and an end for unwinders
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  return top;
}
#else
ucontext_t contexts[kMaxThreads + 1];
void cuda_host_switch(void** save, void* next) {
  static int running = kMaxThreads;  // a "stack pointer" is a number of a context, plus one
  const int from = running;
  *save = reinterpret_cast<void*>(static_cast<intptr_t>(from + 1));
  running = static_cast<int>(reinterpret_cast<intptr_t>(next)) - 1;
  swapcontext(&contexts[from], &contexts[running]);
}
void fiber_main();
void* first_frame(char* stack) {
  const int i = static_cast<int>((stack - block.stacks) / kStackBytes);
  getcontext(&contexts[i]);
  contexts[i].uc_stack.ss_sp = stack;
  contexts[i].uc_stack.ss_size = kStackBytes;
  makecontext(&contexts[i], fiber_main, 0);
  return reinterpret_cast<void*>(static_cast<intptr_t>(i + 1));
}
#endif

void to_scheduler() { cuda_host_switch(&block.current->stack_pointer, block.scheduler); }

void fiber_main() {
  try {
    block.body(block.context);
    for (const auto& group : block.current->copies) {
      if (!group.empty()) fail("ends while a cp.async of it is under way");
    }
  } catch (const std::exception& error) {
    block.error = error.what();
  }
  block.current->state = State::kDone;
  ++block.done;
  to_scheduler();
}

void prepare(uint3 index) {
  blockIdx = index;
  block.at_barrier = block.done = 0;
  block.epoch = 1;
  block.async = false;
  block.error.clear();
  block.arrays.clear();
  forget(0, block.static_bytes);
  forget(kStaticLimit, block.dynamic_bytes);
  block.static_bytes = 0;
  for (Warp& warp : block.warps) warp.epoch = 1, warp.groups.clear();
  for (int i = 0; i < block.threads; ++i) {
    Fiber& fiber = block.fibers[i];
    const unsigned t = static_cast<unsigned>(i);
    fiber.index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
    fiber.number = i;
    fiber.state = State::kReady;
    fiber.copies.assign(1, {});
    fiber.stack_pointer = first_frame(block.stacks + i * kStackBytes);
  }
}

std::string waiting(const Fiber& fiber) {
  const std::string site = " (" + place(fiber.site) + ") that ";
  if (fiber.state == State::kMbarrier) return "waits at an mbarrier" + site + missing(fiber);
  if (fiber.state == State::kNamed) return "waits at a named barrier" + site + missing(fiber);
  const bool barrier = fiber.state == State::kBarrier;
  return (barrier ? "waits at a barrier" : "waits at a warp collective") + site +
         "some of its threads do not reach";
}

// Every thread that has not finished is waiting; says for what, each thing once.
std::string deadlock() {
  std::string what;
  std::set<std::string> said;
  int done = -1;
  for (int i = 0; i < block.threads; ++i) {
    const Fiber& fiber = block.fibers[i];
    if (fiber.state == State::kDone) done = i;
    if (fiber.state == State::kDone || !said.insert(waiting(fiber)).second) continue;
    if (what.empty()) {
      block.current = &block.fibers[i];
    } else {
      what += "; thread " + show(fiber.index) + " ";
    }
    what += waiting(fiber);
  }
  if (done >= 0) what += "; thread " + show(block.fibers[done].index) + " has returned";
  return what;
}

void run_block(bool backwards) {
  while (block.done < block.threads) {
    bool progress = false;
    for (int k = 0; k < block.threads; ++k) {
      Fiber& fiber = block.fibers[backwards ? block.threads - 1 - k : k];
      if (fiber.state != State::kReady) continue;
      progress = true;
      block.current = &fiber;
      threadIdx = fiber.index;
      cuda_host_switch(&block.scheduler, fiber.stack_pointer);
      if (!block.error.empty()) throw std::runtime_error(block.error);
    }
    if (!progress && !finish_a_copy(backwards)) fail(deadlock());
  }
  end_async();
}

std::string kernel_name(const char* launched) {
  std::string name(launched);
  name.erase(0, name.find_first_not_of("( "));
  const size_t space = name.rfind("::", name.find('<'));
  if (space != std::string::npos) name.erase(0, space + 2);
  return name.substr(0, name.find_first_of("<) "));
}

}  // namespace

void fail(const std::string& what) {
  std::string where = kernel + ", block " + show(blockIdx);
  if (block.current != nullptr) where += ", thread " + show(block.current->index);
  throw std::runtime_error(where + ": " + what);
}

void wait_as(State state, Site site) {
  block.current->state = state;
  block.current->site = site;
  to_scheduler();
}

unsigned lane() { return static_cast<unsigned>(block.current->number) & 31; }

void run(const char* name, dim3 grid, dim3 threads, size_t shared_bytes, void (*body)(void*),
         void* context) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  kernel = kernel_name(name);
  executed.insert(kernel);
  block.current = nullptr;
  blockIdx = {0, 0, 0};
  const uint64_t count = uint64_t{threads.x} * threads.y * threads.z;
  if (count == 0 || count > kMaxThreads) fail("a block of " + text(count) + " threads");
  if (grid.x == 0 || grid.x > 0x7FFFFFFF || grid.y == 0 || grid.y > 65535 || grid.z == 0 ||
      grid.z > 65535) {
    fail("a grid of " + show({grid.x, grid.y, grid.z}) + " blocks");
  }
  if (shared_bytes > kSharedLimit) fail(text(shared_bytes) + " bytes of shared memory");
  if (block.stacks == nullptr) {
    void* memory = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for the stacks");
    block.stacks = static_cast<char*>(memory);
    block.shared = static_cast<char*>(std::aligned_alloc(1024, kStaticLimit + kSharedLimit));
    block.shadow.resize(kStaticLimit + kSharedLimit);
    forget(0, kStaticLimit);
  }
  gridDim = grid, blockDim = threads;
  block.threads = static_cast<int>(count);
  block.body = body, block.context = context;
  block.dynamic_bytes = shared_bytes;
  const bool backwards = launches++ % 2 == 1;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t k = 0; k < blocks; ++k) {
    const uint64_t i = backwards ? blocks - 1 - k : k;
    block.current = nullptr;
    prepare({static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
             static_cast<unsigned>(i / grid.x / grid.y)});
    run_block(backwards);
  }
}

void barrier(Site site) {
  if (block.at_barrier > 0 && block.barrier_site.line != site.line) {
    fail("is at the barrier " + place(site) + " while others are at " + place(block.barrier_site));
  }
  block.barrier_site = site;
  if (++block.at_barrier < block.threads) {
    wait_as(State::kBarrier, site);
    return;
  }
  block.at_barrier = 0;
  ++block.epoch;
  if (block.async) join_block();
  for (int i = 0; i < block.threads; ++i) {
    if (block.fibers[i].state == State::kBarrier) block.fibers[i].state = State::kReady;
  }
}

void collective(Kind kind, unsigned mask, void* mine, void (*resolve)(void** lanes), Site site) {
  Fiber& self = *block.current;
  const unsigned bit = 1u << (self.number & 31);
  if ((mask & bit) == 0) fail("is not in the mask of its collective (" + place(site) + ")");
  Warp& warp = block.warps[self.number / 32];
  auto group = std::find_if(warp.groups.begin(), warp.groups.end(), [&](const Group& other) {
    return other.mask == mask && other.kind == kind;
  });
  if (group == warp.groups.end()) {
    warp.groups.push_back({kind, mask, 0, site, {}});
    group = warp.groups.end() - 1;
  }
  if (group->site.line != site.line) {
    fail("is at the collective " + place(site) + " while others are at " + place(group->site));
  }
  group->arrived |= bit;
  group->lanes[self.number & 31] = mine;
  if (group->arrived != mask) {
    self.mask = mask;
    wait_as(State::kCollective, site);
    return;
  }
  resolve(group->lanes);
  if (kind == Kind::kSyncWarp) {
    ++warp.epoch;
    if (block.async) join_warp(self.number / 32);
  }
  const int first = self.number / 32 * 32;
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1) != 0 && first + i != self.number) {
      block.fibers[first + i].state = State::kReady;
    }
  }
  warp.groups.erase(group);
}

unsigned vote(unsigned mask, bool predicate, Site site) {
  struct Vote {
    bool given;
    unsigned all;
  } mine{predicate, 0};
  collective(
      Kind::kVote, mask, &mine,
      [](void** lanes) {
        unsigned all = 0;
        for (int i = 0; i < 32; ++i) {
          if (lanes[i] != nullptr && static_cast<Vote*>(lanes[i])->given) all |= 1u << i;
        }
        for (int i = 0; i < 32; ++i) {
          if (lanes[i] != nullptr) static_cast<Vote*>(lanes[i])->all = all;
        }
      },
      site);
  return mine.all;
}

}  // namespace cuda_host

// What Python reads through ctypes.
#pragma GCC visibility push(default)
extern "C" {
const char* cuda_host_executed() {
  static std::string names;
  names.clear();
  for (const std::string& name : cuda_host::executed) names += name + "\n";
  return names.c_str();
}
const char* cuda_host_latest() { return cuda_host::kernel.c_str(); }
void cuda_host_set_multiprocessors(int count) { cuda_host::multiprocessors = count; }
uint64_t cuda_host_launches() { return cuda_host::launches; }
uint64_t cuda_host_bytes_read() { return cuda_host::bytes_read; }
uint64_t cuda_host_bytes_written() { return cuda_host::bytes_written; }
uint64_t cuda_host_bank_conflicts() { return cuda_host::bank_conflicts; }
uint64_t cuda_host_multiply_adds() { return cuda_host::multiply_adds; }
}
#pragma GCC visibility pop
