// cuBLAS and cuBLASLt: a matrix product is counted. Their headers are left out, since they need more of the CUDA toolkit than
// torch brings along; arguments that nobody reads need no names, and a C function may be called with more of them.
#include <cstdlib>
#include <cstring>

#include "card.h"

namespace {

const int SUCCESS = 0, ALLOC_FAILED = 3;  // cublasStatus_t

// cuBLAS takes a workspace of its own at times, which is where it runs out of memory.
int product() { return card::begin(card::PRODUCT) ? SUCCESS : ALLOC_FAILED; }

int create(void** handle) {
    *handle = calloc(1, 512);
    return SUCCESS;
}

int destroy(void* handle) {
    free(handle);
    return SUCCESS;
}

}  // namespace

extern "C" {

// Products, by the types of their operands.
int cublasSgemm_v2() { return product(); }
int cublasSgemmEx() { return product(); }
int cublasSgemmStridedBatched() { return product(); }
int cublasGemmEx() { return product(); }
int cublasGemmStridedBatchedEx() { return product(); }
int cublasSgemv_v2() { return product(); }
int cublasSdot_v2() { return product(); }
int cublasDotEx() { return product(); }
int cublasLtMatmul() { return product(); }

// The handle and its settings, of which torch reads two back.
int cublasCreate_v2(void** handle) { return create(handle); }
int cublasDestroy_v2(void* handle) { return destroy(handle); }
int cublasSetStream_v2() { return SUCCESS; }
int cublasSetWorkspace_v2() { return SUCCESS; }
int cublasSetMathMode() { return SUCCESS; }
int cublasSetPointerMode_v2() { return SUCCESS; }
int cublasGetMathMode(void*, int* mode) {
    *mode = 0;
    return SUCCESS;
}
int cublasGetPointerMode_v2(void*, int* mode) {
    *mode = 0;
    return SUCCESS;
}

// cuBLASLt describes a product in objects, then asks which algorithm to take: one that needs no workspace of its own.
size_t cublasLtGetVersion() { return 130000; }
int cublasLtCreate(void** handle) { return create(handle); }
int cublasLtDestroy(void* handle) { return destroy(handle); }
int cublasLtMatmulDescCreate(void** object) { return create(object); }
int cublasLtMatmulDescDestroy(void* object) { return destroy(object); }
int cublasLtMatmulDescSetAttribute() { return SUCCESS; }
int cublasLtMatrixLayoutCreate(void** object) { return create(object); }
int cublasLtMatrixLayoutDestroy(void* object) { return destroy(object); }
int cublasLtMatrixLayoutSetAttribute() { return SUCCESS; }
int cublasLtMatmulPreferenceCreate(void** object) { return create(object); }
int cublasLtMatmulPreferenceDestroy(void* object) { return destroy(object); }
int cublasLtMatmulPreferenceSetAttribute() { return SUCCESS; }
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* results, int* count) {
    memset(results, 0, 64);  // the algorithm, no workspace, success
    *count = 1;
    return SUCCESS;
}
}
