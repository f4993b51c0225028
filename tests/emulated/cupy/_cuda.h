// CUDA's words for g++: what a kernel's source may say, and what `_ptx.py` makes of its PTX.
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __launch_bounds__(threads)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static __attribute__((section("shared_memory")))

struct Index {
  unsigned x;
};
struct alignas(8) float2 {
  float x, y;
};
static inline float2 make_float2(float x, float y) { return {x, y}; }

extern "C" {
extern Index threadIdx, blockIdx;
extern char* dynamic_shared;
void __syncthreads();
uint64_t of_lane(unsigned lanes, uint64_t mine, int by);
void tile_product(float* d, const uint32_t* a, const uint32_t* b, const float* c);
unsigned place_in_shared(const void* p);
void copy_later(unsigned to, const void* from, int bytes, int from_there);
void copies_belong_together();
void wait_for_copies(int pending);
extern char __start_shared_memory __attribute__((weak)), __stop_shared_memory __attribute__((weak));
}

template <class To, class From>
static inline To same_bits(From from) {
  static_assert(sizeof(To) >= sizeof(From));
  To to = 0;
  memcpy(&to, &from, sizeof(From));
  return to;
}
static inline unsigned __float_as_uint(float v) { return same_bits<unsigned>(v); }
static inline float __uint_as_float(unsigned v) { return same_bits<float>(v); }

template <class T>
static inline T __shfl_xor_sync(unsigned lanes, T mine, int by) {
  uint64_t found = of_lane(lanes, same_bits<uint64_t>(mine), by);
  memcpy(&mine, &found, sizeof(T));
  return mine;
}

static inline size_t __cvta_generic_to_shared(const void* p) { return place_in_shared(p); }

// What an operand's letter says of its type.
template <class T>
static inline T ptx_r(T v) {
  static_assert(sizeof(T) == 4 && std::is_integral_v<T>);
  return v;
}
template <class T>
static inline T ptx_l(T v) {
  static_assert(sizeof(T) == 8 && !std::is_floating_point_v<T>);
  return v;
}
static inline float& ptx_f(float& v) { return v; }
static inline const float& ptx_f(const float& v) { return v; }
#define ptx_n(v) std::integral_constant<int, v>::value

static inline void mma_sync_aligned_m16n8k8_row_col_f32_tf32_tf32_f32(
    float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
    uint32_t b1, float c0, float c1, float c2, float c3) {
  uint32_t a[] = {a0, a1, a2, a3}, b[] = {b0, b1};
  float c[] = {c0, c1, c2, c3}, d[4];
  tile_product(d, a, b, c);
  d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
}
static inline void cp_async_ca_shared_global(unsigned to, const void* from, int bytes, int from_there) {
  copy_later(to, from, bytes, from_there);
}
static inline void cp_async_commit_group() { copies_belong_together(); }
static inline void cp_async_wait_group(int pending) { wait_for_copies(pending); }

// One letter for each parameter: a pointer, or what CuPy makes of Python's int and float.
template <class A>
constexpr char letter() {
  return std::is_pointer_v<A> ? 'p' : std::is_same_v<A, long long> ? 'i' : std::is_same_v<A, double> ? 'd' : '?';
}
template <class... A>
static const char* letters_of(void (*)(A...)) {
  static const char found[] = {letter<A>()..., 0};
  return found;
}
template <class... A, size_t... I>
static void called(void (*f)(A...), void** args, std::index_sequence<I...>) {
  f(*(A*)args[I]...);
}
template <class... A>
static void called(void (*f)(A...), void** args) {
  called(f, args, std::index_sequence_for<A...>());
}
