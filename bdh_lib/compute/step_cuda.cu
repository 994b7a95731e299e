// One byte through a layer on a CUDA GPU, touching active neurons only (step_cuda.py launches it).
//
// A warp takes G pairs of neurons (`fire`: G neurons) at a time, lists the active ones, and its lanes
// share the rows of these, by 16 bytes. What the warps of a block added up is one of the `parts`; the
// block that is the last to be `done` adds those, always in the same order. W warps a block; T the
// weights' type, Q the synapses', K the bytes that can wait beside them; sums are float32. NaNs are
// passed on.

namespace bdh {

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

// Whether this block, having written its part, is the last of `count`; `done` is 0 before and after.
// One thread's fences are enough: the barriers beside them pass on what it sees.
__device__ bool last(unsigned* done, unsigned count) {
  __syncthreads();
  bool is = false;
  if (!threadIdx.x) {
    __threadfence();
    is = atomicInc(done, count - 1) == count - 1;
    __threadfence();
  }
  return __syncthreads_or(is);
}

// The sum of `count` rows of M numbers that lie `stride` numbers apart, to `sum`. Eight loads are under
// way at once: one after the other they would take longer than all the rest. room: blockDim.x float4.
template <int M>
__device__ void gather(const float* parts, int count, size_t stride, float4* room, float* sum) {
  const int m = threadIdx.x % (M / 4), row = threadIdx.x / (M / 4), rows = blockDim.x / (M / 4);
  float4 all = {};
  for (int first = row; first < count && row < rows; first += 8 * rows) {
    float4 some[8] = {};
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (first + i * rows < count)  // past L1: other blocks wrote them
        some[i] = __ldcg((const float4*)(parts + (first + i * rows) * stride) + m);
#pragma unroll
    for (int i = 0; i < 8; i++)
      all.x += some[i].x, all.y += some[i].y, all.z += some[i].z, all.w += some[i].w;
  }
  room[threadIdx.x] = all;
  __syncthreads();
  for (int i = threadIdx.x; i < M; i += blockDim.x) {
    float one = 0;
    for (int r = 0; r < rows; r++) one += ((float*)room)[r * M + i];
    sum[i] = one;
  }
  __syncthreads();
}

#ifndef ON_CPU  // tests/cuda_on_cpu.h has its own
// Copies 16 bytes to shared memory, as a part of the thread's next group of copies; past L1.
__device__ void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(to)),
               "l"(from)
               : "memory");
}
__device__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most n of the thread's groups are under way.
template <int n> __device__ void wait_groups() { asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory"); }

// c (16, 8) += a (16, 16) b (16, 8), in bfloat16, as PTX's mma.m16n8k16 shares them out to the lanes:
// with g = lane / 4 and i = lane % 4, c[0..1] is row g, columns 2 i and 2 i + 1, c[2..3] row g + 8.
__device__ void multiply_add(float* c, const unsigned* a, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// n numbers as loaded. Their types are left for later: the compiler would take 16-bit numbers apart at
// once, and so wait for them.
template <typename T, int n> struct alignas(n * sizeof(T)) Bits {
  unsigned at[n * sizeof(T) / 4];
  static __device__ Bits of(const T* from) { return *(const Bits*)from; }
  __device__ float operator[](int i) const { return float(((const T*)at)[i]); }
};

// A warp's share of a row of M numbers: 16 bytes for lane, lane + 32, ... of it.
template <typename T, int M> struct Row {
  static constexpr int E = 16 / sizeof(T), F = (M / E + 31) / 32;
  using Piece = Bits<T, E>;
  struct Raw { Piece at[F]; };
  float at[F][E] = {};

  template <typename Do> static __device__ void each(Do action) {
#pragma unroll
    for (int f = 0; f < F; f++) {
      const int m = E * (threadIdx.x % 32 + 32 * f);
      if (m < M) action(f, m);
    }
  }
  static __device__ Raw raw(const T* row) {
    Raw raw;
    each([&](int f, int m) { raw.at[f] = Piece::of(row + m); });
    return raw;
  }
  template <typename U> __device__ void load(const U* row) {
    each([&](int f, int m) {
#pragma unroll
      for (int e = 0; e < E; e++) at[f][e] = float(row[m + e]);
    });
  }
  __device__ float times(const Raw& row) const {  // the lane's own products
    float sum = 0;
    each([&](int f, int m) {
#pragma unroll
      for (int e = 0; e < E; e++) sum += at[f][e] * row.at[f][e];
    });
    return sum;
  }
  __device__ void plus(float q, float r, const Raw& row) {  // r for the second half of the row
    each([&](int f, int m) {
      const float by = m < M / 2 ? q : r;
#pragma unroll
      for (int e = 0; e < E; e++) at[f][e] += by * row.at[f][e];
    });
  }
  // Folded to D numbers, to `sums`.
  template <int D> __device__ void leave(float* sums) const {
#pragma unroll
    for (int half = 0; half < M / D; half++) {
      each([&](int f, int m) {
        if (m / D == half)
#pragma unroll
          for (int e = 0; e < E; e++) sums[m % D + e] = (half ? sums[m % D + e] : 0) + at[f][e];
      });
      __syncwarp();
    }
  }
};

// Writes what the lanes `have` to `list`, in their order, behind `count` others; gives the new count.
template <typename E> __device__ int append(bool have, E entry, E* list, int count) {
  const unsigned all = __ballot_sync(~0u, have);
  if (have) list[count + __popc(all & ((1u << threadIdx.x % 32) - 1))] = entry;
  return count + __popc(all);
}

// Calls use(i, load(i)) for i < count, U loads being under way at once.
template <typename Load, typename Use>
__device__ __forceinline__ void walk(int count, Load load, Use use) {
  constexpr int U = 4;
  decltype(load(0)) ahead[U];
#pragma unroll
  for (int u = 0; u < U; u++)
    if (u < count) ahead[u] = load(u);
  for (int i = 0; i < count; i += U)
#pragma unroll
    for (int u = 0; u < U; u++)
      if (i + u < count) {
        use(i + u, ahead[u]);
        if (i + u + U < count) ahead[u] = load(i + u + U);
      }
}

// Leaves the sum over lanes of value i in value 0 of lane i: each hands on the half it does not keep.
template <int half> __device__ __forceinline__ void share_out(float* values) {
  const bool upper = threadIdx.x & half;
#pragma unroll
  for (int i = 0; i < half; i++) {
    const float other = __shfl_xor_sync(~0u, upper ? values[i] : values[i + half], half);
    values[i] = (upper ? values[i + half] : values[i]) + other;
  }
  if constexpr (half > 1) share_out<half / 2>(values);
}

// x (H, 1, N) = v Dx of one row, not yet rectified; gives the lane's neuron of the 32 from n on.
template <typename T, int D>
__device__ __forceinline__ float excite(const Row<T, D>& v, const T* encoder, int n, int N, T* x) {
  const int lane = threadIdx.x % 32;
  float g[32];
#pragma unroll
  for (int i = 0; i < 32; i++)
    g[i] = v.times(Row<T, D>::raw(encoder + (size_t)min(n + i, N - 1) * D));
  share_out<16>(g);
  if (n + lane < N) x[n + lane] = T(g[0]);
  return float(T(g[0]));
}

template <typename T, int n> struct alignas(n * sizeof(T)) Some { T at[n]; };

// What a warp reads of one active pair.
template <typename Q, typename T, int D> struct Stage {
  using Pair = Row<Q, 2 * D>;
  typename Pair::Piece row[Pair::F][32];
  alignas(16) T key[128];  // of two bytes for a lane
};

// ln(a), (H, B, D), with q = R_t relu(x) and a = q S + sum over s < t of (q . key_s) value_s, where t
// bytes wait. This byte's key and value, q and v, join keys (H, B, N/2, K, 2) and values (B, K, D).
// S (H, rows, N, D) is shared by all rows of the batch if it has one; Q int8: times `scales` (.., N).
// Where no x (H, B, N) is given, it comes from v and encoder (H, N, D), into `excited`. Phases are in
// 2^-32 of a circle: begin + t * increments wraps.
template <bool given, typename T, typename Q, int D, int W, int G, int K>
__device__ void recall(const T* x, T* excited, const float* v, const T* encoder, const Q* S,
                       const float* scales, int rows, T* keys, T* values, const uint32_t* begin,
                       const uint32_t* increments, int t, unsigned* done, int B, int N, float* parts,
                       T* a) {
  static_assert(G <= (given ? 32 : 16), "a lane has one pair, of which excite finds 16");
  constexpr int M = D + K;
  constexpr int U = sizeof(Q) == 1 ? 6 : 2;  // stages: pairs under way, and the one in use
  using Pair = Row<Q, 2 * D>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, hb = blockIdx.y, b = hb % B, h = hb / B;
  __shared__ union { Stage<Q, T, D> stages[W][U]; float sums[W][M]; float4 room[32 * W]; } shared;
  Stage<Q, T, D>* stages = shared.stages[warp];
  __shared__ float4 lists[W][G];  // of active pairs: q, and q times the scales
  __shared__ int pairs[W][G];
  __shared__ float all[M];
  const size_t own = h * rows + (rows > 1 ? b : 0);
  S += own * N * D, scales += own * N, keys += (size_t)hb * N * K, values += (size_t)b * K * D;
  if (!blockIdx.x && !h && threadIdx.x < D) values[t * D + threadIdx.x] = T(v[b * D + threadIdx.x]);
  Row<T, D> value;
  if constexpr (!given) value.load(v + b * D);
  Pair sum;
  float score[2] = {};
  for (int first = (blockIdx.x * W + warp) * G; first < N / 2; first += gridDim.x * W * G) {
    const int pair = min(first + lane, N / 2 - 1);
    float x0, x1;
    if constexpr (given) {
      const auto two = Bits<T, 2>::of(x + (size_t)hb * N + 2 * pair);
      x0 = two[0], x1 = two[1];
    } else {
      const float mine = excite<T, D>(value, encoder + (size_t)h * N * D, 2 * first, N,
                                      excited + (size_t)h * N);
      x0 = __shfl_sync(~0u, mine, 2 * lane % 32), x1 = __shfl_sync(~0u, mine, 2 * lane % 32 + 1);
    }
    if (x0 <= 0) x0 = 0;
    if (x1 <= 0) x1 = 0;
    const bool is = lane < G && first + lane < N / 2 && (x0 != 0 || x1 != 0);
    float4 turned;
    if (is) {
      float sine, cosine;
      sincospif(int(begin[pair] + t * increments[pair]) * 0x1p-31f, &sine, &cosine);
      const float q0 = x0 * cosine - x1 * sine, q1 = x1 * cosine + x0 * sine;
      Bits<float, 2> scale = {};
      if (sizeof(Q) == 1) scale = Bits<float, 2>::of(scales + 2 * pair);
      turned = sizeof(Q) == 1 ? make_float4(q0, q1, q0 * scale[0], q1 * scale[1])
                              : make_float4(q0, q1, q0, q1);
      *(Some<T, 2>*)(keys + ((size_t)pair * K + t) * 2) = {T(q0), T(q1)};
    }
    append(is, pair, pairs[warp], 0);
    const int count = append(is, turned, lists[warp], 0);
    __syncwarp();
    int next = 0, use = 0;  // stages
    auto fetch = [&](int i) {
      if (i < count) {
        const int pair = pairs[warp][i];
        Pair::each([&](int f, int m) {
          copy_async(&stages[next].row[f][lane], S + pair * 2 * D + m);
        });
        if (2 * sizeof(T) * t > 16 * lane) {
          const int k = 16 / sizeof(T) * lane;
          copy_async(stages[next].key + k, keys + pair * K * 2 + k);
        }
      }
      end_group();
      next = next + 1 < U ? next + 1 : 0;
    };
#pragma unroll 1
    for (int i = 0; i < U - 1; i++) fetch(i);
    for (int i = 0; i < count; i++) {
      wait_groups<U - 2>();
      __syncwarp();  // keys come by other lanes; and all have used what the next copies replace
      fetch(i + U - 1);
      const float4 q = lists[warp][i];
      typename Pair::Raw raw;
      Pair::each([&](int f, int) { raw.at[f] = stages[use].row[f][lane]; });
      sum.plus(q.z, q.w, raw);
      if (2 * lane < t) {
        const auto key = Bits<T, 4>::of(stages[use].key + 4 * lane);
#pragma unroll
        for (int s = 0; s < 2; s++) score[s] += q.x * key[2 * s] + q.y * key[2 * s + 1];
      }
      use = use + 1 < U ? use + 1 : 0;
    }
    __syncwarp();  // before the list is written again
  }
  __syncthreads();
  float* sums = shared.sums[warp];
  sum.template leave<D>(sums);
  sums[D + 2 * lane] = score[0], sums[D + 2 * lane + 1] = score[1];
  __syncthreads();
  for (int i = threadIdx.x; i < M; i += blockDim.x) {
    float one = 0;
    for (int w = 0; w < W; w++) one += shared.sums[w][i];
    parts[((size_t)blockIdx.x * gridDim.y + hb) * M + i] = one;
  }
  if (!last(done + hb, gridDim.x)) return;
  gather<M>(parts + (size_t)hb * M, gridDim.x, (size_t)gridDim.y * M, shared.room, all);
  const int d = threadIdx.x % (D / 4), some = blockDim.x / (D / 4);
  float4 waiting = {};
#pragma unroll 8
  for (int s = threadIdx.x / (D / 4); s < t; s += some) {
    const auto four = Bits<T, 4>::of(values + s * D + 4 * d);
    waiting.x += all[D + s] * four[0], waiting.y += all[D + s] * four[1];
    waiting.z += all[D + s] * four[2], waiting.w += all[D + s] * four[3];
  }
  shared.room[threadIdx.x] = waiting;
  __syncthreads();
  float number = all[threadIdx.x % D];
  for (int i = 0; i < some; i++) number += ((float*)shared.room)[i * D + threadIdx.x % D];
  number = ln(number);
  if (threadIdx.x < D) a[(size_t)hb * D + threadIdx.x] = T(number);
}

struct Fires { float y; int neuron; };

// v' = ln(v + ln(o)), in float32 and in T, with o the sum over neurons of y E and y = relu(g) x.
// Where no g (H, B, N) is given, it is a Dy, a (H, B, D). encoder_v and decoder are (H, N, D); of o
// there are P parts a head, (P*H, B, D).
template <bool given, typename T, int D, int W, int G>
__device__ void fire(const T* x, const T* g, const T* a, const float* v, const T* encoder_v,
                     const T* decoder, unsigned* done, int H, int B, int N, float* parts, float* out,
                     T* low) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, hb = blockIdx.y, b = hb % B, h = hb / B;
  __shared__ float4 room[W * (D > 128 ? D : 128) / 4];
  __shared__ Fires lists[W][G];
  __shared__ float all[D];
  Fires* list = lists[warp];
  using Row = Row<T, D>;
  Row recalled, sum;
  if constexpr (!given) recalled.load(a + (size_t)hb * D);
  encoder_v += (size_t)h * N * D, decoder += (size_t)h * N * D, x += (size_t)hb * N;
  if constexpr (given) g += (size_t)hb * N;
  for (int first = (blockIdx.x * W + warp) * G; first < N; first += gridDim.x * W * G) {
    float y[G / 32];
#pragma unroll
    for (int j = 0; j < G / 32; j++) {
      const int n = min(first + lane + 32 * j, N - 1);
      const float open = given ? float(g[n]) : 1;
      y[j] = float(x[n]);
      y[j] = y[j] <= 0 || open <= 0 || first + lane + 32 * j >= N ? 0 : y[j] * open;
    }
    int count = 0;
#pragma unroll
    for (int j = 0; j < G / 32; j++)
      count = append(y[j] != 0, {y[j], first + lane + 32 * j}, list, count);
    __syncwarp();
    if constexpr (!given) {
      walk(count, [&](int i) { return Row::raw(encoder_v + (size_t)list[i].neuron * D); },
           [&](int i, const typename Row::Raw& row) {
             const float open = warp_sum(recalled.times(row));
             if (!lane) list[i].y = open <= 0 ? 0 : list[i].y * open;
           });
      __syncwarp();
      const Fires mine = lane < count ? list[lane] : Fires{0, 0};  // G is 32
      __syncwarp();
      count = append(mine.y != 0, mine, list, 0);
      __syncwarp();
    }
    walk(count, [&](int i) { return Row::raw(decoder + (size_t)list[i].neuron * D); },
         [&](int i, const typename Row::Raw& row) { sum.plus(list[i].y, list[i].y, row); });
    __syncwarp();  // before the list is written again
  }
  sum.template leave<D>((float*)room + warp * D);
  __syncthreads();
  for (int i = threadIdx.x; i < D; i += blockDim.x) {
    float one = 0;
    for (int w = 0; w < W; w++) one += ((float*)room)[w * D + i];
    parts[((size_t)(blockIdx.x * H + h) * B + b) * D + i] = one;
  }
  if (!last(done + b, gridDim.x * H)) return;
  gather<D>(parts + (size_t)b * D, gridDim.x * H, (size_t)B * D, room, all);
  const int d = threadIdx.x % D;
  const float o = ln(all[d]);
  const float after = ln(v[b * D + d] + o);
  if (threadIdx.x < D) out[b * D + d] = after, low[b * D + d] = T(after);
}

// S (H, rows, N, D) with the K bytes that wait in keys and values (as in `recall`) added, to `after`
// (H, B, N, D), and that as int8, `low`, times `scales` (.., N). Without `add`: S as int8.
//
// A warp takes 8 rows, as columns of multiply_add: a lane has numbers own * g to own * g + own - 1 of
// each C, of rows 2 i and 2 i + 1. Number own * g + 2 j + e is row g + 8 e of product j.
template <bool add, int D, int W, int K>
__device__ void fold(const float* S, int rows, const unsigned short* keys,
                     const unsigned short* values, int B, int N, float* after, int8_t* low,
                     float* scales) {
  constexpr int C = D % 32 ? D : 32, own = C / 8, V = own % 4 ? 2 : 4;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, hb = blockIdx.y, b = hb % B, h = hb / B;
  const int g = lane / 4, i = lane % 4;
  alignas(16) __shared__ unsigned value[add ? K / 2 : 1][D + 8];  // of two bytes; 8: no bank twice
  const size_t from = (size_t)(h * rows + (rows > 1 ? b : 0)) * N, to = (size_t)hb * N;
  if constexpr (add) {
    values += (size_t)b * K * D;
    for (int at = threadIdx.x; at < K / 2 * D; at += blockDim.x) {
      const int s = at / D * 2, d = at % D;
      value[s / 2][d] = values[(s + 1) * D + d] << 16 | values[s * D + d];
    }
    __syncthreads();
  }
  for (int first = (blockIdx.x * W + warp) * 8; first < N; first += gridDim.x * W * 8) {
    float sum[D / C][own / 2][4];
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
      for (int q = 0; q < D / C; q++)
#pragma unroll
        for (int m = 0; m < own; m += V) {
          const int n = min(first + 2 * i + r, N - 1);
          const auto some = Bits<float, V>::of(S + (from + n) * D + q * C + own * g + m);
#pragma unroll
          for (int v = 0; v < V; v++) sum[q][(m + v) / 2][v % 2 * 2 + r] = some[v];
        }
    if constexpr (add) {
      const int n = min(first + g, N - 1);
      unsigned key[K / 8];
#pragma unroll
      for (int s = 0; s < K / 8; s++) {
        const auto both = Bits<unsigned short, 4>::of(keys + ((to + n) / 2 * K + 8 * s + 2 * i) * 2);
        key[s] = both.at[1] >> n % 2 * 16 << 16 | (both.at[0] >> n % 2 * 16 & 0xffff);
      }
#pragma unroll
      for (int s = 0; s < K / 8; s += 2)
#pragma unroll
        for (int q = 0; q < D / C; q++)
#pragma unroll
          for (int m = 0; m < own; m += V) {
            const unsigned* at = &value[4 * s + i][q * C + own * g + m];
            const auto one = Bits<unsigned, V>::of(at), two = Bits<unsigned, V>::of(at + 4 * (D + 8));
#pragma unroll
            for (int v = 0; v < V; v += 2) {
              const unsigned four[] = {one.at[v], one.at[v + 1], two.at[v], two.at[v + 1]};
              multiply_add(sum[q][(m + v) / 2], four, key[s], key[s + 1]);
            }
          }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float most = 0, spoilt = 0;
#pragma unroll
      for (int q = 0; q < D / C; q++)
#pragma unroll
        for (int j = 0; j < own / 2; j++)
          for (int e = r; e < 4; e += 2)
            most = fmaxf(most, fabsf(sum[q][j][e])), spoilt += sum[q][j][e] - sum[q][j][e];
      for (int o = 4; o < 32; o *= 2) {
        most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
        spoilt += __shfl_xor_sync(~0u, spoilt, o);  // NaN where a number is not finite
      }
      const int n = first + 2 * i + r;
      if (n >= N) continue;
      const float by = most > 0 ? 127 / most : 0;
      if (!g) scales[to + n] = most / 127 + spoilt;
#pragma unroll
      for (int q = 0; q < D / C; q++)
#pragma unroll
        for (int m = 0; m < own; m += V) {
          const size_t place = (to + n) * D + q * C + own * g + m;
          Some<float, V> whole;
          Some<int8_t, V> shorter;
#pragma unroll
          for (int v = 0; v < V; v++) {
            whole.at[v] = sum[q][(m + v) / 2][v % 2 * 2 + r];
            shorter.at[v] = int8_t(rintf(whole.at[v] * by));
          }
          if constexpr (add) *(decltype(whole)*)(after + place) = whole;
          *(decltype(shorter)*)(low + place) = shorter;
        }
    }
  }
}

}  // namespace bdh
