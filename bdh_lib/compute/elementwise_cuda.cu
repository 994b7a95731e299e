// A layer's elementwise operations on activations on a CUDA GPU, each array read or written once.
// elementwise_cuda.py launches them. A thread takes V neurons, which it loads and stores at once: T of
// 16 bits, 8 of them, are 16 bytes.

namespace bdh {

// Calls use(i, load(i)) for i < count, in batches of four loads that are under way at once.
template <typename Load, typename Use>
__device__ __forceinline__ void for_each_batched(int count, Load load, Use use) {
  constexpr int U = 4;
  for (int first = 0; first < count; first += U) {
    decltype(load(0)) batch[U];
#pragma unroll
    for (int u = 0; u < U; u++)
      if (first + u < count) batch[u] = load(first + u);
#pragma unroll
    for (int u = 0; u < U; u++)
      if (first + u < count) use(first + u, batch[u]);
  }
}

// A thread's position t, the first n of its V neurons, and the V/2 angles that all rows share.
template <int V> struct Rope {
  int t, n;
  float sine[V / 2], cosine[V / 2];

  __device__ Rope(const uint32_t* begin, const uint32_t* increments, int length, int N) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    t = i / (N / V), n = i % (N / V) * V;
    if (t >= length) return;
#pragma unroll
    for (int p = 0; p < V / 2; p++)
      sincos_phase(begin[n / 2 + p] + t * increments[n / 2 + p], sine + p, cosine + p);
  }
};

// q = R_t relu(h): h and q (rows, length, N), a row for each head and sequence; phases (N/2,).
template <typename T, int V>
__device__ void encode(const T* h, const uint32_t* begin, const uint32_t* increments, int rows,
                       int length, int N, T* q) {
  const Rope<V> rope(begin, increments, length, N);
  if (rope.t >= length) return;
  auto index = [&](int row) { return ((size_t)row * length + rope.t) * N + rope.n; };
  for_each_batched(
      rows, [&](int row) { return Packed<T, V>::load(h + index(row)); },
      [&](int row, const Packed<T, V>& h) {
        Packed<T, V> rotated;
#pragma unroll
        for (int p = 0; p < V / 2; p++) {
          const float even = relu(h[2 * p]), odd = relu(h[2 * p + 1]);
          rotated.set(2 * p, even * rope.cosine[p] - odd * rope.sine[p]);
          rotated.set(2 * p + 1, odd * rope.cosine[p] + even * rope.sine[p]);
        }
        rotated.store(q + index(row));
      });
}

// 128 random bits for each counter and key: Philox4x32-10 of Salmon et al., 2011.
struct Random {
  uint32_t words[4];

  __device__ Random(uint32_t counter, const uint32_t* key) : words{counter, 0, key[2], key[3]} {
    uint32_t k0 = key[0], k1 = key[1];
#pragma unroll
    for (int round = 0; round < 10; round++) {
      const uint32_t high0 = __umulhi(0xD2511F53, words[0]), low0 = 0xD2511F53 * words[0];
      const uint32_t high1 = __umulhi(0xCD9E8D57, words[2]), low1 = 0xCD9E8D57 * words[2];
      words[0] = high1 ^ words[1] ^ k0, words[1] = low1;
      words[2] = high0 ^ words[3] ^ k1, words[3] = low0;
      k0 += 0x9E3779B9, k1 += 0xBB67AE85;
    }
  }
  __device__ uint32_t bits16(int i) const { return words[i / 2] >> 16 * (i % 2) & 0xffff; }
};

// What is kept is scaled. Of 65,536 neurons, about `limit` are dropped.
template <int limit> constexpr float SCALE = 65536.f / (65536 - limit);

// y = relu(h) relu(g), (count,), with dropout by 16 bits for each neuron, from the key and its index.
template <typename T, int V, int limit>
__device__ void gate(const T* h, const T* g, const uint32_t* key, size_t count, T* y) {
  static_assert(V <= 8, "a counter gives 128 bits");
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count / V) return;
  const size_t index = (size_t)i * V;
  const auto h_packed = Packed<T, V>::load(h + index), g_packed = Packed<T, V>::load(g + index);
  Packed<T, V> gated;
  if constexpr (limit > 0) {
    const Random random(i, key);
#pragma unroll
    for (int e = 0; e < V; e++) {
      const float scale = random.bits16(e) < limit ? 0 : SCALE<limit>;
      gated.set(e, relu(h_packed[e]) * relu(g_packed[e]) * scale);
    }
  } else {
#pragma unroll
    for (int e = 0; e < V; e++) gated.set(e, relu(h_packed[e]) * relu(g_packed[e]));
  }
  gated.store(y + index);
}

// dg, and dx without what comes by q, (count,). Where x = relu(h) is not 0, y / x is relu(g), dropped
// and scaled. Where x is 0, dx is not needed: -0, which it is nowhere else, tells so.
template <typename T, int V, int limit>
__device__ void gate_gradients(const T* h, const T* y, const T* dy, size_t count, T* dg, T* dx) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count / V) return;
  const size_t index = (size_t)i * V;
  const auto h_packed = Packed<T, V>::load(h + index), y_packed = Packed<T, V>::load(y + index);
  const auto dy_packed = Packed<T, V>::load(dy + index);
  Packed<T, V> dg_packed, dx_packed;
#pragma unroll
  for (int e = 0; e < V; e++) {
    const float x = h_packed[e], y = y_packed[e], dy = dy_packed[e];
    const bool inactive = x <= 0;
    dg_packed.set(e, inactive || y <= 0 ? 0 : dy * x * SCALE<limit>);
    dx_packed.set(e, inactive ? -0.f : dy * (y / x));
    if (!inactive && dx_packed[e] == 0) dx_packed.set(e, 0);
  }
  dg_packed.store(dg + index), dx_packed.store(dx + index);
}

// dh = dx + R_-t dq where x is not 0, else 0: all (rows, length, N); phases (N/2,).
template <typename T, int V>
__device__ void encode_gradient(const T* dx, const T* dq, const uint32_t* begin,
                                const uint32_t* increments, int rows, int length, int N, T* dh) {
  struct Gradients { Packed<T, V> x, q; };
  const Rope<V> rope(begin, increments, length, N);
  if (rope.t >= length) return;
  auto index = [&](int row) { return ((size_t)row * length + rope.t) * N + rope.n; };
  for_each_batched(
      rows,
      [&](int row) {
        return Gradients{Packed<T, V>::load(dx + index(row)), Packed<T, V>::load(dq + index(row))};
      },
      [&](int row, const Gradients& d) {
        Packed<T, V> sum;
        auto set = [&](int e, float rotated) {
          const float x = d.x[e];
          sum.set(e, __float_as_uint(x) == 0x80000000 ? 0 : x + rotated);
        };
#pragma unroll
        for (int p = 0; p < V / 2; p++) {
          const float even = d.q[2 * p], odd = d.q[2 * p + 1];
          set(2 * p, even * rope.cosine[p] + odd * rope.sine[p]);
          set(2 * p + 1, odd * rope.cosine[p] - even * rope.sine[p]);
        }
        sum.store(dh + index(row));
      });
}

}  // namespace bdh
