// NVML: torch names the processes on the card in its out-of-memory message, and counts cards by it. nvml.h is part of the
// toolkit alone, so the few types are written out.

extern "C" {

int nvmlInit_v2() { return 0; }
int nvmlShutdown() { return 0; }
int nvmlDeviceGetCount_v2(unsigned* count) {
    *count = 1;
    return 0;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned, void** device) {
    *device = device;
    return 0;
}
int nvmlDeviceGetHandleByPciBusId_v2(const char*, void** device) {
    *device = device;
    return 0;
}
int nvmlSystemGetCudaDriverVersion_v2(int* version) {
    *version = 13000;
    return 0;
}

int nvmlDeviceGetComputeRunningProcesses(void*, unsigned* count, void*) {
    *count = 0;
    return 0;
}

// torch looks these up when it opens the library; 3 is NVML_ERROR_NOT_SUPPORTED.
int nvmlDeviceGetNvLinkRemoteDeviceType() { return 3; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2() { return 3; }
int nvmlDeviceGetGpuFabricInfoV() { return 3; }
}
