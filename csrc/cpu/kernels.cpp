// The inner loops, in GCC's and Clang's vector types, for one instruction set: ORTHOREG_CPU_LEVEL.
//
// product: the panel B[k, <= 32] is packed kDepth rows at a time; a block of kRows rows of C stays
// in registers while one packed row after the other is multiplied by one entry of each row of A. 2
// m n k flops; B is read once, A once for each panel.
//
// Nothing here may be an inline function with external linkage (std:: included): the linker could
// keep the copy of the widest instruction set for everybody.
#include "kernels.h"

#if defined(__AVX512F__)
#define ORTHOREG_VECTOR_BYTES 64
#define ORTHOREG_ROWS 12
#elif defined(__AVX2__)
#define ORTHOREG_VECTOR_BYTES 32
#define ORTHOREG_ROWS 6
#else
#define ORTHOREG_VECTOR_BYTES 16
#define ORTHOREG_ROWS 4
#endif

namespace orthoreg::cpu {
namespace ORTHOREG_CPU_LEVEL {
namespace {

constexpr int kRows = ORTHOREG_ROWS;

template <class T>
struct Vector {
  typedef T Type __attribute__((vector_size(ORTHOREG_VECTOR_BYTES), aligned(alignof(T))));
  static constexpr int kLanes = ORTHOREG_VECTOR_BYTES / sizeof(T);
};

// Two registers of one packed row at a time: C[0..Rows, 0..2 lanes] over `depth` rows of the panel.
template <class T, int Rows>
void block(Strided<T> a, const T* packed, int64_t depth, T* c, int64_t ldc, int64_t columns,
           bool first) {
  using V = typename Vector<T>::Type;
  constexpr int kLanes = Vector<T>::kLanes;
  V sum[Rows][2] = {};
  for (int64_t p = 0; p < depth; ++p) {
    const V b0 = *reinterpret_cast<const V*>(packed + p * kPanel);
    const V b1 = *reinterpret_cast<const V*>(packed + p * kPanel + kLanes);
    const T* entry = a.data + p * a.cols;
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) {
      const T x = entry[i * a.rows];
      sum[i][0] += x * b0;
      sum[i][1] += x * b1;
    }
  }
  for (int i = 0; i < Rows; ++i) {
    T* row = c + i * ldc;
    if (columns == 2 * kLanes) {
      V* out = reinterpret_cast<V*>(row);
      V* next = reinterpret_cast<V*>(row + kLanes);
      *out = first ? sum[i][0] : *out + sum[i][0];
      *next = first ? sum[i][1] : *next + sum[i][1];
    } else {
      const T* value = reinterpret_cast<const T*>(sum[i]);
      for (int64_t j = 0; j < columns; ++j) row[j] = first ? value[j] : row[j] + value[j];
    }
  }
}

template <class T, int Rows>
void rows(int64_t count, Strided<T> a, const T* packed, int64_t depth, T* c, int64_t ldc,
          int64_t columns, bool first) {
  if constexpr (Rows > 0) {
    if (count == Rows) {
      block<T, Rows>(a, packed, depth, c, ldc, columns, first);
    } else {
      rows<T, Rows - 1>(count, a, packed, depth, c, ldc, columns, first);
    }
  }
}

template <class T>
void pack(Strided<T> b, int64_t depth, int64_t n, T* packed) {
  for (int64_t p = 0; p < depth; ++p) {
    for (int64_t j = n; j < kPanel; ++j) packed[p * kPanel + j] = 0;
  }
  if (b.cols == 1) {
    for (int64_t p = 0; p < depth; ++p) {
      for (int64_t j = 0; j < n; ++j) packed[p * kPanel + j] = b.data[p * b.rows + j];
    }
  } else {  // read along the rows of memory
    constexpr int64_t kStrip = 16;
    for (int64_t start = 0; start < depth; start += kStrip) {
      const int64_t end = start + kStrip < depth ? start + kStrip : depth;
      for (int64_t j = 0; j < n; ++j) {
        for (int64_t p = start; p < end; ++p) {
          packed[p * kPanel + j] = b.data[p * b.rows + j * b.cols];
        }
      }
    }
  }
}

template <class T>
void product(Strided<T> a, Strided<T> b, int64_t m, int64_t n, int64_t k, T* c, int64_t ldc,
             T* packed) {
  constexpr int64_t kWidth = 2 * Vector<T>::kLanes;
  if (k == 0) {
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) c[i * ldc + j] = 0;
    }
  }
  for (int64_t p = 0; p < k; p += kDepth) {
    const int64_t depth = p + kDepth < k ? kDepth : k - p;
    pack<T>({b.at(p, 0), b.rows, b.cols}, depth, n, packed);
    for (int64_t i = 0; i < m; i += kRows) {
      const int64_t count = i + kRows < m ? kRows : m - i;
      for (int64_t j = 0; j < n; j += kWidth) {
        const int64_t columns = j + kWidth < n ? kWidth : n - j;
        rows<T, kRows>(count, {a.at(i, p), a.rows, a.cols}, packed + j, depth, c + i * ldc + j, ldc,
                       columns, p == 0);
      }
    }
  }
}

// sum_i w_i^2 in double.
template <class T>
double sum_of_squares(const T* w, int64_t count) {
  constexpr int kLanes = 8;
  typedef T In __attribute__((vector_size(kLanes * sizeof(T)), aligned(alignof(T))));
  typedef double Wide __attribute__((vector_size(kLanes * sizeof(double))));
  Wide sum = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Wide x = __builtin_convertvector(*reinterpret_cast<const In*>(w + i), Wide);
    sum += x * x;
  }
  double total = 0;
  for (; i < count; ++i) total += static_cast<double>(w[i]) * w[i];
  for (int j = 0; j < kLanes; ++j) total += sum[j];
  return total;
}

template <class T>
void pairs(Strided<T> a, int64_t m, int64_t k, double* out) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      double sum = 0;
      for (int64_t p = 0; p < k; ++p) sum += static_cast<double>(*a.at(i, p)) * *a.at(j, p);
      out[i * m + j] = out[j * m + i] = sum;
    }
  }
}

template <class T>
void squares(Strided<T> a, int64_t m, int64_t k, double* out) {
  for (int64_t i = 0; i < m; ++i) out[i] = 0;
  if (a.cols == 1) {
    for (int64_t i = 0; i < m; ++i) out[i] = sum_of_squares(a.at(i, 0), k);
  } else {
    for (int64_t p = 0; p < k; ++p) {
      const T* row = a.at(0, p);
      for (int64_t i = 0; i < m; ++i) {
        const double x = row[i * a.rows];
        out[i] += x * x;
      }
    }
  }
}

template <class T>
constexpr Kernels<T> kKernels = {&product<T>, &pairs<T>, &squares<T>};

}  // namespace

extern const Kernels<float> float_kernels = kKernels<float>;
extern const Kernels<double> double_kernels = kKernels<double>;

}  // namespace ORTHOREG_CPU_LEVEL
}  // namespace orthoreg::cpu
