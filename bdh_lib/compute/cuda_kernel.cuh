// What elementwise_cuda.cu and step_cuda.cu share; cuda_kernel.py includes it before them. NaNs are passed on.

namespace bdh {

// n numbers, loaded and stored at once (by 16 bytes), in words: of a 16-bit type the compiler would take
// them apart right after the load, and so wait for it.
template <typename T, int n> struct alignas(n * sizeof(T) < 16 ? n * sizeof(T) : 16) Packed {
  unsigned words[n * sizeof(T) / 4];

  static __device__ Packed load(const T* from) { return *(const Packed*)from; }
  __device__ void store(T* to) const { *(Packed*)to = *this; }
  __device__ float operator[](int i) const {
    T value;
    memcpy(&value, (const char*)words + i * sizeof(T), sizeof(T));
    return float(value);
  }
  __device__ void set(int i, float number) {
    const T value(number);
    memcpy((char*)words + i * sizeof(T), &value, sizeof(T));
  }
};

__device__ __forceinline__ float relu(float x) { return x <= 0 ? 0 : x; }

// Of a phase in 2^-32 of a circle: at position t of a pair of neurons, begin + t * increment, which wraps.
__device__ __forceinline__ void sincos_phase(uint32_t phase, float* sine, float* cosine) {
  sincospif(int(phase) * 0x1p-31f, sine, cosine);
}

}  // namespace bdh
