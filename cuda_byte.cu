// One byte through a layer on a CUDA GPU, touching active neurons only (cuda_byte.py launches it).
//
// A warp takes G pairs of neurons (`fire`: G neurons) at a time and its lanes share their rows, of D
// numbers; what the warps of a block added up is one of the `parts`, which are added always in the
// same order. W warps a block, T the weights' type; sums and synapses are float32. NaNs are passed on.

namespace bdh {

template <typename T> struct alignas(4 * sizeof(T)) Four { T at[4]; };

template <typename T> __device__ float4 four(const T* from) {
  auto r = *(const Four<T>*)from;
  return make_float4(float(r.at[0]), float(r.at[1]), float(r.at[2]), float(r.at[3]));
}

__device__ float dot(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }

__device__ void add(float4& sum, float q, float4 r) {
  sum.x += q * r.x, sum.y += q * r.y, sum.z += q * r.z, sum.w += q * r.w;
}

__device__ float warp_sum(float value) {
  for (int i = 16; i; i /= 2) value += __shfl_xor_sync(~0u, value, i);
  return value;
}

__device__ float block_mean(float value) {
  __shared__ float sums[32];
  value = warp_sum(value);
  __syncthreads();  // the last mean has been read
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < blockDim.x / 32; i++) sum += sums[i];
  return sum / blockDim.x;
}

// Of a row whose number threadIdx.x % D each thread holds.
__device__ float ln(float value) {
  value -= block_mean(value);
  return value * rsqrtf(block_mean(value * value) + 1e-5f);
}

// Number threadIdx.x % D of the sum of `count` rows that lie `stride` numbers apart. Eight loads are
// under way at once: one after the other they would take longer than all the rest.
template <int D> __device__ float gather(const float* parts, int count, size_t stride) {
  __shared__ float4 room[512];  // of as many threads
  const int d = threadIdx.x % (D / 4), row = threadIdx.x / (D / 4), rows = blockDim.x / (D / 4);
  float4 sum = {};
  for (int first = row; first < count; first += 8 * rows) {
    float4 some[8] = {};
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (first + i * rows < count)  // past L1: other blocks wrote them
        some[i] = __ldcg((const float4*)(parts + (first + i * rows) * stride) + d);
#pragma unroll
    for (int i = 0; i < 8; i++) add(sum, 1, some[i]);
  }
  room[threadIdx.x] = sum;
  __syncthreads();
  float all = 0;
  for (int r = 0; r < rows; r++) all += ((float*)room)[r * D + threadIdx.x % D];
  return all;
}

// A warp's share of a row: float4s lane, lane + 32, ... of it.
template <int D> struct Row {
  static constexpr int F = (D + 127) / 128;
  float4 at[F] = {};

  template <typename Do> static __device__ void each(Do action) {
#pragma unroll
    for (int f = 0; f < F; f++) {
      int d = 4 * (threadIdx.x % 32 + 32 * f);
      if (d < D) action(f, d);
    }
  }
  template <typename T> __device__ void load(const T* row) {
    each([&](int f, int d) { at[f] = four(row + d); });
  }
  template <typename T> __device__ float times(const T* row) const {  // the lane's own products
    float sum = 0;
    each([&](int f, int d) { sum += dot(at[f], four(row + d)); });
    return sum;
  }
  template <typename T> __device__ void plus(float q, const T* row) {
    each([&](int f, int d) { add(at[f], q, four(row + d)); });
  }
  // The sum of the warps' rows, to `part`.
  template <int W> __device__ void leave(float* part) const {
    __shared__ float4 room[W * D / 4];
    each([&](int f, int d) { room[(threadIdx.x / 32 * D + d) / 4] = at[f]; });
    __syncthreads();
    if (threadIdx.x >= D) return;
    float sum = 0;
    for (int w = 0; w < W; w++) sum += ((float*)room)[w * D + threadIdx.x];
    part[threadIdx.x] = sum;
  }
};

// x (H, 1, N) = v Dx of one row, not yet rectified; gives the lane's neuron of the 2 G from n on.
template <typename T, int D, int G>
__device__ float excite(const Row<D>& v, const T* encoder, int n, int N, T* x) {
  const int lane = threadIdx.x % 32;
  float mine = 0, g[2 * G];
#pragma unroll
  for (int i = 0; i < 2 * G; i++) g[i] = v.times(encoder + (size_t)min(n + i, N - 1) * D);
#pragma unroll
  for (int i = 0; i < 2 * G; i++) {
    const float sum = warp_sum(g[i]);
    if (lane == i) mine = sum;
  }
  if (lane < 2 * G && n + lane < N) x[n + lane] = T(mine);
  return float(T(mine));
}

// a = q S and S += q v^T with q = R_t relu(x): parts (P, H*B, D) of a. Where no x (H, B, N) is given,
// it comes from v and encoder (H, N, D), into `excited`. turns are in 2^-32 of one: t * turns wraps.
template <typename T, int D, int W, int G>
__device__ void recall(const T* x, T* excited, const float* v, const T* encoder, float* S,
                       const uint32_t* turns, uint32_t t, int B, int N, float* parts) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, hb = blockIdx.y, b = hb % B, h = hb / B;
  Row<D> value, sum;
  value.load(v + b * D);
  for (int pair = (blockIdx.x * W + warp) * G; pair < N / 2; pair += gridDim.x * W * G) {
    const int n = 2 * pair;
    float mine = 0;
    if (!x)
      mine = excite<T, D, G>(value, encoder + (size_t)h * N * D, n, N, excited + (size_t)h * N);
    else if (lane < 2 * G && n + lane < N)
      mine = float(x[(size_t)hb * N + n + lane]);
    if (mine <= 0) mine = 0;
    float x0 = __shfl_sync(~0u, mine, 2 * lane % 32), x1 = __shfl_sync(~0u, mine, 2 * lane % 32 + 1);
    const bool own = lane < G && pair + lane < N / 2;
    float sine = 0, cosine = 0;
    if (own) sincospif(int(t * turns[pair + lane]) * 0x1p-31f, &sine, &cosine);
    const float q0 = x0 * cosine - x1 * sine, q1 = x1 * cosine + x0 * sine;
    unsigned active = __ballot_sync(~0u, own && (q0 != 0 || q1 != 0));
    for (; active; active &= active - 1) {
      const int i = __ffs(active) - 1;
      const float q = __shfl_sync(~0u, q0, i), r = __shfl_sync(~0u, q1, i);
      float* row = S + ((size_t)hb * N + n + 2 * i) * D;
      Row<D>::each([&](int f, int d) {
        float4 one = four(row + d), two = four(row + D + d);
        add(sum.at[f], q, one), add(sum.at[f], r, two);
        add(one, q, value.at[f]), add(two, r, value.at[f]);
        *(float4*)(row + d) = one, *(float4*)(row + D + d) = two;
      });
    }
  }
  sum.template leave<W>(parts + ((size_t)blockIdx.x * gridDim.y + hb) * D);
}

// v' = ln(v + ln(o)), in float32 and in T, with o the sum over neurons of y E, y = relu(ln(a) Dy) x.
// Of a there are `count` parts, of o (P*H, B, D) P a head; encoder_v and decoder (H, N, D). The block
// that is a row's last to be `done` adds up its parts; done (B..) is 0 before and after.
template <typename T, int D, int W, int G>
__device__ void fire(const T* x, const float* a, int count, const float* v, const T* encoder_v,
                     const T* decoder, unsigned* done, int H, int B, int N, float* parts,
                     float* out, T* low) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, hb = blockIdx.y, b = hb % B, h = hb / B;
  __shared__ float4 room[D / 4];
  float* all = (float*)room;
  const float number = ln(gather<D>(a + (size_t)hb * D, count, (size_t)H * B * D));
  if (threadIdx.x < D) all[threadIdx.x] = number;
  __syncthreads();
  Row<D> recalled, sum;
  recalled.load(all);
  for (int n = (blockIdx.x * W + warp) * G; n < N; n += gridDim.x * W * G) {
    const float mine = lane < G && n + lane < N ? float(x[(size_t)hb * N + n + lane]) : 0;
    unsigned active = __ballot_sync(~0u, !(mine <= 0));
    for (; active; active &= active - 1) {
      const int i = __ffs(active) - 1;
      const size_t row = ((size_t)h * N + n + i) * D;
      const float y = warp_sum(recalled.times(encoder_v + row)) * __shfl_sync(~0u, mine, i);
      if (!(y <= 0)) sum.plus(y, decoder + row);
    }
  }
  sum.template leave<W>(parts + ((size_t)(blockIdx.x * H + h) * B + b) * D);
  __threadfence();
  __syncthreads();  // the block has written its part
  const unsigned last = gridDim.x * H - 1;
  if (!__syncthreads_or(threadIdx.x == 0 && atomicInc(done + b, last) == last)) return;
  __threadfence();
  const float o = ln(gather<D>(parts + (size_t)b * D, last + 1, (size_t)B * D));
  const float after = ln(v[b * D + threadIdx.x % D] + o);
  if (threadIdx.x < D) out[b * D + threadIdx.x] = after, low[b * D + threadIdx.x] = T(after);
}

}  // namespace bdh
