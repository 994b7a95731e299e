// Enough of CUDA to run its kernels on a CPU: a block's threads are fibers that take turns, one
// switching to the next wherever it must wait for others. Blocks run one after the other.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define ON_CPU
#define __device__
#define __forceinline__ inline
#define __shared__ static
using std::min;

struct Dim { unsigned x = 1, y = 1; };
struct alignas(16) float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct bfloat16 {  // rounds to nearest even, as __nv_bfloat16 does
  uint16_t bits;
  bfloat16() = default;
  explicit bfloat16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    bits = f != f ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
  }
  explicit operator float() const {
    uint32_t u = uint32_t(bits) << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
  }
};

Dim gridDim, blockDim, blockIdx, threadIdx;

struct Meeting { unsigned arrived = 0, over = 0; };
struct Fiber { ucontext_t at; std::vector<char> stack; bool done; };
std::vector<Fiber> fibers;
std::vector<Meeting> warps;
Meeting block;
ucontext_t scheduler;
float shuffled[32][32];
bool votes[32][32];
int any;

// Until `size` threads have come to `where`.
inline void meet(Meeting& where, unsigned size) {
  const unsigned before = where.over;
  if (++where.arrived == size) where.arrived = 0, where.over++;
  while (where.over == before) swapcontext(&fibers[threadIdx.x].at, &scheduler);
}
inline void meet_warp() { meet(warps[threadIdx.x / 32], 32); }

inline float __shfl_sync(unsigned, float value, int lane) {
  auto& of = shuffled[threadIdx.x / 32];
  of[threadIdx.x % 32] = value;
  meet_warp();
  value = of[lane & 31];
  meet_warp();
  return value;
}
inline float __shfl_xor_sync(unsigned all, float value, int with) {
  return __shfl_sync(all, value, int(threadIdx.x % 32) ^ with);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  auto& of = votes[threadIdx.x / 32];
  of[threadIdx.x % 32] = vote;
  meet_warp();
  unsigned mask = 0;
  for (int i = 0; i < 32; i++) mask |= unsigned(of[i]) << i;
  meet_warp();
  return mask;
}
inline void __syncthreads() { meet(block, blockDim.x); }
inline int __syncthreads_or(int value) {
  any |= value;
  __syncthreads();
  const int result = any;
  __syncthreads();
  any = 0;
  return result;
}
inline void __syncwarp() { meet_warp(); }
inline void __threadfence() {}
inline unsigned atomicInc(unsigned* at, unsigned most) {
  const unsigned old = *at;
  *at = old >= most ? 0 : old + 1;
  return old;
}
template <typename T> T __ldcg(const T* at) { return *at; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint64_t(a) * b >> 32; }
inline uint32_t __float_as_uint(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline void sincospif(float x, float* sine, float* cosine) {
  *sine = std::sin(M_PI * x), *cosine = std::cos(M_PI * x);
}

// Copies to shared memory happen as late as they may, when their group is waited for, or at once.
extern "C" { bool at_once; }
struct Copy { void* to; const void* from; };
std::vector<std::vector<Copy>> groups[1024];
inline void copy_async(void* to, const void* from) {
  if (at_once) memcpy(to, from, 16);
  auto& own = groups[threadIdx.x];
  if (own.empty()) own.emplace_back();
  own.back().push_back({to, from});
}
inline void commit_group() {
  auto& own = groups[threadIdx.x];
  if (own.empty()) own.emplace_back();
  own.emplace_back();
}
template <int n> void wait_group() {
  auto& own = groups[threadIdx.x];
  while (own.size() > n + 1) {  // the last is not ended
    for (auto& copy : own.front())
      if (!at_once) memcpy(copy.to, copy.from, 16);
    own.erase(own.begin());
  }
}

struct Operands { unsigned a[4], b[2]; } operands[32][32];
inline float part(unsigned bits, int which) {
  bfloat16 one;
  one.bits = uint16_t(bits >> 16 * which);
  return float(one);
}
inline void mma_16x8x16(float* c, const unsigned* a, unsigned b0, unsigned b1) {
  auto& of = operands[threadIdx.x / 32];
  const int lane = threadIdx.x % 32, g = lane / 4, i = lane % 4;
  of[lane] = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  meet_warp();
  for (int e = 0; e < 4; e++)
    for (int k = 0; k < 16; k++) {  // a: of row and k, b: of k and column
      const unsigned left = of[g * 4 + k % 8 / 2].a[e / 2 + k / 8 * 2];
      const unsigned right = of[(2 * i + e % 2) * 4 + k % 8 / 2].b[k / 8];
      c[e] += part(left, k % 2) * part(right, k % 2);
    }
  meet_warp();
}

std::function<void()> kernel;
inline void run_one() {
  kernel();
  fibers[threadIdx.x].done = true;
  swapcontext(&fibers[threadIdx.x].at, &scheduler);
}

inline void launch(Dim grid, unsigned threads, std::function<void()> body) {
  kernel = body, gridDim = grid, blockDim.x = threads;
  fibers.resize(threads);
  for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
    for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++) {
      warps.assign(threads / 32, {}), block = {}, any = 0;
      for (auto& own : groups) own.clear();
      for (auto& fiber : fibers) {
        fiber.stack.resize(64 << 10), fiber.done = false;
        getcontext(&fiber.at);
        fiber.at.uc_stack.ss_sp = fiber.stack.data(), fiber.at.uc_stack.ss_size = fiber.stack.size();
        makecontext(&fiber.at, run_one, 0);
      }
      int rounds = 0;
      for (bool going = true; going;) {
        going = false;
        if (++rounds > 1 << 20) abort();  // some threads wait for others that have ended
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++)
          if (!fibers[threadIdx.x].done)
            going = true, swapcontext(&scheduler, &fibers[threadIdx.x].at);
      }
    }
}
