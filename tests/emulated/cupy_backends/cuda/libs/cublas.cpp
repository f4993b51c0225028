// Of cuBLAS what tinydiff calls, in its own terms: matrices by columns, alpha and beta on the host.
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { OK = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
enum { R_32F = 0, R_64F = 1, COMPUTE_32F = 68, COMPUTE_64F = 70, COMPUTE_32F_FAST_TF32 = 77 };

struct Call {
  int transa, transb, m, n, k, lda, ldb, ldc, kind, compute, count;
  long long stride_a, stride_b, stride_c;
  double alpha, beta;
  const void *a, *b;
  void *c, *workspace;
};

static void (*ask)(size_t stream, Call*, size_t);

struct Handle {
  size_t stream;
  void* workspace;
};

template <class T>
static T seen(T v, int compute) {  // TF32: to the nearest of 11 digits
  if (compute != COMPUTE_32F_FAST_TF32) return v;
  float f = v;
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if (isfinite(f)) bits = (bits + 0x1000) & 0xffffe000u;
  memcpy(&f, &bits, 4);
  return f;
}

template <class T>
static void product(const Call& of) {
  for (int which = 0; which < of.count; which++) {
    const T* a = (const T*)of.a + which * of.stride_a;
    const T* b = (const T*)of.b + which * of.stride_b;
    T* c = (T*)of.c + which * of.stride_c;
    for (int j = 0; j < of.n; j++)
      for (int i = 0; i < of.m; i++) {
        double sum = 0;
        for (int l = 0; l < of.k; l++) {
          T x = of.transa ? a[l + (long long)i * of.lda] : a[i + (long long)l * of.lda];
          T y = of.transb ? b[j + (long long)l * of.ldb] : b[l + (long long)j * of.ldb];
          sum += (double)seen(x, of.compute) * seen(y, of.compute);
        }
        T* to = c + i + (long long)j * of.ldc;
        *to = of.alpha * sum + (of.beta == 0 ? 0 : of.beta * *to);
      }
  }
}

extern "C" {

void ask_with(void (*hook)(size_t, Call*, size_t)) { ask = hook; }

void multiply(const Call* of) {
  memset(of->workspace, 0x77, 4096);  // whoever else has it has to notice
  if (of->kind == R_32F) product<float>(*of);
  else product<double>(*of);
}

int cublasCreate_v2(Handle** handle) {
  *handle = new Handle{0, nullptr};
  return OK;
}

int cublasSetStream_v2(Handle* handle, size_t stream) {
  handle->stream = stream;
  handle->workspace = nullptr;  // as the library: to set a stream is to lose the workspace
  return OK;
}

int cublasSetWorkspace_v2(Handle* handle, void* workspace, size_t size) {
  if (!workspace || (uintptr_t)workspace % 256 || size < (1 << 22)) return INVALID_VALUE;
  handle->workspace = workspace;
  return OK;
}

int cublasGemmStridedBatchedEx(
    Handle* handle, int transa, int transb, int m, int n, int k, const void* alpha, const void* a, int kind_a,
    int lda, long long stride_a, const void* b, int kind_b, int ldb, long long stride_b, const void* beta,
    void* c, int kind_c, int ldc, long long stride_c, int count, int compute, int algorithm) {
  if (!handle || !handle->workspace) return NOT_INITIALIZED;
  bool wide = kind_a == R_64F, tall = lda >= (transa ? k : m) && ldb >= (transb ? n : k) && ldc >= m;
  tall = tall && lda > 0 && ldb > 0 && ldc > 0;  // of no rows and no terms, too
  if (m < 0 || n < 0 || k < 0 || count < 0 || !tall || (transa | transb) & ~1) return INVALID_VALUE;
  if (kind_a != kind_b || kind_a != kind_c || (kind_a & ~1) || algorithm != -1) return NOT_SUPPORTED;
  if (wide != (compute == COMPUTE_64F) || (!wide && compute != COMPUTE_32F && compute != COMPUTE_32F_FAST_TF32))
    return NOT_SUPPORTED;
  Call call = {transa, transb, m, n, k, lda, ldb, ldc, kind_a, compute, count, stride_a, stride_b, stride_c};
  call.alpha = wide ? *(const double*)alpha : *(const float*)alpha;
  call.beta = wide ? *(const double*)beta : *(const float*)beta;
  call.a = a, call.b = b, call.c = c, call.workspace = handle->workspace;
  ask(handle->stream, &call, sizeof call);
  return OK;
}

int cublasGemmEx(
    Handle* handle, int transa, int transb, int m, int n, int k, const void* alpha, const void* a, int kind_a,
    int lda, const void* b, int kind_b, int ldb, const void* beta, void* c, int kind_c, int ldc, int compute,
    int algorithm) {
  return cublasGemmStridedBatchedEx(handle, transa, transb, m, n, k, alpha, a, kind_a, lda, 0, b, kind_b, ldb,
                                    0, beta, c, kind_c, ldc, 0, 1, compute, algorithm);
}
}
