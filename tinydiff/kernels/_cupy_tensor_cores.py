"""What a warp does with a GPU's tensor cores, in CUDA: a source that others begin with.

They multiply a tile of 16 x 8 by one of 8 x 8 and add in float32, but see 11 digits of each factor (TF32):
the last 13 bits of a float32 are cut off. There are two ways to live with that.

- SPLIT, for float32 (docs: A.29): a number is high + low, high being what is seen, and a product is three::

      a b  ~  a_low b_high + a_high b_low + a_high b_high

  What is left out, a_low b_low and what is cut off of low, is some 2^-22 of a b. The tensor cores cut off
  sums, too: so only the three times eight terms of two tiles are added there, and the sum goes on in
  float32, which rounds (Ootomo & Yokota 2022).
- Not SPLIT, for TF32 (docs: A.30): the factor as it is seen. The cut takes half a unit of the 11th digit
  from it on average, 2^-11 E[1 / m] of itself: 0.72 2^-11, if the logarithm of its mantissa m in [1, 2) is
  uniform. So it is first made larger by as much. That is as good as rounding, in one operation; a
  number of 11 digits stays what it is.

Lane l of a warp holds, with g = l div 4 and q = l mod 4: of a (16 x 8) rows g and g + 8 in columns q and
q + 4; of b (8 x 8) rows q and q + 4 in column g; of c (16 x 8) rows g and g + 8 in columns 2 q and 2 q + 1
(PTX ISA, mma.m16n8k8).
"""

__all__ = ["TENSOR_CORES"]

TENSOR_CORES = r"""
#define STRETCH 1.000352f

// d = a b + c, of tiles
__device__ void multiply(float* d, const float* a, const float* b, const float* c) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])), "f"(c[0]),
        "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// 16 bytes from global to shared memory, or zeros; under way until `arrived`.
__device__ void send(float* to, const float* from, bool there) {
  unsigned at = (unsigned)__cvta_generic_to_shared(to);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(there ? 16 : 0));
}
__device__ void sent() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// All but the last PENDING groups that were `sent`.
template <int PENDING>
__device__ void arrived() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }
"""
