/* A FAKE libcudart, for tests without a GPU: "device" memory is host memory, a stream is a number. */
#include <stdlib.h>
#include <string.h>

int cudaStreamCreate(void **stream) { *stream = (void *)7; return 0; }
int cudaMalloc(void **place, size_t size) { *place = malloc(size); return *place ? 0 : 2; }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
    if ((kind != 1 && kind != 2) || stream != (void *)7) return 1;
    memcpy(to, from, size);
    return 0;
}
int cudaStreamSynchronize(void *stream) { return stream == (void *)7 ? 0 : 1; }
