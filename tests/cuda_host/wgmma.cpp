// The runtime behind hopper.h: products of warp groups. A warp computes its 16 rows when it waits.
#include <map>

#include "async.h"

namespace cuda_host {

namespace {

constexpr uint32_t kInFlight = 0x7FFFFA11;  // a NaN, in registers that a product will write

struct Product {
  Wgmma of;
  Site site;
  float* d[32];
  const uint32_t* a[32];
  uint32_t a_values[32][4];
};

struct Sums {  // of registers in flight
  int products = 0;
  std::vector<float> values[32];
};

struct WarpProducts {
  bool fenced = false;
  size_t started = 0;
  std::vector<std::vector<Product>> groups{1};  // oldest first; the last is open
  std::map<float*, Sums> sums;                  // by the first lane's registers
};

struct Started {  // what all warps of a group have to start
  int line, n;
  uint64_t a, b;
};

WarpProducts warps[kMaxThreads / 32];
std::vector<Started> started[kMaxThreads / 128];

float number(uint16_t bits, bool half) {
  if (!half) return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return value;
}

// Where row r (of m or n) and column k of a matrix is; `across` as the PTX manual's "K-major", else
// "MN-major".
size_t place(uint64_t matrix, bool across, size_t r, size_t k) {
  static constexpr int kBytes[] = {16, 128, 64, 32};
  const auto bytes = static_cast<size_t>(kBytes[matrix >> 62]);
  const size_t start = (matrix & 0x3FFF) << 4, leading = (matrix >> 16 & 0x3FFF) << 4,
               stride = (matrix >> 32 & 0x3FFF) << 4;
  if (bytes > 16 && start % (8 * bytes) >= bytes) {
    fail("the matrix of a wgmma does not begin where its swizzle does");
  }
  size_t at;
  if (across) {
    const size_t half = bytes == 16 ? leading : 16;
    at = start + r % 8 * bytes + r / 8 * stride + k / 8 * half + k % 8 * 2;
  } else if (bytes == 16) {
    at = start + r / 8 * stride + k % 8 * 16 + k / 8 * leading + r % 8 * 2;
  } else {
    const size_t numbers = bytes / 2;
    at = start + r % numbers * 2 + r / numbers * leading + k % 8 * bytes + k / 8 * stride;
  }
  return kStaticLimit + swizzled(at, static_cast<int>(bytes));
}

// use(offset) for all 16-byte pieces of rows [from, to) of a matrix 16 deep.
template <class Use>
void for_pieces(uint64_t matrix, bool across, size_t from, size_t to, Use&& use) {
  for (size_t r = from; r < to; r += across ? 1 : 8) {
    for (size_t k = 0; k < 16; k += across ? 8 : 1) use(place(matrix, across, r, k));
  }
}

template <class Use>
void for_pieces(const Product& product, int warp, Use&& use) {
  const bool across = product.of.a == nullptr;
  const auto row = static_cast<size_t>(warp % 4 * 16);
  if (across) for_pieces(product.of.a_matrix, true, row, row + 16, use);
  for_pieces(product.of.b_matrix, across, 0, static_cast<size_t>(product.of.n), use);
}

void check_readable(size_t offset) {
  if (offset + 16 > kStaticLimit + block.dynamic_bytes) fail("a wgmma reads beyond shared memory");
  const char* at = block.shared + offset;
  const Granule& granule = *granules_of(at);
  check_written(at, 16);
  if (granule.writer >= 0 && !fenced(granule.writer, granule.fence)) {
    fail("a wgmma reads shared memory that a thread wrote without fence.proxy.async");
  }
}

void start(WarpProducts& state, int warp, Product product) {
  if (!state.fenced) fail("starts a product without wgmma.fence before it");
  auto& log = started[warp / 4];
  const Started mine{product.site.line, product.of.n, product.of.a_matrix, product.of.b_matrix};
  if (state.started == log.size()) log.push_back(mine);
  const Started& theirs = log[state.started++];
  if (mine.line != theirs.line || mine.n != theirs.n || mine.a != theirs.a || mine.b != theirs.b) {
    fail("starts another product than the other warps of its group");
  }
  for_pieces(product, warp, [&](size_t offset) {
    check_readable(offset);
    ++granules_of(block.shared + offset)->reading[warp];
  });
  count_multiply_adds(16 * product.of.n * 16);
  Sums& sums = state.sums[product.d[0]];
  if (sums.products++ == 0) {
    for (int lane = 0; lane < 32; ++lane) {
      sums.values[lane].assign(product.d[lane], product.d[lane] + product.of.n / 2);
      for (int i = 0; i < product.of.n / 2; ++i) std::memcpy(product.d[lane] + i, &kInFlight, 4);
    }
  }
  state.groups.back().push_back(std::move(product));
}

void multiply(const Product& product, int warp, Sums& sums) {
  const Wgmma& of = product.of;
  const auto n = static_cast<size_t>(of.n);
  float A[16][16];
  std::vector<float> B(16 * n);
  const auto read = [&](size_t offset) {
    uint16_t bits;
    std::memcpy(&bits, block.shared + offset, 2);
    return number(bits, of.half);
  };
  for (size_t r = 0; r < n; ++r) {
    for (size_t k = 0; k < 16; ++k) {
      B[16 * r + k] = read(place(of.b_matrix, of.a == nullptr, r, k));
    }
  }
  for (size_t r = 0; r < 16 && of.a == nullptr; ++r) {
    for (size_t k = 0; k < 16; ++k) {
      A[r][k] = read(place(of.a_matrix, true, static_cast<size_t>(warp % 4 * 16) + r, k));
    }
  }
  for (int lane = 0; lane < 32 && of.a != nullptr; ++lane) {
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 2; ++half) {
        A[lane / 4 + i % 2 * 8][lane % 4 * 2 + half + i / 2 * 8] =
            number(static_cast<uint16_t>(product.a_values[lane][i] >> 16 * half), of.half);
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < of.n / 2; ++i) {
      const float* a = A[lane / 4 + i % 4 / 2 * 8];
      const float* b = &B[16 * static_cast<size_t>(i / 4 * 8 + lane % 4 * 2 + i % 2)];
      float& d = sums.values[lane][static_cast<size_t>(i)];
      double sum = of.accumulate ? d : 0.0;
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[k]) * b[k];
      d = static_cast<float>(sum);
    }
  }
}

void finish(WarpProducts& state, int warp, const Product& product) {
  const int registers = product.of.n / 2;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < registers; ++i) {
      if (std::memcmp(product.d[lane] + i, &kInFlight, 4) != 0) {
        fail("changes the sums of a product in flight");
      }
    }
    if (product.of.a != nullptr && std::memcmp(product.a[lane], product.a_values[lane], 16) != 0) {
      fail("changes the factors of a product in flight");
    }
  }
  Sums& sums = state.sums[product.d[0]];
  multiply(product, warp, sums);
  for_pieces(product, warp, [&](size_t offset) {
    Granule& granule = *granules_of(block.shared + offset);
    --granule.reading[warp];
    granule.read_time[warp] = now(32 * warp);
  });
  if (--sums.products > 0) return;
  for (int lane = 0; lane < 32; ++lane) {
    std::copy(sums.values[lane].begin(), sums.values[lane].end(), product.d[lane]);
  }
  state.sums.erase(product.d[0]);
}

struct Step {  // what all lanes of a warp do together
  enum { kStart, kFence, kCommit, kWait } what;
  Wgmma product;
  int pending;
  Site site;
};

void take(void** lanes) {
  const Step& step = *static_cast<Step*>(lanes[0]);
  const int warp = block.current->number / 32;
  WarpProducts& state = warps[warp];
  if (step.what == Step::kFence) state.fenced = true;
  if (step.what == Step::kCommit) state.groups.emplace_back();
  if (step.what == Step::kStart) {
    Product product{step.product, step.site, {}, {}, {}};
    for (int lane = 0; lane < 32; ++lane) {
      const Wgmma& mine = static_cast<Step*>(lanes[lane])->product;
      product.d[lane] = mine.d, product.a[lane] = mine.a;
      if (mine.a != nullptr) std::memcpy(product.a_values[lane], mine.a, 16);
      if (mine.a_matrix != step.product.a_matrix || mine.b_matrix != step.product.b_matrix) {
        fail("starts a product with other matrices than another lane");
      }
    }
    start(state, warp, product);
  }
  if (step.what == Step::kWait) {
    while (state.groups.size() > static_cast<size_t>(step.pending) + 1) {
      for (const Product& product : state.groups.front()) finish(state, warp, product);
      state.groups.erase(state.groups.begin());
    }
    state.fenced = false;
    join_warp(warp);
  }
}

void together(Step step) {
  use_async();
  collective(Kind::kWgmma, ~0u, &step, take, step.site);
}

}  // namespace

void wgmma(const Wgmma& product, Site site) { together({Step::kStart, product, 0, site}); }
void wgmma_fence(Site site) { together({Step::kFence, {}, 0, site}); }
void wgmma_commit(Site site) { together({Step::kCommit, {}, 0, site}); }
void wgmma_wait(int pending, Site site) { together({Step::kWait, {}, pending, site}); }

void clear_products() {
  for (WarpProducts& warp : warps) warp = WarpProducts();
  for (auto& log : started) log.clear();
}

void check_products_ended() {
  for (int warp = 0; warp < block.threads / 32; ++warp) {
    for (const auto& group : warps[warp].groups) {
      if (!group.empty()) fail("ends while a product is under way");
    }
    if (warps[warp].started != started[warp / 4].size()) {
      fail("ends with a product that some warps of its group did not start");
    }
  }
}

}  // namespace cuda_host
