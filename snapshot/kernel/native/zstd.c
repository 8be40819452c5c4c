#define _GNU_SOURCE
#include "zstd_internal.h"

#include <dlfcn.h>
#include <pthread.h>
#include <string.h>

/* Of the process, as the library is. */
static zstd_functions functions;
static int usable;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void load(void)
{
    static const struct { const char *name; void *to; } symbols[] = {
        {"ZSTD_createCCtx", &functions.compressor},
        {"ZSTD_freeCCtx", &functions.free_compressor},
        {"ZSTD_getParams", &functions.parameters},
        {"ZSTD_compressBegin_advanced", &functions.begin},
        {"ZSTD_compressContinue", &functions.block},
        {"ZSTD_compressEnd", &functions.last},
        {"ZSTD_createDCtx", &functions.decompressor},
        {"ZSTD_freeDCtx", &functions.free_decompressor},
        {"ZSTD_decompressBegin", &functions.begin_reading},
        {"ZSTD_nextSrcSizeToDecompress", &functions.wanted},
        {"ZSTD_decompressContinue", &functions.read},
        {"ZSTD_isError", &functions.failed},
    };
    void *library = dlopen("libzstd.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return;
    for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
        void *found = dlsym(library, symbols[i].name);
        if (!found)
            return;
        memcpy(symbols[i].to, &found, sizeof found);
    }
    usable = 1;
}

const zstd_functions *snap_zstd(void)
{
    pthread_once(&once, load);
    return usable ? &functions : NULL;
}
