// libcublas: matrix products are counted; their results are unknown.
#include "phantom.h"
static char handle;
int cublasCreate_v2(void **made) { *made = &handle; return 0; }
int cublasGetMathMode(void *h, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *h, int *mode) { *mode = 0; return 0; }
int cublasGemmEx(void *h, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int at, int lda, const void *b, int bt, int ldb, const void *beta, void *c, int ct, int ldc, int compute, int algorithm) {
    phantom_matmul(c, m, n, k, 1);
    return 0;
}
int cublasGemmStridedBatchedEx(void *h, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int at, int lda, long long sa, const void *b, int bt, int ldb, long long sb, const void *beta, void *c, int ct, int ldc, long long sc, int batch, int compute, int algorithm) {
    phantom_matmul(c, m, n, k, batch);
    return 0;
}
int cublasSgemm_v2(void *h, int ta, int tb, int m, int n, int k, const float *alpha, const float *a, int lda, const float *b, int ldb, const float *beta, float *c, int ldc) {
    phantom_matmul(c, m, n, k, 1);
    return 0;
}
int cublasSgemmStridedBatched(void *h, int ta, int tb, int m, int n, int k, const float *alpha, const float *a, int lda, long long sa, const float *b, int ldb, long long sb, const float *beta, float *c, int ldc, long long sc, int batch) {
    phantom_matmul(c, m, n, k, batch);
    return 0;
}
