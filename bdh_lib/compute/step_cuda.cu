// One byte through a layer on a CUDA GPU, touching active neurons only (step_cuda.py launches it).
//
// A warp takes G pairs of neurons (`fire`: G neurons) at a time, lists the active ones, and its lanes
// share the rows of these, by 16 bytes. What the warps of a block added up is one of the `parts`; the
// block that is the last to be `done` adds those, always in the same order. W warps a block; T the
// weights' type, Q the synapses', K the bytes that can wait beside them; sums are float32.

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
__device__ bool is_last_block(unsigned* done, unsigned count) {
  __syncthreads();
  bool is_last = false;
  if (!threadIdx.x) {
    __threadfence();
    is_last = atomicInc(done, count - 1) == count - 1;
    __threadfence();
  }
  return __syncthreads_or(is_last);
}

// The sum of `count` rows of M numbers that lie `stride` numbers apart, to `sum`. Eight loads are under
// way at once: one after the other they would take longer than all the rest. scratch: blockDim.x float4.
template <int M>
__device__ void sum_rows(const float* parts, int count, size_t stride, float4* scratch, float* sum) {
  const int m = threadIdx.x % (M / 4), row = threadIdx.x / (M / 4), rows = blockDim.x / (M / 4);
  float4 total = {};
  for (int first = row; first < count && row < rows; first += 8 * rows) {
    float4 loaded[8] = {};
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (first + i * rows < count)  // past L1: other blocks wrote them
        loaded[i] = __ldcg((const float4*)(parts + (first + i * rows) * stride) + m);
#pragma unroll
    for (int i = 0; i < 8; i++)
      total.x += loaded[i].x, total.y += loaded[i].y, total.z += loaded[i].z, total.w += loaded[i].w;
  }
  scratch[threadIdx.x] = total;
  __syncthreads();
  for (int i = threadIdx.x; i < M; i += blockDim.x) {
    float column = 0;
    for (int r = 0; r < rows; r++) column += ((float*)scratch)[r * M + i];
    sum[i] = column;
  }
  __syncthreads();
}

#ifndef ON_CPU  // tests/compute/cuda_on_cpu.h has its own
// Copies 16 bytes to shared memory, as a part of the thread's next group of copies; past L1.
__device__ void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(to)),
               "l"(from)
               : "memory");
}
__device__ void commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most n of the thread's groups are under way.
template <int n> __device__ void wait_group() { asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory"); }

// c (16, 8) += a (16, 16) b (16, 8), in bfloat16, as PTX's mma.m16n8k16 shares them out to the lanes:
// with g = lane / 4 and i = lane % 4, c[0..1] is row g, columns 2 i and 2 i + 1, c[2..3] row g + 8.
__device__ void mma_16x8x16(float* c, const unsigned* a, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// A warp's share of a row of M numbers: 16 bytes for lane, lane + 32, ... of it.
template <typename T, int M> struct Row {
  static constexpr int E = 16 / sizeof(T), F = (M / E + 31) / 32;
  using Piece = Packed<T, E>;
  struct Raw { Piece pieces[F]; };
  float values[F][E] = {};

  template <typename Function> static __device__ void for_each(Function function) {
#pragma unroll
    for (int f = 0; f < F; f++) {
      const int m = E * (threadIdx.x % 32 + 32 * f);
      if (m < M) function(f, m);
    }
  }
  static __device__ Raw load_raw(const T* row) {
    Raw raw;
    for_each([&](int f, int m) { raw.pieces[f] = Piece::load(row + m); });
    return raw;
  }
  template <typename U> __device__ void load(const U* row) {
    for_each([&](int f, int m) {
#pragma unroll
      for (int e = 0; e < E; e++) values[f][e] = float(row[m + e]);
    });
  }
  __device__ float partial_dot(const Raw& row) const {  // over the lane's share
    float sum = 0;
    for_each([&](int f, int m) {
#pragma unroll
      for (int e = 0; e < E; e++) sum += values[f][e] * row.pieces[f][e];
    });
    return sum;
  }
  __device__ void add_scaled(float even, float odd, const Raw& row) {  // odd: for the second half
    for_each([&](int f, int m) {
      const float scale = m < M / 2 ? even : odd;
#pragma unroll
      for (int e = 0; e < E; e++) values[f][e] += scale * row.pieces[f][e];
    });
  }
  // Folded to D numbers, to `sums`.
  template <int D> __device__ void store_folded(float* sums) const {
#pragma unroll
    for (int half = 0; half < M / D; half++) {
      for_each([&](int f, int m) {
        if (m / D == half)
#pragma unroll
          for (int e = 0; e < E; e++) sums[m % D + e] = (half ? sums[m % D + e] : 0) + values[f][e];
      });
      __syncwarp();
    }
  }
};

// Writes what the lanes `keep` to `list`, in their order, behind `count` others; gives the new count.
template <typename E> __device__ int append_kept(bool keep, E entry, E* list, int count) {
  const unsigned mask = __ballot_sync(~0u, keep);
  if (keep) list[count + __popc(mask & ((1u << threadIdx.x % 32) - 1))] = entry;
  return count + __popc(mask);
}

// Calls use(i, load(i)) for i < count, U loads being under way at once.
template <typename Load, typename Use>
__device__ __forceinline__ void for_each_prefetched(int count, Load load, Use use) {
  constexpr int U = 4;
  decltype(load(0)) prefetched[U];
#pragma unroll
  for (int u = 0; u < U; u++)
    if (u < count) prefetched[u] = load(u);
  for (int i = 0; i < count; i += U)
#pragma unroll
    for (int u = 0; u < U; u++)
      if (i + u < count) {
        use(i + u, prefetched[u]);
        if (i + u + U < count) prefetched[u] = load(i + u + U);
      }
}

// Leaves the sum over lanes of value i in value 0 of lane i: each hands on the half it does not keep.
template <int half> __device__ __forceinline__ void reduce_scatter(float* values) {
  const bool upper = threadIdx.x & half;
#pragma unroll
  for (int i = 0; i < half; i++) {
    const float partner = __shfl_xor_sync(~0u, upper ? values[i] : values[i + half], half);
    values[i] = (upper ? values[i + half] : values[i]) + partner;
  }
  if constexpr (half > 1) reduce_scatter<half / 2>(values);
}

// x (H, 1, N) = v Dx of one row, not yet rectified; gives the lane's neuron of the 32 from n on.
template <typename T, int D>
__device__ __forceinline__ float project(const Row<T, D>& v, const T* encoder, int n, int N, T* x) {
  const int lane = threadIdx.x % 32;
  float dot[32];
#pragma unroll
  for (int i = 0; i < 32; i++)
    dot[i] = v.partial_dot(Row<T, D>::load_raw(encoder + (size_t)min(n + i, N - 1) * D));
  reduce_scatter<16>(dot);
  if (n + lane < N) x[n + lane] = T(dot[0]);
  return float(T(dot[0]));
}

// What a warp reads of one active pair.
template <typename Q, typename T, int D> struct Stage {
  using Pair = Row<Q, 2 * D>;
  typename Pair::Piece row[Pair::F][32];
  alignas(16) T key[128];  // of two bytes for a lane
};

// ln(a), (H, B, D), with q = R_t relu(x) and a = q S + sum over s < t of (q . key_s) value_s, where t
// bytes are buffered. This byte's key and value, q and v, join keys (H, B, N/2, K, 2) and values
// (B, K, D). S (H, rows, N, D) is shared by all rows of the batch if it has one; Q int8: times `scales`
// (.., N). Without x (H, B, N), it comes from v and encoder (H, N, D), into `x_out`.
template <bool has_x, typename T, typename Q, int D, int W, int G, int K>
__device__ void recall(const T* x, T* x_out, const float* v, const T* encoder, const Q* S,
                       const float* scales, int rows, T* keys, T* values, const uint32_t* begin,
                       const uint32_t* increments, int t, unsigned* done, int B, int N, float* parts,
                       T* a) {
  static_assert(G <= (has_x ? 32 : 16), "a lane has one pair, of which project finds 16");
  constexpr int M = D + K;
  constexpr int STAGES = sizeof(Q) == 1 ? 6 : 2;  // pairs under way, and the one in use
  using Pair = Row<Q, 2 * D>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, hb = blockIdx.y, b = hb % B, h = hb / B;
  __shared__ union { Stage<Q, T, D> stages[W][STAGES]; float sums[W][M]; float4 scratch[32 * W]; } shared;
  Stage<Q, T, D>* stages = shared.stages[warp];
  __shared__ float4 queries[W][G];  // of active pairs: q, and q times the scales
  __shared__ int pairs[W][G];
  __shared__ float reduced[M];
  const size_t S_row = h * rows + (rows > 1 ? b : 0);
  S += S_row * N * D, scales += S_row * N, keys += (size_t)hb * N * K, values += (size_t)b * K * D;
  if (!blockIdx.x && !h && threadIdx.x < D) values[t * D + threadIdx.x] = T(v[b * D + threadIdx.x]);
  Row<T, D> value;
  if constexpr (!has_x) value.load(v + b * D);
  Pair sum;
  float score[2] = {};
  for (int first = (blockIdx.x * W + warp) * G; first < N / 2; first += gridDim.x * W * G) {
    const int pair = min(first + lane, N / 2 - 1);
    float even, odd;
    if constexpr (has_x) {
      const auto x_pair = Packed<T, 2>::load(x + (size_t)hb * N + 2 * pair);
      even = x_pair[0], odd = x_pair[1];
    } else {
      const float own_x = project<T, D>(value, encoder + (size_t)h * N * D, 2 * first, N,
                                        x_out + (size_t)h * N);
      even = __shfl_sync(~0u, own_x, 2 * lane % 32), odd = __shfl_sync(~0u, own_x, 2 * lane % 32 + 1);
    }
    even = relu(even), odd = relu(odd);
    const bool active = lane < G && first + lane < N / 2 && (even != 0 || odd != 0);
    float4 query;
    if (active) {
      float sine, cosine;
      sincos_phase(begin[pair] + t * increments[pair], &sine, &cosine);
      const float q0 = even * cosine - odd * sine, q1 = odd * cosine + even * sine;
      Packed<float, 2> scale = {};
      if (sizeof(Q) == 1) scale = Packed<float, 2>::load(scales + 2 * pair);
      query = sizeof(Q) == 1 ? make_float4(q0, q1, q0 * scale[0], q1 * scale[1])
                             : make_float4(q0, q1, q0, q1);
      Packed<T, 2> key;
      key.set(0, q0), key.set(1, q1), key.store(keys + ((size_t)pair * K + t) * 2);
    }
    append_kept(active, pair, pairs[warp], 0);
    const int count = append_kept(active, query, queries[warp], 0);
    __syncwarp();
    int fetch_stage = 0, use_stage = 0;
    auto fetch = [&](int i) {
      if (i < count) {
        const int pair = pairs[warp][i];
        Pair::for_each([&](int f, int m) {
          copy_async(&stages[fetch_stage].row[f][lane], S + pair * 2 * D + m);
        });
        if (2 * sizeof(T) * t > 16 * lane) {
          const int k = 16 / sizeof(T) * lane;
          copy_async(stages[fetch_stage].key + k, keys + pair * K * 2 + k);
        }
      }
      commit_group();
      fetch_stage = fetch_stage + 1 < STAGES ? fetch_stage + 1 : 0;
    };
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; i++) fetch(i);
    for (int i = 0; i < count; i++) {
      wait_group<STAGES - 2>();
      __syncwarp();  // keys come by other lanes; and all have used what the next copies replace
      fetch(i + STAGES - 1);
      const float4 q = queries[warp][i];
      typename Pair::Raw raw;
      Pair::for_each([&](int f, int) { raw.pieces[f] = stages[use_stage].row[f][lane]; });
      sum.add_scaled(q.z, q.w, raw);
      if (2 * lane < t) {
        const auto key = Packed<T, 4>::load(stages[use_stage].key + 4 * lane);
#pragma unroll
        for (int s = 0; s < 2; s++) score[s] += q.x * key[2 * s] + q.y * key[2 * s + 1];
      }
      use_stage = use_stage + 1 < STAGES ? use_stage + 1 : 0;
    }
    __syncwarp();  // before the list is written again
  }
  __syncthreads();
  float* sums = shared.sums[warp];
  sum.template store_folded<D>(sums);
  sums[D + 2 * lane] = score[0], sums[D + 2 * lane + 1] = score[1];
  __syncthreads();
  for (int i = threadIdx.x; i < M; i += blockDim.x) {
    float total = 0;
    for (int w = 0; w < W; w++) total += shared.sums[w][i];
    parts[((size_t)blockIdx.x * gridDim.y + hb) * M + i] = total;
  }
  if (!is_last_block(done + hb, gridDim.x)) return;
  sum_rows<M>(parts + (size_t)hb * M, gridDim.x, (size_t)gridDim.y * M, shared.scratch, reduced);
  const int d = threadIdx.x % (D / 4), groups = blockDim.x / (D / 4);
  float4 buffered = {};
#pragma unroll 8
  for (int s = threadIdx.x / (D / 4); s < t; s += groups) {
    const auto value4 = Packed<T, 4>::load(values + s * D + 4 * d);
    buffered.x += reduced[D + s] * value4[0], buffered.y += reduced[D + s] * value4[1];
    buffered.z += reduced[D + s] * value4[2], buffered.w += reduced[D + s] * value4[3];
  }
  shared.scratch[threadIdx.x] = buffered;
  __syncthreads();
  float result = reduced[threadIdx.x % D];
  for (int i = 0; i < groups; i++) result += ((float*)shared.scratch)[i * D + threadIdx.x % D];
  result = ln(result);
  if (threadIdx.x < D) a[(size_t)hb * D + threadIdx.x] = T(result);
}

struct Activation { float y; int neuron; };

// v' = ln(v + ln(o)), in float32 and in T, with o the sum over neurons of y E and y = relu(g) x.
// Without g (H, B, N), it is a Dy, a (H, B, D). encoder_v and decoder are (H, N, D); of o
// there are P parts a head, (P*H, B, D).
template <bool has_g, typename T, int D, int W, int G>
__device__ void fire(const T* x, const T* g, const T* a, const float* v, const T* encoder_v,
                     const T* decoder, unsigned* done, int H, int B, int N, float* parts, float* v_out,
                     T* v_cast) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, hb = blockIdx.y, b = hb % B, h = hb / B;
  __shared__ float4 scratch[W * (D > 128 ? D : 128) / 4];
  __shared__ Activation lists[W][G];
  __shared__ float total[D];
  Activation* list = lists[warp];
  using Row = Row<T, D>;
  Row recalled, sum;
  if constexpr (!has_g) recalled.load(a + (size_t)hb * D);
  encoder_v += (size_t)h * N * D, decoder += (size_t)h * N * D, x += (size_t)hb * N;
  if constexpr (has_g) g += (size_t)hb * N;
  for (int first = (blockIdx.x * W + warp) * G; first < N; first += gridDim.x * W * G) {
    float y[G / 32];
#pragma unroll
    for (int j = 0; j < G / 32; j++) {
      const int n = min(first + lane + 32 * j, N - 1);
      const float gate = has_g ? float(g[n]) : 1;
      y[j] = float(x[n]);
      y[j] = y[j] <= 0 || gate <= 0 || first + lane + 32 * j >= N ? 0 : y[j] * gate;
    }
    int count = 0;
#pragma unroll
    for (int j = 0; j < G / 32; j++)
      count = append_kept(y[j] != 0, {y[j], first + lane + 32 * j}, list, count);
    __syncwarp();
    if constexpr (!has_g) {
      for_each_prefetched(
          count, [&](int i) { return Row::load_raw(encoder_v + (size_t)list[i].neuron * D); },
          [&](int i, const typename Row::Raw& row) {
            const float gate = warp_sum(recalled.partial_dot(row));
            if (!lane) list[i].y = gate <= 0 ? 0 : list[i].y * gate;
          });
      __syncwarp();
      const Activation activation = lane < count ? list[lane] : Activation{0, 0};  // G is 32
      __syncwarp();
      count = append_kept(activation.y != 0, activation, list, 0);
      __syncwarp();
    }
    for_each_prefetched(count, [&](int i) { return Row::load_raw(decoder + (size_t)list[i].neuron * D); },
        [&](int i, const typename Row::Raw& row) { sum.add_scaled(list[i].y, list[i].y, row); });
    __syncwarp();  // before the list is written again
  }
  sum.template store_folded<D>((float*)scratch + warp * D);
  __syncthreads();
  for (int i = threadIdx.x; i < D; i += blockDim.x) {
    float column = 0;
    for (int w = 0; w < W; w++) column += ((float*)scratch)[w * D + i];
    parts[((size_t)(blockIdx.x * H + h) * B + b) * D + i] = column;
  }
  if (!is_last_block(done + b, gridDim.x * H)) return;
  sum_rows<D>(parts + (size_t)b * D, gridDim.x * H, (size_t)B * D, scratch, total);
  const int d = threadIdx.x % D;
  const float o = ln(total[d]);
  const float v_next = ln(v[b * D + d] + o);
  if (threadIdx.x < D) v_out[b * D + d] = v_next, v_cast[b * D + d] = T(v_next);
}

// `S_sum` (H, B, N, D): S (H, rows, N, D) with the K buffered bytes of keys and values (as in `recall`)
// added; `S_int8`, times `scales` (.., N): S_sum as int8. Without `add`: S as int8.
//
// A warp takes 8 rows, as columns of mma_16x8x16: a lane has numbers E * g to E * g + E - 1 of each C, of
// rows 2 i and 2 i + 1. Number E * g + 2 j + e is row g + 8 e of product j.
template <bool add, int D, int W, int K>
__device__ void fold(const float* S, int rows, const unsigned short* keys,
                     const unsigned short* values, int B, int N, float* S_sum, int8_t* S_int8,
                     float* scales) {
  constexpr int C = D % 32 ? D : 32, E = C / 8, V = E % 4 ? 2 : 4;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, hb = blockIdx.y, b = hb % B, h = hb / B;
  const int g = lane / 4, i = lane % 4;
  alignas(16) __shared__ unsigned value_pairs[add ? K / 2 : 1][D + 8];  // of two bytes; 8: no bank twice
  const size_t input_row = (size_t)(h * rows + (rows > 1 ? b : 0)) * N, output_row = (size_t)hb * N;
  if constexpr (add) {
    values += (size_t)b * K * D;
    for (int index = threadIdx.x; index < K / 2 * D; index += blockDim.x) {
      const int s = index / D * 2, d = index % D;
      value_pairs[s / 2][d] = values[(s + 1) * D + d] << 16 | values[s * D + d];
    }
    __syncthreads();
  }
  for (int first = (blockIdx.x * W + warp) * 8; first < N; first += gridDim.x * W * 8) {
    float sum[D / C][E / 2][4];
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
      for (int q = 0; q < D / C; q++)
#pragma unroll
        for (int m = 0; m < E; m += V) {
          const int n = min(first + 2 * i + r, N - 1);
          const auto loaded = Packed<float, V>::load(S + (input_row + n) * D + q * C + E * g + m);
#pragma unroll
          for (int v = 0; v < V; v++) sum[q][(m + v) / 2][v % 2 * 2 + r] = loaded[v];
        }
    if constexpr (add) {
      const int n = min(first + g, N - 1);
      unsigned key[K / 8];
#pragma unroll
      for (int s = 0; s < K / 8; s++) {
        const size_t index = ((output_row + n) / 2 * K + 8 * s + 2 * i) * 2;
        const auto two = Packed<unsigned short, 4>::load(keys + index);
        key[s] = two.words[1] >> n % 2 * 16 << 16 | (two.words[0] >> n % 2 * 16 & 0xffff);
      }
#pragma unroll
      for (int s = 0; s < K / 8; s += 2)
#pragma unroll
        for (int q = 0; q < D / C; q++)
#pragma unroll
          for (int m = 0; m < E; m += V) {
            const unsigned* from = &value_pairs[4 * s + i][q * C + E * g + m];
            const auto low = Packed<unsigned, V>::load(from);
            const auto high = Packed<unsigned, V>::load(from + 4 * (D + 8));
#pragma unroll
            for (int v = 0; v < V; v += 2) {
              const unsigned a[] = {low.words[v], low.words[v + 1], high.words[v], high.words[v + 1]};
              mma_16x8x16(sum[q][(m + v) / 2], a, key[s], key[s + 1]);
            }
          }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float max_abs = 0, nonfinite = 0;
#pragma unroll
      for (int q = 0; q < D / C; q++)
#pragma unroll
        for (int j = 0; j < E / 2; j++)
          for (int e = r; e < 4; e += 2)
            max_abs = fmaxf(max_abs, fabsf(sum[q][j][e])), nonfinite += sum[q][j][e] - sum[q][j][e];
      for (int o = 4; o < 32; o *= 2) {
        max_abs = fmaxf(max_abs, __shfl_xor_sync(~0u, max_abs, o));
        nonfinite += __shfl_xor_sync(~0u, nonfinite, o);  // NaN where a number is not finite
      }
      const int n = first + 2 * i + r;
      if (n >= N) continue;
      const float inverse_scale = max_abs > 0 ? 127 / max_abs : 0;
      if (!g) scales[output_row + n] = max_abs / 127 + nonfinite;
#pragma unroll
      for (int q = 0; q < D / C; q++)
#pragma unroll
        for (int m = 0; m < E; m += V) {
          const size_t index = (output_row + n) * D + q * C + E * g + m;
          Packed<float, V> exact;
          struct alignas(V) { int8_t at[V]; } rounded;
#pragma unroll
          for (int v = 0; v < V; v++) {
            exact.set(v, sum[q][(m + v) / 2][v % 2 * 2 + r]);
            rounded.at[v] = int8_t(rintf(exact[v] * inverse_scale));
          }
          if constexpr (add) exact.store(S_sum + index);
          *(decltype(rounded)*)(S_int8 + index) = rounded;
        }
    }
  }
}

}  // namespace bdh
