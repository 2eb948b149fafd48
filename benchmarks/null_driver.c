/* A CUDA driver that does nothing at once: what remains of a batch is the host's own time. */
#include <stddef.h>
#include <stdint.h>

typedef void* handle;
static uintptr_t made = 64;

static int give(handle* to) {
    *to = (handle)(made += 64);
    return 0;
}

int cuGetErrorString(int code, const char** text) { (void)code; *text = "none"; return 0; }
int cuCtxGetCurrent(handle* context) { *context = (handle)64; return 0; }
int cuCtxSetCurrent(handle context) { (void)context; return 0; }
int cuStreamCreate(handle* stream, unsigned flags) { (void)flags; return give(stream); }
int cuStreamDestroy_v2(handle stream) { (void)stream; return 0; }
int cuStreamWaitEvent(handle stream, handle event, unsigned flags) { (void)stream, (void)event, (void)flags; return 0; }
int cuEventCreate(handle* event, unsigned flags) { (void)flags; return give(event); }
int cuEventDestroy_v2(handle event) { (void)event; return 0; }
int cuEventRecord(handle event, handle stream) { (void)event, (void)stream; return 0; }
int cuEventQuery(handle event) { (void)event; return 0; }
int cuEventSynchronize(handle event) { (void)event; return 0; }
int cuEventElapsedTime(float* ms, handle from, handle to) { (void)from, (void)to; *ms = 0; return 0; }
int cuMemcpyAsync(uint64_t to, uint64_t from, size_t size, handle stream) { (void)to, (void)from, (void)size, (void)stream; return 0; }
int cuMemcpyBatchAsync_v2(handle to, handle from, handle sizes, size_t count, handle attributes, size_t* used, size_t uses,
                          handle stream) {
    (void)to, (void)from, (void)sizes, (void)count, (void)attributes, (void)used, (void)uses, (void)stream;
    return 0;
}
int cuMemcpy2DAsync_v2(handle shape, handle stream) { (void)shape, (void)stream; return 0; }
int cuLaunchKernelEx(handle config, handle function, handle* parameters, handle* extra) {
    (void)config, (void)function, (void)parameters, (void)extra;
    return 0;
}
int cuGraphLaunch(handle graph, handle stream) { (void)graph, (void)stream; return 0; }
int cuGraphExecDestroy(handle graph) { (void)graph; return 0; }
