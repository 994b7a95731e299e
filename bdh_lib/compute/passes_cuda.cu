// A layer's passes over activations on a CUDA GPU, each array read or written once (passes_cuda.py
// launches them). A thread takes V neurons, which it loads and stores at once: T of 16 bits, 8 of them,
// are 16 bytes. NaNs are passed on.

namespace bdh {

template <typename T, int V> struct alignas(V * sizeof(T) < 16 ? V * sizeof(T) : 16) Piece {
  unsigned words[V * sizeof(T) / 4];  // memory is moved in words, whatever the type

  static __device__ Piece of(const T* from) { return *(const Piece*)from; }
  __device__ float operator[](int i) const {
    T one;
    memcpy(&one, (const char*)words + i * sizeof(T), sizeof(T));
    return float(one);
  }
  __device__ void set(int i, float value) {
    const T one(value);
    memcpy((char*)words + i * sizeof(T), &one, sizeof(T));
  }
  __device__ void store(T* to) const { *(Piece*)to = *this; }
};

__device__ __forceinline__ float relu(float x) { return x <= 0 ? 0 : x; }

// Calls use(i, load(i)) for i < count, four loads being under way at once.
template <typename Load, typename Use>
__device__ __forceinline__ void walk(int count, Load load, Use use) {
  constexpr int U = 4;
  for (int first = 0; first < count; first += U) {
    decltype(load(0)) some[U];
#pragma unroll
    for (int u = 0; u < U; u++)
      if (first + u < count) some[u] = load(first + u);
#pragma unroll
    for (int u = 0; u < U; u++)
      if (first + u < count) use(first + u, some[u]);
  }
}

// V neurons at one position. Rows of activations (rows, length, N), one for each head and sequence,
// share their sines. Phases are in 2^-32 of a circle: begin + t * increments wraps.
template <int V> struct Place {
  int t, n;
  float sine[V / 2], cosine[V / 2];

  __device__ Place(const uint32_t* begin, const uint32_t* increments, int length, int N) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    t = i / (N / V), n = i % (N / V) * V;
    if (t >= length) return;
#pragma unroll
    for (int p = 0; p < V / 2; p++) {
      const uint32_t phase = begin[n / 2 + p] + t * increments[n / 2 + p];
      sincospif(int(phase) * 0x1p-31f, sine + p, cosine + p);
    }
  }
};

// q: relu(h), of which each pair of neurons is turned.
template <typename T, int V>
__device__ void encode(const T* h, const uint32_t* begin, const uint32_t* increments, int rows,
                       int length, int N, T* q) {
  const Place<V> at(begin, increments, length, N);
  if (at.t >= length) return;
  auto place = [&](int row) { return ((size_t)row * length + at.t) * N + at.n; };
  walk(
      rows, [&](int row) { return Piece<T, V>::of(h + place(row)); },
      [&](int row, const Piece<T, V>& h) {
        Piece<T, V> turned;
#pragma unroll
        for (int p = 0; p < V / 2; p++) {
          const float x0 = relu(h[2 * p]), x1 = relu(h[2 * p + 1]);
          turned.set(2 * p, x0 * at.cosine[p] - x1 * at.sine[p]);
          turned.set(2 * p + 1, x1 * at.cosine[p] + x0 * at.sine[p]);
        }
        turned.store(q + place(row));
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

// y = relu(h) relu(g) of `count` neurons, with dropout by 16 bits each, which depend on key and place.
template <typename T, int V, int limit>
__device__ void gate(const T* h, const T* g, const uint32_t* key, size_t count, T* y) {
  static_assert(V <= 8, "a counter gives 128 bits");
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count / V) return;
  const size_t at = (size_t)i * V;
  const auto of_h = Piece<T, V>::of(h + at), of_g = Piece<T, V>::of(g + at);
  Piece<T, V> gated;
  if constexpr (limit > 0) {
    const Random random(i, key);
#pragma unroll
    for (int e = 0; e < V; e++) {
      const float scale = random.bits16(e) < limit ? 0 : SCALE<limit>;
      gated.set(e, relu(of_h[e]) * relu(of_g[e]) * scale);
    }
  } else {
#pragma unroll
    for (int e = 0; e < V; e++) gated.set(e, relu(of_h[e]) * relu(of_g[e]));
  }
  gated.store(y + at);
}

// dg, and dx without what comes by q, of `count` neurons. Where x = relu(h) is not 0, y / x is relu(g),
// dropped and scaled. Where x is 0, dx is not needed: -0, which it is nowhere else, tells so.
template <typename T, int V, int limit>
__device__ void gate_gradients(const T* h, const T* y, const T* dy, size_t count, T* dg, T* dx) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count / V) return;
  const size_t at = (size_t)i * V;
  const auto of_h = Piece<T, V>::of(h + at), of_y = Piece<T, V>::of(y + at);
  const auto of_dy = Piece<T, V>::of(dy + at);
  Piece<T, V> of_g, of_x;
#pragma unroll
  for (int e = 0; e < V; e++) {
    const float x = of_h[e], y = of_y[e], dy = of_dy[e];
    const bool silent = x <= 0;
    of_g.set(e, silent || y <= 0 ? 0 : dy * x * SCALE<limit>);
    of_x.set(e, silent ? -0.f : dy * (y / x));
    if (!silent && of_x[e] == 0) of_x.set(e, 0);
  }
  of_g.store(dg + at), of_x.store(dx + at);
}

// dh = dx + dq turned back, where x is not 0.
template <typename T, int V>
__device__ void encode_gradient(const T* dx, const T* dq, const uint32_t* begin,
                                const uint32_t* increments, int rows, int length, int N, T* dh) {
  struct Both { Piece<T, V> x, q; };
  const Place<V> at(begin, increments, length, N);
  if (at.t >= length) return;
  auto place = [&](int row) { return ((size_t)row * length + at.t) * N + at.n; };
  walk(
      rows,
      [&](int row) {
        return Both{Piece<T, V>::of(dx + place(row)), Piece<T, V>::of(dq + place(row))};
      },
      [&](int row, const Both& d) {
        Piece<T, V> sum;
        auto set = [&](int e, float back) {
          const float x = d.x[e];
          sum.set(e, __float_as_uint(x) == 0x80000000 ? 0 : x + back);
        };
#pragma unroll
        for (int p = 0; p < V / 2; p++) {
          const float q0 = d.q[2 * p], q1 = d.q[2 * p + 1];
          set(2 * p, q0 * at.cosine[p] + q1 * at.sine[p]);
          set(2 * p + 1, q1 * at.cosine[p] - q0 * at.sine[p]);
        }
        sum.store(dh + place(row));
      });
}

}  // namespace bdh
