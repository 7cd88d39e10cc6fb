// Driver functions that Triton's and torch's libraries are linked against, so that they have to exist, and that training does
// not need. Each answers CUDA_ERROR_NOT_SUPPORTED. Without cuda.h: nobody reads their arguments.

#define REFUSED(name) \
    int name() { return 801; }

extern "C" {

// Triton's launcher
REFUSED(cuCtxGetLimit)
REFUSED(cuCtxSetLimit)
REFUSED(cuOccupancyMaxActiveClusters)
REFUSED(cuPointerGetAttributes)
REFUSED(cuTensorMapEncodeIm2col)
REFUSED(cuTensorMapEncodeTiled)

// torch's libcaffe2_nvrtc
REFUSED(cuLaunchCooperativeKernel)
REFUSED(cuLinkAddData_v2)
REFUSED(cuLinkComplete)
REFUSED(cuLinkCreate_v2)
REFUSED(cuModuleLoadDataEx)
REFUSED(cuOccupancyMaxActiveBlocksPerMultiprocessor)
}
